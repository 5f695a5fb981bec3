"""Plots of one layer's routing: what is drawn, against numbers by hand or brute force."""

import inspect
import itertools
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from cases import slow_but_one
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from routings import one_routing as routing
from routings import random_routing

import braidax as bx

STYLES = ("default", "dark_background")


def drawn(ax):
    """The renderer, after everything has its final place."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return canvas.get_renderer()


def contrast(first, second):
    """WCAG 2.2's contrast ratio, 1 to 21."""

    def luminance(colour):
        rgb = np.array(to_rgb(colour))
        return np.dot(
            np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4),
            (0.2126, 0.7152, 0.0722),
        )

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def texts(ax):
    return [text.get_text() for text in ax.texts]


# --- the bias


def test_bias_is_drawn_less_its_mean_at_each_step():
    bias = np.array([[1, 2, 3], [5, 5, 5], [-1, 0, 4]], np.float32)
    ax = bx.plot_bias([0, 10, 20], jnp.asarray(bias))
    np.testing.assert_array_equal(
        [line.get_ydata() for line in ax.lines[:3]], [[-1, 0, -2], [0, 0, -1], [1, 0, 3]]
    )
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(ax.lines[3].get_ydata(), [0, 0])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2", "mean of experts"]
    assert "mean over experts" in ax.get_ylabel() and ax.get_xlabel() == "Training step"


def test_of_many_experts_the_farthest_have_a_colour_and_a_name():
    ends = np.arange(16) - 7.5
    ends[[3, 8]] = ends[[8, 3]]
    ax = bx.plot_bias(np.arange(30), np.linspace(0, 1, 30)[:, None] * ends)
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["15", "14", "13", "2", "1", "0", "10 more experts", "mean of experts"]
    colours = [to_rgb(line.get_color()) for line in ax.lines[:16]]
    named = [colours[expert] for expert in (15, 14, 13, 2, 1, 0)]
    others = set(colours) - set(named)
    assert len(set(named)) == 6 and len(others) == 1
    shown = [to_rgb(handle.get_color()) for handle in ax.get_legend().legend_handles]
    assert shown[:6] == named and set(shown[6:7]) == others


def test_bias_hides_no_number_that_is_not_finite():
    bias = np.zeros((2, 3), np.float32)
    bias[1, 2] = np.nan
    with pytest.raises(ValueError, match="`bias` must be finite. Got nan at step 7, expert 2"):
        bx.plot_bias([3, 7], bias)
    for wrong in (np.zeros((3, 2)), np.zeros(2), np.zeros((2, 0)), np.zeros((2, 1, 3))):
        with pytest.raises(ValueError, match=r"`bias` \(steps, experts\)"):
            inspect.unwrap(bx.plot_bias)([3, 7], wrong)


# --- co-activation


def conditional(indices, mask, experts):
    """P(j | i) from sets, and where it is defined, token by token."""
    rows = [set(row) for row, valid in zip(indices.tolist(), mask, strict=True) if valid]
    table = np.zeros((experts, experts))
    defined = np.zeros((experts, experts), bool)
    for i, j in itertools.permutations(range(experts), 2):
        with_i = [row for row in rows if i in row]
        defined[i, j] = bool(with_i)
        table[i, j] = sum(j in row for row in with_i) / max(len(with_i), 1)
    return table, defined


@pytest.mark.parametrize("experts, experts_per_token", [(5, 4), (4, 4), (384, 8)])
def test_no_probability_above_1_beside_the_heat_map(experts, experts_per_token):
    image = bx.plot_coactivation(random_routing(9, experts, experts_per_token)).images[0]
    assert image.colorbar.ax.get_ylim()[0] == 0 and image.colorbar.ax.get_ylim()[1] <= 1
    assert all(0 <= tick <= 1 for tick in image.colorbar.get_ticks())


def test_coactivation_by_hand():
    # Expert 0 is selected three times, twice with 1 and once with 2; expert 3 never.
    ax = bx.plot_coactivation(routing([[0, 1], [2, 0], [1, 0]]))
    image = ax.images[0].get_array()
    expected = [[0, 2 / 3, 1 / 3, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    hidden = np.eye(4, dtype=bool)
    hidden[3] = True
    np.testing.assert_array_equal(np.ma.getmaskarray(image), hidden)
    np.testing.assert_array_equal(image.filled(0), expected)
    assert image[0, 0] is np.ma.masked
    assert ax.images[0].norm.vcenter == 1 / 3
    labels = [t.get_text() for t in ax.images[0].colorbar.ax.get_yticklabels()]
    assert "0.333 (chance)" in labels
    assert "3 tokens" in ax.get_title() and "i selected" in ax.images[0].colorbar.ax.get_ylabel()


@pytest.mark.parametrize("experts_per_token", [2, 3, 6])
def test_coactivation_against_sets(experts_per_token):
    generator = np.random.default_rng(experts_per_token)
    # Repetitions within a token too: one expert, however often it is named.
    indices = generator.integers(0, 7, (50, experts_per_token))
    mask = generator.random(50) < 0.7
    both = [
        routing(indices[:20].reshape(4, 5, -1), experts=8, mask=mask[:20].reshape(4, 5)),
        routing(indices[20:], experts=8, mask=mask[20:]),
    ]
    image = bx.plot_coactivation(both).images[0].get_array()
    expected, defined = conditional(indices, mask, 8)
    np.testing.assert_array_equal(~np.ma.getmaskarray(image), defined)
    np.testing.assert_array_equal(image.filled(0), expected)


def coloured(ax):
    """Row and column of the cells that differ from chance, in what is drawn."""
    image = ax.images[0]
    off_diagonal = ~np.ma.getmaskarray(image.get_array())
    assert to_rgb(ax.get_facecolor()) == (1, 1, 1)
    return np.argwhere(off_diagonal & (image.get_alpha() > 0)).tolist()


def test_sampling_noise_has_no_colour():
    """Two counts a cell: 240 tokens, chosen at random, of 16 experts, two each. Every 20th picture
    may show a cell, and of 20 pictures these show none."""
    generator = np.random.default_rng(0)
    order = np.argsort(generator.random((20, 240, 16)), axis=2)[:, :, :2]
    for indices in order:
        ax = bx.plot_coactivation(routing(indices, experts=16))
        assert ax.images[0].get_array().min() == 0 and coloured(ax) == []
    assert coloured(bx.plot_coactivation([routing(indices, experts=16) for indices in order])) == []


def test_pairs_beyond_chance_have_a_colour():
    """Experts 3 and 9 in one more token of fifty, and never 0 and 1."""
    generator = np.random.default_rng(1)
    indices = np.argsort(generator.random((8000, 16)), axis=1)[:, :2]
    indices = indices[(np.sort(indices, axis=1) != [0, 1]).any(axis=1)]
    indices[: len(indices) // 50] = [3, 9]
    found = coloured(bx.plot_coactivation(routing(indices, experts=16)))
    assert found == [[0, 1], [1, 0], [3, 9], [9, 3]]


def test_coactivation_ignores_what_padding_holds():
    mask = np.array([True, False])
    padded = bx.plot_coactivation(routing([[0, 1], [99, -1]], mask=mask)).images[0].get_array()
    assert padded[0, 1] == 1 and padded[0, 2] == 0


def test_coactivation_leaves_out_nobody():
    image = bx.plot_coactivation(routing([[0, 4], [4, 4], [0, 1]])).images[0].get_array()
    assert image[0, 1] == 1 / 2 and image[1, 0] == 1 and image[0, 2] == 0


def test_pairs_need_two_experts():
    with pytest.raises(ValueError, match="at least 2 experts per token.*Got 1"):
        bx.plot_coactivation(routing([[0], [1]]))


# --- weights


def boxes(ax):
    """(median of each box) and (lowest, highest whisker end), by rank."""
    count = len(ax.get_xticks())
    level = [
        line for line in ax.lines if np.ptp(line.get_ydata()) == 0 and np.ptp(line.get_xdata()) > 0
    ]
    medians = [line for line in level if line.get_linewidth() == 2.0]
    caps = [line for line in level if line.get_linewidth() == 1.0]
    assert len(medians) == count and len(caps) == 2 * count
    ends = np.array([line.get_ydata()[0] for line in caps]).reshape(count, 2)
    return np.array([line.get_ydata()[0] for line in medians]), ends


def test_weights_by_rank():
    weights = np.array([[0.1, 0.9], [0.7, 0.3], [0.5, 0.5]], np.float32)
    ax = bx.plot_weights(routing([[0, 1], [2, 3], [1, 0]], weights))
    medians, _ = boxes(ax)
    np.testing.assert_allclose(medians, [0.7, 0.3], atol=1e-6)
    (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed.get_ydata(), [0.5, 0.5], atol=1e-6)
    assert dashed.get_label() == "equal shares (sum 1 / 2)"
    assert "3 tokens" in ax.get_title() and "not finite" not in ax.get_title()


def test_weights_whiskers_end_at_percentiles():
    # 101 tokens whose larger weight is 1.00, 1.01, ..., 2.00: percentiles without interpolation.
    large = 1 + np.arange(101) / 100
    weights = np.stack([1 - large / 4, large], axis=1)
    medians, ends = boxes(bx.plot_weights(routing(np.tile([0, 1], (101, 1)), weights)))
    np.testing.assert_allclose(medians, [1.5, 0.625], atol=1e-6)
    np.testing.assert_allclose(ends, [[1.05, 1.95], [0.5125, 0.7375]], atol=1e-6)


def test_unequal_sums_have_no_equal_share():
    ax = bx.plot_weights(routing([[0, 1], [0, 1]], [[0.5, 0.5], [0.5, 0.6]]))
    assert ax.get_legend() is None
    assert [line for line in ax.lines if line.get_linestyle() == "--"] == []


def test_weights_that_are_not_finite_are_counted_aloud():
    weights = np.array([[0.1, 0.9], [np.nan, np.nan], [0.5, np.inf], [np.nan, 0.5]])
    mask = np.array([True, True, True, False])
    ax = bx.plot_weights(routing([[0, 1]] * 4, weights, mask=mask))
    np.testing.assert_allclose(boxes(ax)[0], [0.9, 0.1], atol=1e-6)
    assert ax.get_title().startswith("Routing weights by rank, 1 token\n2 more left out")
    with pytest.raises(ValueError, match="finite weights. Got 2 tokens"):
        bx.plot_weights(routing([[0, 1]] * 2, weights[1:3]))


def test_weights_of_nobody_are_not_drawn():
    weights = [[0.1, 0.9], [0.0, 0.3], [0.0, 0.0], [0.4, 0.6]]
    ax = bx.plot_weights(routing([[0, 1], [4, 3], [4, 4], [0, 1]], weights))
    medians, _ = boxes(ax)
    np.testing.assert_allclose(medians, [0.6, 0.25], atol=1e-6)  # of 3 tokens and of 2
    assert "3 tokens" in ax.get_title() and ax.get_legend() is None
    medians, _ = boxes(bx.plot_weights(routing([[4, 3], [2, 4]], [[0, 0.25], [0.75, 0]])))
    np.testing.assert_allclose(medians, [0.5], atol=1e-6)  # no token has rank 2
    with pytest.raises(ValueError, match="finite weights. Got 2 tokens"):
        bx.plot_weights(routing([[4, 4]] * 2))


# --- tokens


def test_token_experts_are_drawn_largest_weight_first():
    weights = [[0.25, 0.75], [0.5, 0.5], [np.nan, np.nan], [9.0, 9.0]]
    given = routing([[0, 1], [3, 2], [1, 3], [0, 0]], weights, mask=[True, True, True, False])
    ax = bx.plot_token_experts(given, ["A", " river", "\n", "$pad$"])
    cells, padding = ax.collections
    np.testing.assert_array_equal(
        cells.get_array().filled(-1), np.array([0.75, 0.25, 0.5, 0.5, -1, -1], np.float32)
    )
    # Expert numbers, cell by cell, then the tokens. The padding has no numbers.
    assert texts(ax) == ["1", "0", "3", "2", "1", "3", "A", "␣river", "\\n", "$pad$"]
    assert len(padding.get_paths()) == 1 and padding.get_hatch()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["padding", "weight not finite"]
    assert (cells.norm.vmin, cells.norm.vmax) == (0, 0.75)
    assert to_rgb(cells.to_rgba(cells.get_array())[4]) == to_rgb("#CC79A7")


def test_nobody_has_no_cell():
    indices = [[4, 1, 0], [4, 4, 4], [2, 4, 3], [4, 4, 4]]
    weights = [[0, 0.25, 0.75], [0, 0, 0], [np.nan, 0, np.nan], [0, 0, 0]]
    given = routing(indices, weights, mask=[True, True, True, False])
    ax = bx.plot_token_experts(given, "abcd")
    assert texts(ax) == ["0", "1", "2", "3", "a", "b", "c", "d"]
    np.testing.assert_array_equal(
        ax.collections[0].get_array().filled(-1), np.array([0.75, 0.25, -1, -1], np.float32)
    )
    tops = [path.get_extents().y0 for path in ax.collections[0].get_paths()]
    assert tops[0] == tops[2] < tops[1] == tops[3]  # no gap above or between
    assert len(ax.collections[1].get_paths()) == 1


@pytest.mark.parametrize(
    "tokens, decode, shown",
    [
        (b"a \n\xff", None, ["a", "␣", "\\n", "\\xff"]),
        ("a\t\x00é", None, ["a", "\\t", "\\x00", "é"]),
        (["中文", "💡"] * 2, None, ["\\u4e2d\\u6587", "\\U0001f4a1"] * 2),
        (["e\u0301", "\u200b"] * 2, None, ["e\\u0301", "\\u200b"] * 2),
        (["\ud83d", "", "x" * 40, "$a_1$"], None, ["\\ud83d", "", "x" * 21 + "...", "$a_1$"]),
        ([7, 8, 9, 10], None, ["7", "8", "9", "10"]),
        (np.array([[0, 1], [2, 3]]), "wxyz".__getitem__, ["w", "x", "y", "z"]),
        (jnp.arange(4), lambda number: f" {number}", ["␣0", "␣1", "␣2", "␣3"]),
        (None, None, ["0", "1", "2", "3"]),
    ],
)
def test_every_token_is_made_visible(tokens, decode, shown):
    ax = bx.plot_token_experts(routing([[0]] * 4, experts=1), tokens, decode=decode)
    assert texts(ax)[4:] == shown
    drawn(ax)  # a missing glyph would warn, which is an error


@pytest.mark.parametrize("own_axes", [True, False])
def test_texts_stay_inside_their_cells_and_cells_inside_the_axes(own_axes):
    ax = None if own_axes else Figure(figsize=(9, 11), layout="constrained").add_subplot()
    words = ["A", " braided", "river", "splits", "\n", "into", " channels", "中", "."] * 16
    ax = bx.plot_token_experts(random_routing(len(words), 384, 6), words, ax=ax)
    renderer = drawn(ax)
    outside = ax.get_window_extent(renderer)
    boxes = [path.get_extents() for path in ax.collections[0].get_paths()]
    cells = [box.transformed(ax.transData) for box in boxes]  # y0 above y1: rows count downwards
    assert len(cells) == 6 * len(words) and len(ax.get_yticks()) > 1
    for text, cell in zip(ax.texts, cells, strict=False):
        shown = text.get_window_extent(renderer)
        assert cell.x0 <= shown.x0 and shown.x1 <= cell.x1
        assert abs(cell.height) > text.get_fontsize() / 72 * ax.figure.dpi
        assert outside.x0 <= cell.x0 and cell.x1 <= outside.x1
        assert outside.y0 <= cell.y1 and cell.y0 <= outside.y1
    for text, cell in zip(ax.texts[len(cells) :], cells[::6], strict=True):
        shown = text.get_window_extent(renderer)
        assert cell.x0 - 1 <= shown.x0 and shown.x1 <= cell.x1 + 1
    # Reading order: the cells of one line go to the right, the next line is below.
    tops = [box.y0 for box in boxes[::6]]
    assert tops == sorted(tops)
    lefts = [(box.y0, box.x0) for box in boxes[::6]]
    assert lefts == sorted(lefts)


def test_axes_too_small_for_the_text_are_refused():
    ax = Figure(figsize=(3, 2)).add_subplot()
    with pytest.raises(ValueError, match="`ax` must be large enough for 200 tokens"):
        bx.plot_token_experts(random_routing(200, 16, 6), ax=ax)


def test_token_mistakes_are_named():
    plot = inspect.unwrap(bx.plot_token_experts)
    one = routing([[0, 1]])
    with pytest.raises(ValueError, match="each of the routing's 1. Got 2"):
        plot(one, ["a", "b"])
    with pytest.raises(TypeError, match="`tokens` must hold strings or integers. Got 1.5"):
        plot(one, [1.5])
    with pytest.raises(TypeError, match="`tokens` must be a sequence.*Got 3"):
        plot(one, 3)
    with pytest.raises(TypeError, match="`decode` must return a string. Got b'a' for id 3"):
        plot(one, [3], decode=lambda number: b"a")
    for text in ("a", b"a", ["a"]):
        with pytest.raises(ValueError, match="`decode` needs `tokens` that are ids"):
            plot(one, text, decode=str)
    with pytest.raises(ValueError, match="`decode` needs `tokens`"):
        plot(one, decode=str)
    for tokens in (0, 513):
        with pytest.raises(ValueError, match=f"1 to 512 tokens.*Got {tokens}"):
            plot(routing(np.zeros((tokens, 2))))


# --- all of them


@pytest.mark.parametrize("name", ["plot_token_experts", "plot_coactivation", "plot_weights"])
def test_routings_are_checked(name):
    plot = inspect.unwrap(getattr(bx, name))
    with pytest.raises(TypeError, match="`routing` must be a Routing. Got ndarray"):
        plot(np.zeros((3, 2)))
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=r"`routing.indices` must be in \[0, experts=4\]"):
            plot(routing([[1, wrong]]))


@pytest.mark.parametrize("name", ["plot_coactivation", "plot_weights"])
def test_layers_are_not_mixed_and_not_empty(name):
    plot = inspect.unwrap(getattr(bx, name))
    with pytest.raises(ValueError, match=r"of one layer.*\(4, 2\), \(8, 2\)"):
        plot([routing([[0, 1]]), routing([[0, 1]], experts=8)])
    with pytest.raises(ValueError, match="Got 2 tokens, all padding"):
        plot(routing([[0, 1]] * 2, mask=[False, False]))
    for nothing in (routing(np.zeros((0, 2))), []):
        with pytest.raises(ValueError, match="Got 0 tokens"):
            plot(nothing)


EXTREMES = {
    "load": lambda: bx.plot_load(np.ones((61, 384), int)),
    "load, one cell": lambda: bx.plot_load([routing([[0]], experts=1)]),
    "load, collapsed": lambda: bx.plot_load([routing([[0]] * 9, experts=384)]),
    "balance": lambda: bx.plot_balance(np.arange(9), np.ones((9, 61))),
    "bias": lambda: bx.plot_bias(np.arange(3), np.eye(3, 384)),
    "bias, one number": lambda: bx.plot_bias([5], np.ones((1, 1))),
    "coactivation": lambda: bx.plot_coactivation(random_routing(50, 384, 8)),
    "coactivation, collapsed": lambda: bx.plot_coactivation(routing([[0, 1]] * 9, experts=384)),
    "coactivation, all": lambda: bx.plot_coactivation(random_routing(9, 4, 4)),
    "coactivation, one expert": lambda: bx.plot_coactivation(routing([[0, 0]], experts=1)),
    "weights": lambda: bx.plot_weights(random_routing(50, 384, 40)),
    "weights, one number": lambda: bx.plot_weights(routing([[0]], experts=1)),
    "tokens": lambda: bx.plot_token_experts(
        random_routing(200, 384, 6, mask=np.arange(200) < 190), [" token\n"] * 200
    ),
    "tokens, one": lambda: bx.plot_token_experts(routing([0], experts=1), "a"),
    "tokens, all padding": lambda: bx.plot_token_experts(routing([[0]], mask=[False])),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("look", slow_but_one(STYLES))
def test_nothing_is_cut_off_and_all_can_be_read(case, look, monkeypatch):
    # A legend without a place looks for one, and warns where the search takes over a second.
    monkeypatch.setattr(Legend, "_find_best_position", lambda *_: pytest.fail("no place"))
    with style.context(look):
        ax = EXTREMES[case]()
        renderer = drawn(ax)
        background = ax.figure.get_facecolor()
        # Inches, from the lower left corner of the figure.
        box, (width, height) = ax.figure.get_tightbbox(renderer), ax.figure.get_size_inches()
        assert box.x0 > -0.01 and box.y0 > -0.01
        assert box.x1 < width + 0.01 and box.y1 < height + 0.01
        for axis in (ax.xaxis, ax.yaxis):
            labels = [t for t in axis.get_ticklabels() if t.get_text()]
            extents = [t.get_window_extent(renderer) for t in labels]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(extents))
        for words in (ax.title, ax.xaxis.label, ax.yaxis.label):
            assert contrast(words.get_color(), background) > 7
        for line in ax.lines:
            # 3 is what WCAG asks of graphics; the orange and sky blue of the palette have 2.2.
            assert contrast(line.get_color(), background) > (3 if look != "default" else 1.4)
        for legend in [ax.get_legend()] if ax.get_legend() else []:
            assert all(contrast(t.get_color(), background) > 7 for t in legend.get_texts())


def test_a_style_with_a_grid_rules_no_lines_over_cells():
    with style.context("ggplot"):
        for case in ("load", "coactivation", "tokens, one"):
            ax = EXTREMES[case]()
            drawn(ax)
            lines = [*ax.xaxis.get_gridlines(), *ax.yaxis.get_gridlines()]
            assert lines and not any(line.get_visible() for line in lines)


@pytest.mark.parametrize("look", STYLES)
def test_expert_numbers_can_be_read_on_their_cells(look):
    with style.context(look):
        weights = np.linspace(0, 1, 40)[:, None]
        ax = bx.plot_token_experts(routing(np.zeros((40, 1)), weights))
    fills = ax.collections[0].to_rgba(ax.collections[0].get_array())
    for text, fill in zip(ax.texts, fills, strict=False):
        assert contrast(text.get_color(), fill) > 4


def test_given_axes_are_used_and_pyplot_is_not():
    loaded = "matplotlib.pyplot" in sys.modules
    settings = dict(matplotlib.rcParams)
    axes = Figure(figsize=(12, 15), layout="constrained").subplots(3, 2).flat
    given = random_routing(12, 8, 2)
    assert bx.plot_bias([0, 1], np.eye(2, 8), ax=axes[0]) is axes[0]
    assert bx.plot_coactivation(given, ax=axes[1]) is axes[1]
    assert bx.plot_weights(given, ax=axes[2]) is axes[2]
    assert bx.plot_token_experts(given, "twelve bytes", ax=axes[3]) is axes[3]
    assert bx.plot_load(given, ax=axes[4]) is axes[4]
    assert bx.plot_balance([3], np.ones((1, 2)), ax=axes[5]) is axes[5]
    drawn(axes[0])
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert dict(matplotlib.rcParams) == settings


def test_missing_matplotlib_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = routing([[0, 1]])
    for plot in (bx.plot_coactivation, bx.plot_weights, bx.plot_token_experts, bx.plot_load):
        with pytest.raises(ImportError, match=r'pip install "braidax\[plot\]"'):
            plot(given)
    for plot in (bx.plot_bias, bx.plot_balance):
        with pytest.raises(ImportError, match=r'pip install "braidax\[plot\]"'):
            plot([0], np.ones((1, 2)))

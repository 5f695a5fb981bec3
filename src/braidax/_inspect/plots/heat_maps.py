"""Heat maps: the load of every expert by layer, and which experts are selected together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float64, Int64, Real

from ..._checks import check
from ..._routing import Routing
from ..._text import counted
from ..assignments import checked_names, on_host, read_layers
from ..counts import coactivations, expert_load
from .axes import GREY, given_or_new, integer_ticks, read_routings

# Of pictures in which every pair is together by chance, this share shows a coloured cell.
_FALSE_PICTURES = 0.05


def plot_load(
    loads: Real[Array, "layers experts"]
    | Real[np.ndarray, "layers experts"]
    | Routing
    | Sequence[Routing],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """Heat map of each expert's load divided by its layer's mean load.

    White is perfect balance (1), orange is below it, purple above. A layer without load is all 0.

    **Arguments:**

    - `loads`: assignments counted, `(layers, experts)`, or a `Routing`, or a sequence of them. A
      `Routing` is one layer, and a stacked one has a layer for each of its calls.
    - `ax`: the `Axes` to draw in and to return; by default those of a new figure without pyplot.
    - `layer_names`: one name a layer; by default its number, from 0.

    **Example:**

        >>> import braidax as bx, numpy as np
        >>> ax = bx.plot_load(np.array([[4, 4, 4, 4], [8, 8, 0, 0]]), layer_names=["hash", "top-k"])
        >>> ax.images[0].get_array().tolist()
        [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]]

    **Raises:** `ImportError` without matplotlib. `ValueError` for shapes or names that do not fit,
    and for loads that are negative or not finite. `TypeError` for traced arrays.
    """
    table = _load_table(loads)
    num_layers = len(table)
    names = checked_names(layer_names, num_layers)
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.zeros_like(table), where=mean > 0)
    ax = given_or_new(ax, 7.0, min(12.0, max(3.0, 1.4 + 0.22 * num_layers)))
    largest = max(2.0, float(ratio.max()))
    _draw_map(ax, ratio, 1.0, largest, largest, "Load / mean load of layer")
    # At most 32 names fit.
    shown = range(0, num_layers, -(-num_layers // 32))
    ax.set_yticks(list(shown), [names[i] for i in shown])
    ax.set(xlabel="Expert", ylabel="Layer", title="Expert load by layer")
    return ax


def plot_coactivation(routing: Routing | Sequence[Routing], *, ax: Any = None) -> Any:
    """Heat map of P(`j` is selected too | `i` is selected), row `i`, column `j`.

    White is chance, the share under balanced and independent selection: `(experts_per_token - 1) /
    (experts - 1)`. Orange is below chance, purple above. A cell is white too if its counts may be
    sampling noise: under chance, 95 % of such pictures have no coloured cell. The diagonal is
    grey, and so are the rows of experts that no token selects. Padding and nobody are not counted.
    An expert that a token names twice counts once.

    **Arguments:**

    - `routing`: one layer's `Routing`, with any batch axes, or a sequence of them from the same
      layer, counted together.
    - `ax`: the `Axes` to draw in and to return; by default those of a new figure without pyplot.

    **Example:** expert 0 is selected twice, once with expert 1 and once with expert 2.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> table = bx.hash_tables.from_array([[0, 1], [0, 2]], 3)
        >>> router = bx.HashRouter(4, 3, 2, table=table, key=jax.random.key(0))
        >>> ax = bx.plot_coactivation(router(jnp.ones((2, 4)), jnp.arange(2)))
        >>> ax.images[0].get_array().tolist()
        [[None, 0.5, 0.5], [1.0, None, 0.0], [1.0, 0.0, None]]

    **Raises:** `ImportError` without matplotlib. `TypeError` for anything but a concrete `Routing`.
    `ValueError` for one expert per token, stacked routings, routings that differ in size, and
    nothing but padding.
    """
    parts = read_routings(routing)
    num_experts, experts_per_token = parts[0].num_experts, parts[0].indices.shape[1]
    must = "select at least 2 experts per token, or there is no pair"
    check(experts_per_token >= 2, "routing", must, experts_per_token)
    together = sum(coactivations(part.indices, num_experts) for part in parts)
    selected = np.diag(together)[:, None]
    hidden = np.eye(num_experts, dtype=bool) | (selected == 0)
    share = together / np.maximum(selected, 1)
    chance = (experts_per_token - 1) / max(num_experts - 1, 1)
    largest = max(2 * chance, float(share.max(where=~hidden, initial=0.0)))
    if chance < 1:  # otherwise the norm needs a number above chance
        largest = min(largest, 1.0)
    ax = given_or_new(ax, *((7.6, 6.4) if num_experts > 64 else (6.4, 5.4)))
    last = min(largest, 1.0)
    cells = np.ma.array(share, mask=hidden)
    label = "P(j selected | i selected), white: may be chance"
    bar = _draw_map(ax, cells, chance, largest, last, label, " (chance)")
    bar.ax.set_ylim(0.0, last)
    # A transparent cell has its number and the colour of chance.
    ax.set_facecolor("white")
    shown = hidden | _not_by_chance(share, selected, chance)
    ax.images[-1].set_alpha(shown.astype(float))
    integer_ticks(ax.yaxis, 10)
    num_tokens = sum(len(part.indices) for part in parts)
    ax.set(
        xlabel="Expert j (grey: diagonal, or i never selected)",
        ylabel="Expert i",
        title=f"Experts selected together, {counted(num_tokens, 'token')}",
    )
    return ax


def _not_by_chance(
    share: Float64[np.ndarray, "experts experts"],
    selected: Int64[np.ndarray, "experts 1"],
    chance: float,
) -> Bool[np.ndarray, "experts experts"]:
    """The pairs that are together too often or too seldom for chance, though all pairs are tried.

    Chernoff: a binomial share is as far from `chance` with probability at most exp(-n divergence).
    """
    tiny = np.finfo(float).tiny

    def term(share: Any, chance: float) -> Any:
        return share * np.log(np.maximum(share, tiny) / max(chance, tiny))

    divergence = term(share, chance) + term(1 - share, 1 - chance)
    return selected * divergence > np.log(2 * share.size / _FALSE_PICTURES)


def _load_table(loads: Any) -> np.ndarray:
    """`(layers, experts)` in float64."""
    if isinstance(loads, Routing):
        loads = [loads]
    if isinstance(loads, Sequence) and all(isinstance(item, Routing) for item in loads):
        layers = [layer for r in loads for layer in read_layers("loads", r, r.stacked)]
        sizes = [layer.num_experts for layer in layers]
        must = "hold routings with the same number of experts"
        check(len(set(sizes)) < 2, "loads", must, sizes)
        loads = np.array([expert_load(layer) for layer in layers])
    table = on_host("loads", loads).astype(np.float64)
    must = "be a non-empty array (layers, experts) or one Routing or several"
    check(table.ndim == 2 and table.size, "loads", must, f"shape {table.shape}")
    wrong = table[~(np.isfinite(table) & (table >= 0))]
    check(not wrong.size, "loads", "hold finite counts of at least 0", wrong[:1].sum())
    return table


def _draw_map(
    ax: Any, values: Any, centre: float, largest: float, last: float, label: str, named: str = ""
) -> Any:
    """Colours from 0 to `largest`, white at `centre`, and the colour bar with ticks up to `last`.

    `named` follows the number at `centre`.
    """
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["PuOr"].with_extremes(bad=GREY)
    norm = TwoSlopeNorm(vcenter=centre, vmin=0.0, vmax=largest)
    image = ax.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    ax.grid(False)
    integer_ticks(ax.xaxis, 10)
    bar = ax.figure.colorbar(image, ax=ax, label=label)
    # Round values above the centre leave room for its label.
    above = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(centre, last)
    ticks = [float(tick) for tick in above if centre + 0.15 * (last - centre) < tick <= last]
    ticks = [0.0, centre / 2, centre, *ticks]
    bar.set_ticks(ticks, labels=[f"{t:.3g}{named if t == centre else ''}" for t in ticks])
    return bar

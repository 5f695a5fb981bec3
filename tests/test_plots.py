"""Plots: what is drawn, the wording, and no pyplot state."""

import inspect
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from routings import one_routing

import braidax as bx

LOADS = np.array([[4, 4, 4, 4], [8, 8, 0, 0], [0, 0, 0, 0]])


def png(ax):
    buffer = io.BytesIO()
    FigureCanvasAgg(ax.figure).print_png(buffer)
    return buffer.getvalue()


def test_load_is_drawn_relative_to_the_mean():
    ax = bx.plot_load(LOADS, layer_names=["hash", "top-k", "idle"])
    np.testing.assert_array_equal(
        ax.images[0].get_array(), [[1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0]]
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == ["hash", "top-k", "idle"]
    assert "mean load" in ax.images[0].colorbar.ax.get_ylabel()
    ticks = ax.images[0].colorbar.ax.get_yticklabels()
    assert [tick.get_text() for tick in ticks][:3] == ["0", "0.5", "1"]
    assert png(ax).startswith(b"\x89PNG")
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_load_of_routings():
    routings = [one_routing([[0, 1], [2, 3]]), one_routing([[0, 1], [0, 1]])]
    image = bx.plot_load(routings).images[0]
    np.testing.assert_array_equal(image.get_array(), [[1, 1, 1, 1], [2, 2, 0, 0]])
    image = bx.plot_load(routings[1]).images[0]
    np.testing.assert_array_equal(image.get_array(), [[2, 2, 0, 0]])


def test_stacked_layers_are_rows_of_their_own(unchecked):
    """Two layers of a scan, of which the sum is balanced and neither is."""
    stacked = one_routing([[[0, 1]], [[2, 3]]], dropped=[0, 0])
    image = bx.plot_load([one_routing([[0, 3]]), stacked]).images[0]
    np.testing.assert_array_equal(image.get_array(), [[2, 0, 0, 2], [2, 2, 0, 0], [0, 0, 2, 2]])
    for plot in (bx.plot_weights, bx.plot_coactivation, bx.plot_token_experts):
        with pytest.raises(ValueError, match=r"`routing` must be of one layer.*over \(2,\)"):
            plot(stacked)


def test_many_layers_thin_out_their_names():
    ax = bx.plot_load(np.ones((61, 384), int))
    assert len(ax.get_yticks()) <= 32
    assert png(ax)


@pytest.mark.parametrize("layers", [1, 7, 8, 61])
def test_balance_draws_a_line_per_layer_and_zero(layers):
    values = jnp.ones((5, layers)) * jnp.arange(5.0)[:, None]
    ax = bx.plot_balance(np.arange(5) * 10, values)
    assert len(ax.lines) == layers + 1
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), np.arange(5))
    np.testing.assert_array_equal(ax.lines[-1].get_ydata(), [0, 0])
    assert len(ax.get_legend().get_texts()) == min(layers, 7) + 1
    assert ax.get_ylim()[0] < 0  # the line at 0 is not on the frame
    assert "MaxVio" in ax.get_ylabel() and png(ax)


def test_mistakes_are_named():
    # Unwrapped: the message a user reads who runs no type checker.
    plot_load, plot_balance = inspect.unwrap(bx.plot_load), inspect.unwrap(bx.plot_balance)
    wider = one_routing([[0, 1]], experts=5)
    with pytest.raises(ValueError, match=r"`loads` must be a non-empty array.*\(4,\)"):
        plot_load(LOADS[0])
    with pytest.raises(ValueError, match="`loads` must be a non-empty"):
        plot_load([])
    for wrong in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match=f"finite counts of at least 0. Got {wrong}"):
            plot_load(np.array([[1.0, wrong]]))
    with pytest.raises(ValueError, match="`loads` must hold routings with the same number"):
        plot_load([one_routing([[0, 1]]), wider])
    with pytest.raises(ValueError, match="one name per layer. Got 1 for 3"):
        plot_load(LOADS, layer_names=["only"])
    with pytest.raises(ValueError, match="`steps` must be"):
        plot_balance([0, 1], np.ones((3, 2)))
    for steps, values in (([], np.ones((0, 2))), ([0], np.ones((1, 0)))):
        with pytest.raises(ValueError, match="`steps` must be .* not empty"):
            plot_balance(steps, values)
    with pytest.raises(ValueError, match="Got inf at step 7, layer 1"):
        plot_balance([3, 7], np.array([[0.0, 0.0], [np.nan, np.inf]]))


def test_balance_leaves_a_gap_where_nothing_was_routed():
    ax = bx.plot_balance([0, 1, 2], np.array([[1.0], [np.nan], [2.0]]))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, np.nan, 2])
    assert png(ax)


@pytest.mark.parametrize(
    "plot",
    [
        lambda routing: bx.plot_load(routing),
        lambda routing: bx.plot_load([routing]),
        lambda routing: bx.plot_load(routing.scores),
        lambda routing: bx.plot_balance([0, 1], routing.scores),
        lambda routing: bx.plot_bias([0, 1], routing.scores),
        lambda routing: bx.plot_weights(routing),
        lambda routing: bx.plot_coactivation([routing]),
        lambda routing: bx.plot_token_experts(routing),
    ],
)
def test_traced_arrays_are_named(plot):
    with pytest.raises(TypeError, match="` must be concrete.*return it from the compiled function"):
        jax.jit(lambda routing: plot(routing) and None)(one_routing([[0, 1], [2, 3]]))

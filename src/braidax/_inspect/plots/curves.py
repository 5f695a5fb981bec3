"""Curves over training: the imbalance of every layer, and the selection bias of one layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Real

from ..._checks import check
from ..assignments import checked_names, on_host
from .axes import COLOURS, GREY, foreground, given_or_new, integer_ticks


def plot_balance(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    max_violation: Real[Array, "steps layers"] | Real[np.ndarray, "steps layers"],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """One line per layer of MaxVio over training steps; the dashed line at 0 is perfect balance.

    Of more than seven layers, the six farthest from balance in the last tenth of the steps have a
    colour and a name.

    **Arguments:**

    - `steps`: the training steps, `(steps,)`.
    - `max_violation`: a ratio, `(steps, layers)`. NaN, a step without a token, is a gap.
    - `ax`: the `Axes` to draw in and to return; by default those of a new figure without pyplot.
    - `layer_names`: one name a layer; by default its number, from 0.

    **Example:**

        >>> import braidax as bx, numpy as np
        >>> ax = bx.plot_balance([0, 10, 20], np.array([[3.0, 0.1], [1.5, 0.1], [0.4, 0.1]]))
        >>> ax.figure.savefig("balance.png")  # doctest: +SKIP

    **Raises:** `ImportError` without matplotlib. `ValueError` for shapes or names that do not
    fit, and for infinities. `TypeError` for traced arrays.
    """
    steps, values = _checked(steps, "max_violation", max_violation, "layer", gaps=True)
    ax = given_or_new(ax, 7.0, 4.0)
    names = checked_names(layer_names, values.shape[1])
    _draw_lines(ax, steps, values, names, "layer", "perfect balance")
    ax.set(ylabel="MaxVio (max load / mean load − 1)", title="Load imbalance over training")
    return ax


def plot_bias(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    bias: Float[Array, "steps experts"] | Float[np.ndarray, "steps experts"],
    *,
    ax: Any = None,
) -> Any:
    """One line per expert of a layer's selection bias, minus its mean over experts at each step.

    The mean is subtracted because an offset common to all experts changes no selection. Of more
    than seven experts, the six farthest from it in the last tenth of the steps have a colour and a
    name.

    **Arguments:**

    - `steps`: the training steps, `(steps,)`.
    - `bias`: `score_correction_bias` stacked over steps, `(steps, experts)`, in units of the score.
    - `ax`: the `Axes` to draw in and to return; by default those of a new figure without pyplot.

    **Example:**

        >>> import braidax as bx, numpy as np
        >>> ax = bx.plot_bias([0, 1], np.array([[0.0, 0.0], [0.5, 0.25]]))
        >>> [line.get_ydata().tolist() for line in ax.lines[:2]]
        [[0.0, 0.125], [0.0, -0.125]]

    **Raises:** `ImportError` without matplotlib. `ValueError` for shapes that do not fit, and for a
    bias that is not finite. `TypeError` for traced arrays.
    """
    steps, values = _checked(steps, "bias", bias, "expert", gaps=False)
    ax = given_or_new(ax, 7.0, 4.0)
    names = checked_names(None, values.shape[1])
    centred = values - values.mean(axis=1, keepdims=True)
    _draw_lines(ax, steps, centred, names, "expert", "mean of experts")
    ax.set(ylabel="Bias − mean over experts (score units)", title="Selection bias over training")
    return ax


def _checked(
    steps: Any, name: str, values: Any, column: str, *, gaps: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The steps, and the values called `name` in float64: finite, or NaN where there are gaps."""
    steps, values = on_host("steps", steps), on_host(name, values).astype(np.float64)
    fits = steps.ndim == 1 and values.ndim == 2 and len(values) == len(steps) and values.size
    must = f"be (steps,) and `{name}` (steps, {column}s), not empty"
    check(fits, "steps", must, f"{steps.shape} and {values.shape}")
    must = "not be infinite" if gaps else "be finite"
    for row, number in np.argwhere(np.isinf(values) if gaps else ~np.isfinite(values)):
        given = f"{values[row, number]} at step {steps[row]}, {column} {number}"
        raise ValueError(f"`{name}` must {must}. Got {given}.")
    return steps, values


def _draw_lines(ax: Any, x: Any, y: Any, names: Sequence[str], what: str, reference: str) -> None:
    """A line for each column of `y`, and a dashed line at 0 called `reference`.

    Nobody can tell more than a few colours apart. Of many lines, those farthest from 0 in the last
    tenth of the steps are named, from the highest to the lowest.
    """
    colours, named = (*COLOURS, foreground(ax)), np.arange(len(names))
    if len(names) > len(colours):
        ends = np.nan_to_num(y[-max(1, len(y) // 10) :]).mean(axis=0)
        named = np.argsort(-np.abs(ends), kind="stable")[: len(COLOURS)]
        named = named[np.argsort(-ends[named], kind="stable")]
    marker = "o" if len(x) < 2 else None  # a single point draws no line
    grey = {"color": GREY, "linewidth": 0.8, "marker": marker}
    lines = ax.plot(x, y, label=names, **grey)
    shown = [lines[i] for i in named]
    for line, colour in zip(shown, colours, strict=False):
        line.set(color=colour, linewidth=1.5, zorder=2.5)
    others = [line for line in lines if line not in shown]
    for line in others[:1]:
        line.set_label(f"{len(others)} more {what}s")
    dashed = {"color": foreground(ax), "linestyle": "--", "linewidth": 1.2, "zorder": 3}
    shown += [*others[:1], ax.axhline(0.0, label=reference, **dashed)]
    ax.autoscale_view()  # keeps the line at 0 off the frame
    inches = ax.bbox.width / ax.figure.dpi
    integer_ticks(ax.xaxis, min(8, max(2, int(1.5 * inches))))  # a step may have six digits
    ax.set_xlabel("Training step")
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "title": what.capitalize()}
    ax.legend(handles=shown, frameon=False, labelcolor=foreground(ax), **place)

"""Curves over training: the imbalance of every layer, and the selection bias of one layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Real

from ..assignments import checked_names, on_host
from .axes import COLOURS, foreground, given_or_new, integer_ticks, is_light, require_matplotlib


def plot_balance(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    max_violation: Real[Array, "steps layers"] | Real[np.ndarray, "steps layers"],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """One line per layer of MaxVio over training steps; the dashed line at 0 is perfect balance.

    Up to seven layers get a legend. More layers get a colour scale.

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
    require_matplotlib()
    steps, values = _on_host(steps, "max_violation", max_violation, "layer", np.isinf)
    names = checked_names(layer_names, values.shape[1])
    ax = given_or_new(ax, 7.0, 4.0)
    _draw_lines(ax, steps, values, names, "Layer", "perfect balance")
    ax.set(ylabel="MaxVio (max load / mean load − 1)", title="Load imbalance over training")
    return ax


def plot_bias(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    bias: Float[Array, "steps experts"] | Float[np.ndarray, "steps experts"],
    *,
    ax: Any = None,
) -> Any:
    """One line per expert of a layer's selection bias, minus its mean over experts at each step.

    The mean is subtracted because an offset common to all experts changes no selection. Up to
    seven experts get a legend. More experts get a colour scale.

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
    require_matplotlib()
    steps, values = _on_host(steps, "bias", bias, "expert", lambda values: ~np.isfinite(values))
    ax = given_or_new(ax, 7.0, 4.0)
    centred = values - values.mean(axis=1, keepdims=True)
    names = checked_names(None, values.shape[1])
    _draw_lines(ax, steps, centred, names, "Expert", "mean of experts")
    ax.set(ylabel="Bias − mean over experts (score units)", title="Selection bias over training")
    return ax


def _on_host(
    steps: Any, name: str, values: Any, column: str, is_wrong: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The steps, and the values called `name` in float64, of which none may be wrong."""
    steps, values = on_host("steps", steps), on_host(name, values).astype(np.float64)
    if steps.ndim != 1 or values.ndim != 2 or len(values) != len(steps) or not values.size:
        raise ValueError(
            f"`steps` must be (steps,) and `{name}` (steps, {column}s), not empty. "
            f"Got {steps.shape} and {values.shape}."
        )
    for row, number in np.argwhere(is_wrong(values)):
        must = "not be infinite" if is_wrong is np.isinf else "be finite"
        raise ValueError(
            f"`{name}` must {must}. Got {values[row, number]} at step {steps[row]}, "
            f"{column} {number}."
        )
    return steps, values


def _draw_lines(ax: Any, x: Any, y: Any, names: Sequence[str], label: str, reference: str) -> None:
    """A line for each column of `y`, and a dashed line at 0 called `reference`."""
    from matplotlib.patheffects import withStroke

    few_colours = (*COLOURS, foreground(ax))
    many = len(names) > len(few_colours)
    colours = _colour_scale(ax, names, label) if many else few_colours
    marker = "o" if len(x) < 2 else None  # a single point draws no line
    width = 0.8 if len(names) > 64 else 1.5
    for column, name in enumerate(names):
        # The order of height is scattered, so that neither end of the scale covers the other.
        height = 2 + column * 0.618 % 1 / 2 if many else 2
        style = {"color": colours[column], "marker": marker, "linewidth": width, "zorder": height}
        ax.plot(x, y[:, column], label=name, **style)
    outline = [withStroke(linewidth=3, foreground=ax.get_facecolor())] if many else None
    style = {"color": foreground(ax), "linestyle": "--", "linewidth": 1.2, "zorder": 3}
    ax.axhline(0.0, label=reference, path_effects=outline, **style)
    ax.autoscale_view()  # keeps the line at 0 off the frame
    inches = ax.bbox.width / ax.figure.dpi
    integer_ticks(ax.xaxis, min(8, max(2, int(1.5 * inches))))  # a step may have six digits
    ax.set_xlabel("Training step")
    if not many:
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        ax.legend(title=label, frameon=False, labelcolor=foreground(ax), **place)


def _colour_scale(ax: Any, names: Sequence[str], label: str) -> Any:
    """Colours for many lines, from the first to the last, with a colour bar that explains them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # One end of the map cannot be seen on the background, so the scale stops before it.
    first, last = (0.35, 1.0) if is_light(foreground(ax)) else (0.0, 0.85)
    colours = ListedColormap(colormaps["cividis"](np.linspace(first, last, 256)))
    norm = Normalize(0, len(names) - 1)
    bar = ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, label=label)
    shown = np.unique(np.linspace(0, len(names) - 1, min(len(names), 8)).round().astype(int))
    bar.set_ticks(list(shown), labels=[names[i] for i in shown])
    return colours(norm(np.arange(len(names))))

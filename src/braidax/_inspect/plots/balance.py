"""How the imbalance of the layers develops over training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Real

from .axes import draw_lines, new_axes, require_matplotlib
from .inputs import curves
from .inputs import layer_names as checked_names


def plot_balance(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    max_violation: Real[Array, "steps layers"] | Real[np.ndarray, "steps layers"],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """One line per layer of MaxVio over training steps; the dashed line at 0 is perfect balance.

    Up to seven layers get a legend, more get a colour scale.

    **Arguments:**

    - `steps`: the training steps, `(steps,)`.
    - `max_violation`: a ratio, `(steps, layers)`. NaN, a step without a token, is a gap.
    - `ax`: the `Axes` to draw in; by default those of a new figure, `ax.figure`. pyplot is never
      touched.
    - `layer_names`: one name a layer; by default its number, from 0.

    **Returns:** the `Axes`.

    **Example:**

        >>> import braidax as bx, numpy as np
        >>> ax = bx.plot_balance([0, 10, 20], np.array([[3.0, 0.1], [1.5, 0.1], [0.4, 0.1]]))
        >>> ax.figure.savefig("balance.png")  # doctest: +SKIP

    **Raises:** `ImportError` without matplotlib, `ValueError` for shapes or names that do not
    fit and for infinities, `TypeError` for traced arrays.
    """
    require_matplotlib()
    steps, values = curves(steps, "max_violation", max_violation, "layers")
    wrong = np.argwhere(np.isinf(values))
    if len(wrong):
        row, layer = wrong[0]
        raise ValueError(
            f"`max_violation` must not be infinite. Got {values[row, layer]} at step {steps[row]}, "
            f"layer {layer}."
        )
    names = checked_names(layer_names, values.shape[1])
    if ax is None:
        ax = new_axes(7.0, 4.0)
    draw_lines(ax, steps, values, names, "Layer", "perfect balance")
    ax.set(
        xlabel="Training step",
        ylabel="MaxVio (max load / mean load − 1)",
        title="Load imbalance over training",
    )
    return ax

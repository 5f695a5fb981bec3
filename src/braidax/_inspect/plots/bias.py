"""How the selection bias of one layer develops over training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Real

from .axes import draw_lines, new_axes, require_matplotlib
from .inputs import curves


def plot_bias(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    bias: Float[Array, "steps experts"] | Float[np.ndarray, "steps experts"],
    *,
    ax: Any = None,
) -> Any:
    """One line per expert of a layer's selection bias, less its mean over experts at each step.

    It is centred because an offset common to all experts changes no selection. Up to seven experts
    get a legend, more get a colour scale.

    **Arguments:**

    - `steps`: the training steps, `(steps,)`.
    - `bias`: `score_correction_bias` stacked over steps, `(steps, experts)`, in units of the score.
    - `ax`: the `Axes` to draw in; by default those of a new figure, `ax.figure`. pyplot is never
      touched.

    **Returns:** the `Axes`.

    **Example:**

        >>> import braidax as bx, numpy as np
        >>> ax = bx.plot_bias([0, 1], np.array([[0.0, 0.0], [0.5, 0.25]]))
        >>> [line.get_ydata().tolist() for line in ax.lines[:2]]
        [[0.0, 0.125], [0.0, -0.125]]

    **Raises:** `ImportError` without matplotlib, `ValueError` for shapes that do not fit and for a
    bias that is not finite, `TypeError` for traced arrays.
    """
    require_matplotlib()
    steps, values = curves(steps, "bias", bias, "experts")
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, expert = wrong[0]
        raise ValueError(
            f"`bias` must be finite. Got {values[row, expert]} at step {steps[row]}, "
            f"expert {expert}."
        )
    if ax is None:
        ax = new_axes(7.0, 4.0)
    names = [str(expert) for expert in range(values.shape[1])]
    draw_lines(
        ax, steps, values - values.mean(axis=1, keepdims=True), names, "Expert", "mean of experts"
    )
    ax.set(
        xlabel="Training step",
        ylabel="Bias − mean over experts (score units)",
        title="Selection bias over training",
    )
    return ax

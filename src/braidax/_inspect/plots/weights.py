"""How much of the output each selected expert carries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ..._routing import Routing
from .axes import (
    COLOURS,
    counted,
    foreground,
    is_light,
    new_axes,
    require_matplotlib,
)
from .inputs import one_layer

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def plot_weights(routing: Routing | Sequence[Routing], *, ax: Any = None) -> Any:
    """Box plot of the routing weights by rank: rank 1 is each token's largest weight.

    Boxes end at the quartiles, whiskers at 5 % and 95 %; the line inside is the median. Where every
    token's weights have the same sum, a dashed line marks equal shares, `sum / experts_per_token`.
    Padding is not counted. Tokens with a weight that is not finite are left out, and the title
    says how many.

    **Arguments:**

    - `routing`: one `Routing`, with any leading axes, or a sequence of them from the same layer,
      counted together.
    - `ax`: the `Axes` to draw in; by default those of a new figure, `ax.figure`. pyplot is never
      touched.

    **Returns:** the `Axes`.

    **Example:**

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(16, 8, 2, key=jax.random.key(0))
        >>> ax = bx.plot_weights(router(jax.random.normal(jax.random.key(1), (100, 16))))
        >>> ax.get_title()
        'Routing weights by rank, 100 tokens'

    **Raises:** `ImportError` without matplotlib, `TypeError` for anything but a concrete `Routing`,
    `ValueError` for routings that differ in size and for none but padding or NaN weights.
    """
    require_matplotlib()
    weights = one_layer(routing).weights
    finite = np.isfinite(weights).all(axis=1)
    left_out = int((~finite).sum())
    if left_out == len(weights):
        raise ValueError(
            "`routing` must hold a token with finite weights. "
            f"Got {left_out} tokens, none of them with."
        )
    weights = weights[finite]
    experts_per_token = weights.shape[1]
    ranked = -np.sort(-weights, axis=1)
    if ax is None:
        ax = new_axes(min(12.0, max(5.0, 2.5 + 0.6 * experts_per_token)), 4.0)
    _draw_boxes(ax, ranked)
    _draw_equal_shares(ax, weights.sum(axis=1), experts_per_token)
    low, high = ax.get_ylim()
    # Weights are compared with 0, and 0 is not below the axis where none is negative.
    ax.set_ylim(low if ranked.min() < 0 else 0.0, max(high, 0.0))
    ax.set_xlim(0.5, experts_per_token + 0.5)
    shown = range(1, experts_per_token + 1, -(-experts_per_token // 16))
    ax.set_xticks(list(shown), [str(rank) for rank in shown])
    title = f"Routing weights by rank, {counted(len(weights), 'token')}"
    if left_out:
        title += f"\n{left_out:,} more left out: weights not finite"
    ax.set(xlabel="Rank of the expert within its token", ylabel="Routing weight", title=title)
    return ax


def _draw_boxes(ax: Any, ranked: Float[np.ndarray, "tokens experts_per_token"]) -> None:
    names = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [
        dict(zip(names, column, strict=True))
        for column in np.quantile(ranked, _QUANTILES, axis=0).T
    ]
    colour = foreground(ax)
    # On either of them the median stands out in the colour of the style.
    fill = COLOURS[0] if is_light(colour) else COLOURS[5]
    ax.bxp(
        boxes,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": fill, "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 2.0},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )


def _draw_equal_shares(ax: Any, sums: Float[np.ndarray, " tokens"], experts_per_token: int) -> None:
    # float32 weights that were divided by their sum add up to within a few units of 6e-8.
    if np.ptp(sums) <= 1e-5 * abs(sums).max():
        label = f"equal shares (sum {sums.mean():.4g} / {experts_per_token})"
        share = sums.mean() / experts_per_token
        ax.axhline(share, color=COLOURS[3], linestyle="--", linewidth=1.5, label=label, zorder=1)
        ax.legend(frameon=False, labelcolor=foreground(ax))

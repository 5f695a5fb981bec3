"""Box plots of the routing weights, which show how much each selected expert contributes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ..._checks import check
from ..._routing import Routing
from ..._text import counted
from .axes import COLOURS, foreground, given_or_new, is_light, read_routings


def plot_weights(routing: Routing | Sequence[Routing], *, ax: Any = None) -> Any:
    """Box plot of the routing weights by rank: rank 1 is each token's largest weight.

    Boxes end at the quartiles, whiskers at 5 % and 95 %; the line inside is the median. If every
    token's weights have the same sum, a dashed line marks equal shares, `sum / experts_per_token`.
    Padding and nobody are not counted. Tokens with a weight that is not finite are left out, and
    the title says how many.

    **Arguments:**

    - `routing`: one layer's `Routing`, with any batch axes, or a sequence of them from the same
      layer, counted together.
    - `ax`: the `Axes` to draw in and to return; by default those of a new figure without pyplot.

    **Example:**

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(16, 8, 2, key=jax.random.key(0))
        >>> ax = bx.plot_weights(router(jax.random.normal(jax.random.key(1), (100, 16))))
        >>> ax.get_title()
        'Routing weights by rank, 100 tokens'

    **Raises:** `ImportError` without matplotlib. `TypeError` for anything but a concrete `Routing`.
    `ValueError` for stacked routings, routings that differ in size, and if all weights are NaN or
    of padding.
    """
    parts = read_routings(routing)
    somebody = np.concatenate([part.indices < part.num_experts for part in parts])
    weights = np.concatenate([part.weights for part in parts]).astype(np.float64)
    finite = (np.isfinite(weights) | ~somebody).all(axis=1)
    left_out = int((~finite).sum())
    used = finite & somebody.any(axis=1)
    given = f"{len(weights)} tokens, none of them with"
    check(used.any(), "routing", "hold a token with finite weights", given)
    # Nobody is NaN, which comes last. Ranks that no token has are not drawn.
    weights = -np.sort(np.where(somebody, -weights, np.nan)[used], axis=1)
    weights = weights[:, ~np.isnan(weights).all(axis=0)]
    num_tokens, num_ranks = weights.shape
    ax = given_or_new(ax, min(12.0, max(5.0, 2.5 + 0.6 * num_ranks)), 4.0)
    _draw(ax, weights)
    # Readers compare weights with 0, so 0 is the lower end unless a weight is negative.
    low, high = ax.get_ylim()
    ax.set(xlim=(0.5, num_ranks + 0.5), ylim=(low if np.nanmin(weights) < 0 else 0, max(high, 0)))
    shown = range(1, num_ranks + 1, -(-num_ranks // 16))
    ax.set_xticks(list(shown), [str(rank) for rank in shown])
    title = f"Routing weights by rank, {counted(num_tokens, 'token')}"
    if left_out:
        title += f"\n{left_out:,} more left out: weights not finite"
    ax.set(xlabel="Rank of the expert within its token", ylabel="Routing weight", title=title)
    return ax


def _draw(ax: Any, weights: Float64[np.ndarray, "tokens experts_per_token"]) -> None:
    """The boxes, and the dashed line of equal shares."""
    colour = foreground(ax)
    # The median stands out from either fill.
    fill = COLOURS[0] if is_light(colour) else COLOURS[5]
    ax.boxplot(
        [column[~np.isnan(column)] for column in weights.T],
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": fill, "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 2.0},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )
    sums = weights.sum(axis=1)
    # The sum of float32 weights that were divided by their sum is 1 within a few units of 6e-8.
    if np.ptp(sums) <= 1e-5 * abs(sums).max():
        label = f"equal shares (sum {sums.mean():.4g} / {weights.shape[1]})"
        share = sums.mean() / weights.shape[1]
        ax.axhline(share, color=COLOURS[3], linestyle="--", linewidth=1.5, label=label, zorder=1)
        # Weights fall with the rank. To search for the best place is slow, and matplotlib warns.
        ax.legend(frameon=False, labelcolor=colour, loc="upper right")

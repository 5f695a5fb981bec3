"""Which experts are selected together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from ..._routing import Routing
from .axes import NO_VALUE, centred_ticks, counted, integer_ticks, new_axes, require_matplotlib
from .inputs import one_layer


def coactivations(
    indices: Integer[np.ndarray, "tokens experts_per_token"], num_experts: int
) -> Int64[np.ndarray, "experts experts"]:
    """Number of tokens that select both `i` and `j`; on the diagonal, of those that select `i`.

    Exact. An expert that a token names twice is one expert.
    """
    # Wide, because experts * experts is computed with them.
    indices = np.sort(indices.astype(np.int64), axis=1)
    # Repetitions go to a place of their own, `num_experts`, which is cut off at the end.
    repeated = indices[:, 1:] == indices[:, :-1]
    indices[:, 1:][repeated] = num_experts
    size = num_experts + 1
    counts = np.zeros(size * size, np.int64)
    for first in range(indices.shape[1]):
        for second in range(first, indices.shape[1]):
            pairs = indices[:, first] * size + indices[:, second]
            counts += np.bincount(pairs, minlength=size * size)
    table = counts.reshape(size, size)[:num_experts, :num_experts]
    # A repetition leaves the order of a row, so a pair may lie on either side of the diagonal.
    return table + table.T - np.diag(np.diag(table))


def plot_coactivation(routing: Routing | Sequence[Routing], *, ax: Any = None) -> Any:
    """Heat map of P(`j` is selected too | `i` is selected), row `i`, column `j`.

    White is chance, what balanced and independent selection gives: `(experts_per_token - 1) /
    (experts - 1)`; orange is below it, purple above. Grey: the diagonal, and the rows of experts
    that no token selects. Padding is not counted; an expert that a token names twice is one.

    **Arguments:**

    - `routing`: one `Routing`, with any leading axes, or a sequence of them from the same layer,
      counted together.
    - `ax`: the `Axes` to draw in; by default those of a new figure, `ax.figure`. pyplot is never
      touched.

    **Returns:** the `Axes`.

    **Example:** expert 0 is selected twice, once with expert 1 and once with expert 2.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> table = bx.hash_tables.from_array([[0, 1], [0, 2]], 3)
        >>> router = bx.HashRouter(4, 3, 2, table=table, key=jax.random.key(0))
        >>> ax = bx.plot_coactivation(router(jnp.ones((2, 4)), jnp.arange(2)))
        >>> ax.images[0].get_array().tolist()
        [[None, 0.5, 0.5], [1.0, None, 0.0], [1.0, 0.0, None]]

    **Raises:** `ImportError` without matplotlib, `TypeError` for anything but a concrete `Routing`,
    `ValueError` for one expert per token, routings that differ in size and none but padding.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    indices, _, _, num_experts = one_layer(routing)
    experts_per_token = indices.shape[1]
    if experts_per_token < 2:
        raise ValueError(
            "`routing` must select at least 2 experts per token, or there is no pair. "
            f"Got {experts_per_token}."
        )
    together = coactivations(indices, num_experts)
    selected = np.diag(together)[:, None]
    hidden = np.eye(num_experts, dtype=bool) | (selected == 0)
    share = np.ma.array(together / np.maximum(selected, 1), mask=hidden)
    chance = (experts_per_token - 1) / max(num_experts - 1, 1)
    largest = max(2 * chance, 0.0 if hidden.all() else float(share.max()))
    if chance < 1:  # else the map needs a number above it
        largest = min(largest, 1.0)
    norm = TwoSlopeNorm(vcenter=chance, vmin=0.0, vmax=largest)
    if ax is None:
        ax = new_axes(*((7.6, 6.4) if num_experts > 64 else (6.4, 5.4)))
    colours = colormaps["PuOr"].with_extremes(bad=NO_VALUE)
    image = ax.imshow(share, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    ax.grid(False)
    integer_ticks(ax.xaxis, 10)
    integer_ticks(ax.yaxis, 10)
    ax.set(
        xlabel="Expert j (grey: diagonal, or i never selected)",
        ylabel="Expert i",
        title=f"Experts selected together, {counted(len(indices), 'token')}",
    )
    ticks = centred_ticks(chance, min(largest, 1.0))
    bar = ax.figure.colorbar(image, ax=ax, label="P(j selected | i selected)")
    bar.ax.set_ylim(0.0, min(largest, 1.0))
    bar.set_ticks(ticks, labels=[f"{t:.3g}" + (" (chance)" if t == chance else "") for t in ticks])
    return ax

"""What a block asks of its experts."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int

from .grouped_matmul import GroupedMatmul


class AbstractExperts(eqx.Module):
    """A stack of feed-forward networks, applied to rows that are grouped by expert.

    Subclass it to put other experts into a `RoutedMoE`.
    """

    @abc.abstractmethod
    def __call__(
        self,
        rows: Float[Array, "rows hidden"],
        group_sizes: Int[Array, " experts"],
        grouped_matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """Each row through the expert of its group; rows past the groups give 0.

        **Arguments:**

        - `rows`: `(rows, hidden)`, consecutive rows for each expert.
        - `group_sizes`: int32 `(experts,)`, rows of each expert.
        - `grouped_matmul`: the product to use, from the block's backend.

        **Returns:** `(rows, hidden)` in float32 or wider: the caller sums before it rounds.
        """

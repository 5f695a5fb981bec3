"""What a block asks of its experts."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int

from .._matmul import GroupedMatmul


class AbstractExperts(eqx.Module):
    """A stack of feed-forward networks, applied to rows that are grouped by expert.

    Subclass it to put other experts into a `RoutedMoE`. For `ExpertParallel`, all its arrays start
    with the expert axis.

    **Example:** experts of one linear layer.

        >>> import braidax as bx, jax
        >>> class LinearExperts(bx.AbstractExperts):
        ...     weight: jax.Array  # (experts, hidden_out, hidden)
        ...
        ...     def __call__(self, rows, group_sizes, matmul):
        ...         return matmul(rows, self.weight, group_sizes, transposed=True)
        >>> experts = LinearExperts(jax.numpy.stack([jax.numpy.eye(8)] * 4))
        >>> router = bx.TopKRouter(8, 4, 2, key=jax.random.key(0))
        >>> block = bx.RoutedMoE(router, experts)
        >>> output, _ = block(jax.numpy.ones((2, 8)))  # weights that sum to 1, identities
        >>> bool(jax.numpy.allclose(output, 1))
        True
    """

    @abc.abstractmethod
    def __call__(
        self,
        rows: Float[Array, "rows hidden"],
        group_sizes: Int[Array, " experts"],
        matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """Each row through the expert of its group; rows past the groups give 0.

        **Arguments:**

        - `rows`: `(rows, hidden)`, consecutive rows for each expert.
        - `group_sizes`: int32 `(experts,)`, rows of each expert.
        - `matmul`: the product to use, made of the dispatch's kernel.

        **Returns:** `(rows, hidden)` in float32 or wider: the caller sums before it rounds.
        """

    def call_scaled(
        self,
        rows: Float[Array, "rows hidden"],
        scales: Float[Array, " rows"],
        group_sizes: Int[Array, " experts"],
        matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """As `__call__` for `rows`, `group_sizes` and `matmul`, with each row's output times its
        entry of `scales`, `(rows,)`: the routing weights.

        The gradient of a scale needs the output of its row here, which is therefore kept for the
        backward pass. Override the method where the gradient can do without.
        """
        rows = self(rows, group_sizes, matmul)
        return rows * scales[:, None].astype(rows.dtype)

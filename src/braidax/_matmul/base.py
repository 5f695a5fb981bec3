"""The contract of a grouped product: every row times the matrix of its group."""

import abc
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from . import network
from .network import Activation, FeedForwardWeights, accumulation_dtype, clear_nobody


class AbstractGroupedMatmul(eqx.Module):
    """A kernel: the two products that a `GroupedMatmul` is made of.

    Rows come in groups: `group_sizes[g]` consecutive rows belong to group `g`. Rows past the sum
    of the sizes belong to nobody. A kernel may leave anything in their results: the caller clears
    them. Everything is accumulated in float32 or wider, and returned in `out_dtype`.

    A subclass supplies `multiply` and `outer`. Its fields are its settings, and must be static. A
    kernel that computes a whole feed-forward network at once overrides `forward`,
    `forward_saving` and `backward` as well. Derivatives of any order and `jax.vmap` are written
    once, in `GroupedMatmul`.

    - `wide_rows`: whether rows may be wider than the weights. `False`: rows are rounded to the
      dtype of the weights first.
    - `clears_empty_groups`: whether `outer` and `backward` give 0 for a group without rows.
      `False`: the caller clears them.
    - `plain`: whether the kernel is plain JAX code. JAX then differentiates and maps it by its own
      rules, forward mode included. Every row must belong to a group.

    **Example:** a kernel that gathers one matrix for each row.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> class Gathered(bx.AbstractGroupedMatmul):
        ...     def group(self, num_rows, group_sizes):
        ...         row = jnp.arange(num_rows)
        ...         return jnp.searchsorted(group_sizes.cumsum(), row, side="right")
        ...
        ...     def multiply(self, rows, weight, group_sizes, *, transposed, out_dtype):
        ...         group = self.group(len(rows), group_sizes)
        ...         subscripts = "ri,roi->ro" if transposed else "ri,rio->ro"
        ...         return jnp.einsum(subscripts, rows, weight[group]).astype(out_dtype)
        ...
        ...     def outer(self, left, right, group_sizes, *, out_dtype):
        ...         group = self.group(len(left), group_sizes)
        ...         products = left[:, :, None] * right[:, None, :]
        ...         return jax.ops.segment_sum(products, group, len(group_sizes)).astype(out_dtype)
        >>> block = bx.top_k_moe(8, 4, 4, 2, dispatch=bx.SortedDispatch(Gathered()),
        ...     key=jax.random.key(0))
        >>> output, _ = block(jnp.ones((2, 8)))
    """

    wide_rows: ClassVar[bool] = True
    clears_empty_groups: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    @abc.abstractmethod
    def multiply(
        self,
        rows: Float[Array, "rows size_in"],
        weight: Any,
        group_sizes: Int[Array, " groups"],
        *,
        transposed: bool,
        out_dtype: jnp.dtype,
    ) -> Float[Array, "rows size_out"]:
        """`rows`, `(rows, a)`, times the matrices `weight`, `(groups, a, b)`: `(rows, b)`.

        With `transposed` the matrices are `(groups, b, a)`. `group_sizes` is int32 `(groups,)`,
        and `out_dtype` the dtype of the result."""

    @abc.abstractmethod
    def outer(
        self,
        left: Float[Array, "rows a"],
        right: Float[Array, "rows b"],
        group_sizes: Int[Array, " groups"],
        *,
        out_dtype: jnp.dtype,
    ) -> Float[Array, "groups a b"]:
        """For each group of `group_sizes`, `left^T right` over its rows: `(groups, a, b)`.

        `left` is `(rows, a)`, `right` `(rows, b)`. Rows of nobody are 0 in both. The result has
        `out_dtype`."""

    def forward(
        self,
        rows: Float[Array, "rows hidden"],
        scales: Float[Array, " rows"],
        weights: FeedForwardWeights,
        group_sizes: Int[Array, " groups"],
        activation: Activation,
    ) -> Float[Array, "rows hidden"]:
        """`rows`, `(rows, hidden)`, through the network of `weights` and `activation`, by
        `group_sizes`, times `scales`, `(rows,)`: `(rows, hidden)` in float32 or wider."""
        return self.forward_saving(rows, scales, weights, group_sizes, activation)[0]

    def forward_saving(
        self,
        rows: Float[Array, "rows hidden"],
        scales: Float[Array, " rows"],
        weights: FeedForwardWeights,
        group_sizes: Int[Array, " groups"],
        activation: Activation,
    ) -> tuple[Float[Array, "rows hidden"], Float[Array, "rows up"]]:
        """As `forward` for `rows`, `scales`, `weights`, `group_sizes` and `activation`, with the
        pre-activations `(rows, parts * intermediate)` beside the output."""
        operands = (rows, scales, weights, group_sizes)
        return network.forward_saving(self.cleared_multiply, *operands, activation)

    def backward(
        self,
        rows: Float[Array, "rows hidden"],
        scales: Float[Array, " rows"],
        weights: FeedForwardWeights,
        group_sizes: Int[Array, " groups"],
        before: Float[Array, "rows up"],
        cotangent: Float[Array, "rows hidden"],
        activation: Activation,
    ) -> tuple[Float[Array, "rows hidden"], Float[Array, " rows"], FeedForwardWeights]:
        """The cotangents of `rows`, `scales` and `weights`, each in its own dtype.

        `before` are the pre-activations that `forward_saving` gave for the same `group_sizes` and
        `activation`, `cotangent` is that of its output, both `(rows, _)`."""
        products = (self.cleared_multiply, self.cleared_outer)
        operands = (rows, scales, weights, group_sizes, before, cotangent)
        return network.backward(*products, *operands, activation)

    def cleared_backward(
        self,
        rows: Float[Array, "rows hidden"],
        scales: Float[Array, " rows"],
        weights: FeedForwardWeights,
        group_sizes: Int[Array, " groups"],
        before: Float[Array, "rows up"],
        cotangent: Float[Array, "rows hidden"],
        activation: Activation,
    ) -> tuple[Float[Array, "rows hidden"], Float[Array, " rows"], FeedForwardWeights]:
        """As `backward` for `rows`, `scales`, `weights`, `group_sizes`, `before`, `cotangent` and
        `activation`, `(rows, _)`, with rows of nobody 0 and groups without rows 0."""
        operands = (rows, scales, weights, group_sizes, before, cotangent)
        rows, scales, weights = self.backward(*operands, activation)
        clear = partial(self.clear_empty, group_sizes=group_sizes)
        rows, column = (clear_nobody(array, group_sizes) for array in (rows, scales[:, None]))
        return rows, column[:, 0], jax.tree.map(clear, weights)

    def cleared_multiply(
        self,
        rows: Float[Array, "rows size_in"],
        weight: Any,
        group_sizes: Int[Array, " groups"],
        *,
        transposed: bool,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "rows size_out"]:
        """`multiply` of `rows` and `weight` by `group_sizes`, `transposed` or not, in `out_dtype`
        (by default float32 or wider), with rows of nobody 0."""
        out_dtype = jnp.dtype(out_dtype or accumulation_dtype(rows, weight))
        rows = rows if self.wide_rows else _rounded(rows, weight.dtype)
        product = self.multiply(
            rows, weight, group_sizes, transposed=transposed, out_dtype=out_dtype
        )
        return clear_nobody(product, group_sizes)

    def cleared_outer(
        self,
        left: Float[Array, "rows a"],
        right: Float[Array, "rows b"],
        group_sizes: Int[Array, " groups"],
        *,
        out_dtype: jnp.dtype,
    ) -> Float[Array, "groups a b"]:
        """`outer` of `left` and `right` by `group_sizes` in `out_dtype`, with groups without rows
        0."""
        left, right = (clear_nobody(rows, group_sizes) for rows in (left, right))
        if not self.wide_rows:
            left, right = (_rounded(rows, out_dtype) for rows in (left, right))
        product = self.outer(left, right, group_sizes, out_dtype=out_dtype)
        return self.clear_empty(product, group_sizes)

    def clear_empty(
        self, stack: Float[Array, "groups ..."], group_sizes: Int[Array, " groups"]
    ) -> Float[Array, "groups ..."]:
        """`stack`, `(groups, ...)`, with groups of size 0 in `group_sizes` cleared, unless the
        kernel did so."""
        if self.clears_empty_groups:
            return stack
        full = (group_sizes > 0).reshape(-1, *[1] * (stack.ndim - 1))
        return jnp.where(full, stack, 0)


def check_kernel(name: str, kernel: Any) -> None:
    """`kernel` is one of groups of any size. **Raises:** `TypeError` otherwise."""
    if not isinstance(kernel, AbstractGroupedMatmul) or kernel.plain:
        raise TypeError(
            f"`{name}` must be a kernel for groups of any size, as `braidax.matmul.Blocks()`. "
            f"Got {kernel!r:.60}."
        )


def _rounded(rows: Float[Array, "rows size"], dtype: DTypeLike) -> Float[Array, "rows size"]:
    """`rows` in `dtype` if it is narrower."""
    narrower = jnp.finfo(dtype).bits < jnp.finfo(rows.dtype).bits
    return rows.astype(dtype) if narrower else rows

"""Grouped matrix product: every row times the matrix of its group.

A backend supplies two kernels, and this file closes them under reverse-mode differentiation of
any order and under `jax.vmap`:

- `multiply(rows, weight, group_sizes, transposed)`: rows (rows, a) times weight (groups, a, b),
  or its transpose, gives (rows, b). Rows past the sum of the group sizes give 0.
- `outer(left, right, group_sizes)`: for each group, left^T right over its rows: (groups, a, b).
  A group without rows gives exactly 0.

Each is the derivative of the other, so two mutually recursive `custom_vjp` functions suffice.
Their kernels carry a `custom_vmap` rule, which sorts the rows of all examples together; it has
to sit inside: `custom_vmap` alone does not survive reverse mode.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from .accumulate import Accumulating, accumulating
from .feed_forward import FeedForwardKernels, composed, fused


class GroupedMatmul(NamedTuple):
    """What experts are handed to multiply with: a product, or a whole feed-forward network
    `feed_forward(rows, up, down, group_sizes, activation)`, which a backend may have fused.
    `into` is both with running sums of gradients, for backends that take any subset of rows."""

    multiply: Callable[[Array, Array, Array, bool], Array]
    feed_forward: Callable[..., Array]
    into: Accumulating | None = None

    def __call__(
        self,
        rows: Float[Array, "rows size_in"],
        weight: Float[Array, "groups ..."],
        group_sizes: Int[Array, " groups"],
        transposed: bool,
        /,
    ) -> Float[Array, "rows size_out"]:
        """Rows times the weight of their group, in float32 or wider."""
        return self.multiply(rows, weight, group_sizes, transposed)


class Kernels(NamedTuple):
    """The two products of a backend, both accumulated and returned in float32 or wider."""

    multiply: Callable[[Array, Array, Array, bool], Array]
    outer: Callable[[Array, Array, Array], Array]


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """float32, or the widest of the operands where that is wider."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def grouped_matmul(
    kernels: Kernels, feed_forward_kernels: FeedForwardKernels | None = None
) -> GroupedMatmul:
    """A differentiable, vmappable grouped product out of a backend's two kernels.

    Cotangents are rounded to the wider dtype of the two operands, as in any mixed-precision
    matrix product. Forward mode is not supported (`custom_vjp`).
    """
    multiply_kernels = {
        transposed: vmappable_multiply(partial(_call_multiply, kernels, transposed))
        for transposed in (False, True)
    }
    outer_kernel = _vmappable_outer(kernels.outer)

    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def multiply(rows, weight, group_sizes, transposed):
        return multiply_kernels[transposed](rows, weight, group_sizes)

    @jax.custom_vjp
    def outer(left, right, group_sizes):
        return outer_kernel(left, right, group_sizes)

    def multiply_forward(rows, weight, group_sizes, transposed):
        return multiply(rows, weight, group_sizes, transposed), (rows, weight, group_sizes)

    def multiply_backward(transposed, residuals, cotangent):
        rows, weight, group_sizes = residuals
        cotangent = cotangent.astype(jnp.result_type(rows, weight))
        rows_cotangent = multiply(cotangent, weight, group_sizes, not transposed)
        left, right = (cotangent, rows) if transposed else (rows, cotangent)
        weight_cotangent = outer(left, right, group_sizes)
        return rows_cotangent.astype(rows.dtype), weight_cotangent.astype(weight.dtype), None

    def outer_forward(left, right, group_sizes):
        return outer(left, right, group_sizes), (left, right, group_sizes)

    def outer_backward(residuals, cotangent):
        left, right, group_sizes = residuals
        cotangent = cotangent.astype(jnp.result_type(left, right))
        left_cotangent = multiply(right, cotangent, group_sizes, True)
        right_cotangent = multiply(left, cotangent, group_sizes, False)
        return left_cotangent.astype(left.dtype), right_cotangent.astype(right.dtype), None

    multiply.defvjp(multiply_forward, multiply_backward)
    outer.defvjp(outer_forward, outer_backward)
    into = accumulating(multiply, outer, feed_forward_kernels)
    if feed_forward_kernels is None:
        return GroupedMatmul(multiply, composed(multiply), into)
    return GroupedMatmul(multiply, fused(multiply, outer, feed_forward_kernels), into)


def _call_multiply(kernels: Kernels, transposed: bool, rows, weight, group_sizes):
    return kernels.multiply(rows, weight, group_sizes, transposed)


def vmappable_multiply(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """`kernel(rows, weight, group_sizes)`, mapped by `jax.vmap` by sorting the rows of all examples
    together.

    `weight` is an array (groups, a, b), or a tree of arrays with the groups in front.
    """

    @custom_vmap
    def multiply(rows, weight, group_sizes):
        return kernel(rows, weight, group_sizes)

    @multiply.def_vmap
    def _rule(axis_size, in_batched, rows, weight, group_sizes):
        rows_batched, weight_batched, sizes_batched = in_batched
        rows = _with_axis(rows, rows_batched, axis_size)
        group_sizes = _with_axis(group_sizes, sizes_batched, axis_size)
        stacked = any(jax.tree.leaves(weight_batched))
        if stacked:
            weight = jax.tree.map(partial(_stack_groups, axis_size), weight, weight_batched)
        order, merged_sizes = _merge_groups(group_sizes, rows.shape[1], shared_groups=not stacked)
        flat = rows.reshape(axis_size * rows.shape[1], rows.shape[2])
        product = multiply(flat[order], weight, merged_sizes)
        product = jnp.zeros_like(product).at[order].set(product, unique_indices=True)
        return product.reshape(axis_size, rows.shape[1], product.shape[-1]), True

    return multiply


def _stack_groups(axis_size: int, array: Array, batched: bool) -> Array:
    """The examples' groups one after the other."""
    array = _with_axis(array, batched, axis_size)
    return array.reshape(axis_size * array.shape[1], *array.shape[2:])


def _vmappable_outer(kernel):
    @custom_vmap
    def outer(left, right, group_sizes):
        return kernel(left, right, group_sizes)

    @outer.def_vmap
    def _rule(axis_size, in_batched, left, right, group_sizes):
        left, right, group_sizes = (
            _with_axis(array, batched, axis_size)
            for array, batched in zip((left, right, group_sizes), in_batched, strict=True)
        )
        # One gradient for each example: summing here would break `vmap(grad)`.
        order, merged_sizes = _merge_groups(group_sizes, left.shape[1], shared_groups=False)
        flat_left, flat_right = (
            array.reshape(axis_size * array.shape[1], array.shape[2])[order]
            for array in (left, right)
        )
        product = outer(flat_left, flat_right, merged_sizes)
        return product.reshape(*group_sizes.shape, *product.shape[1:]), True

    return outer


def _with_axis(array: Array, batched: bool, axis_size: int) -> Array:
    return array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))


def _merge_groups(
    group_sizes: Int[Array, "examples groups"], num_rows: int, *, shared_groups: bool
) -> tuple[Int[Array, " all_rows"], Int[Array, " merged_groups"]]:
    """The order that sorts the rows of all examples by group, and the sizes of the merged groups:
    the examples' groups one after the other, or added up where they share their weights."""
    examples, groups = group_sizes.shape
    row = jnp.arange(num_rows, dtype=jnp.int32)
    owner = jax.vmap(lambda ends: jnp.searchsorted(ends, row, side="right"))(
        jnp.cumsum(group_sizes, axis=1, dtype=jnp.int32)
    )
    if shared_groups:
        merged_sizes = group_sizes.sum(axis=0, dtype=jnp.int32)
    else:
        first_group = jnp.arange(examples)[:, None] * groups
        owner = jnp.where(owner < groups, owner + first_group, examples * groups)
        merged_sizes = group_sizes.reshape(-1)
    return jnp.argsort(owner.reshape(-1), stable=True), merged_sizes

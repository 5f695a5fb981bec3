"""`jax.vmap` of grouped products: the rows of all examples are sorted together.

The `custom_vmap` rules have to sit inside of the `custom_vjp` functions: `custom_vmap` alone does
not survive reverse mode.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int


def mapped_multiply(multiply: Callable[..., Array]) -> Callable[..., Array]:
    """`multiply(rows, weight, group_sizes)` with a rule for `jax.vmap`."""

    @custom_vmap
    def call(rows, weight, group_sizes):
        return multiply(rows, weight, group_sizes)

    @call.def_vmap
    def _rule(axis_size, in_batched, rows, weight, group_sizes):
        rows_batched, weight_batched, sizes_batched = in_batched
        rows = _with_axis(rows, rows_batched, axis_size)
        group_sizes = _with_axis(group_sizes, sizes_batched, axis_size)
        stacked = any(jax.tree.leaves(weight_batched))
        if stacked:
            weight = jax.tree.map(partial(_stack_groups, axis_size), weight, weight_batched)
        order, merged_sizes = _merge_groups(group_sizes, rows.shape[1], shared_groups=not stacked)
        flat = rows.reshape(axis_size * rows.shape[1], rows.shape[2])
        product = call(flat[order], weight, merged_sizes)
        product = jnp.zeros_like(product).at[order].set(product, unique_indices=True)
        return product.reshape(axis_size, rows.shape[1], product.shape[-1]), True

    return call


def mapped_outer(outer: Callable[..., Array]) -> Callable[..., Array]:
    """`outer(left, right, group_sizes)` with a rule for `jax.vmap`."""

    @custom_vmap
    def call(left, right, group_sizes):
        return outer(left, right, group_sizes)

    @call.def_vmap
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
        product = call(flat_left, flat_right, merged_sizes)
        return product.reshape(*group_sizes.shape, *product.shape[1:]), True

    return call


def mapped_by(reference: Callable, kernel: Callable) -> Callable:
    """`kernel`, with the mapped `reference` in its place under `jax.vmap`."""

    @custom_vmap
    def call(*operands):
        return kernel(*operands)

    @call.def_vmap
    def _rule(axis_size, in_batched, *operands):
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        outputs = jax.vmap(reference, tuple(in_axes), axis_size=axis_size)(*operands)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return call


def _with_axis(array: Array, batched: bool, axis_size: int) -> Array:
    return array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))


def _stack_groups(axis_size: int, array: Array, batched: bool) -> Array:
    """The examples' groups one after the other."""
    array = _with_axis(array, batched, axis_size)
    return array.reshape(axis_size * array.shape[1], *array.shape[2:])


def _merge_groups(
    group_sizes: Int[Array, "examples groups"], num_rows: int, *, shared_groups: bool
) -> tuple[Int[Array, " all_rows"], Int[Array, " merged_groups"]]:
    """The order that sorts the rows of all examples by group, and the sizes of the merged groups.

    The examples' groups stand one after the other, or are added up if they share their weights."""
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

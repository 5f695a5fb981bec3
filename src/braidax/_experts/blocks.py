"""Grouped matrix product as a loop over blocks of rows: the default on CPU, portable everywhere.

The loop runs over the blocks that exist, so the work follows the assignments whatever their
skew; a block never crosses a group. Operands are widened to float32 block by block, which is
exact and faster on a CPU than a product of narrow numbers.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .grouped_matmul import Kernels, accumulation_dtype

_LARGEST_BLOCK = 512

T = TypeVar("T")


class _Blocks(NamedTuple):
    """Where each block lies; entries past `count` are padding and never read."""

    count: Int[Array, ""]
    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    stop: Int[Array, " blocks"]
    first: Int[Array, " blocks"]


def block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """The row counts a block may have, ascending, from static shapes alone.

    The largest is the mean group and a quarter more, so that most groups are one block, in steps
    of 8 and at most 512: enough rows to pay for reading the group's weights and for adding to its
    gradient, few enough to stay in cache. A block uses the smallest size that holds its rows.
    Larger groups are split evenly, into blocks of more than half the largest, so the sizes are
    dense there: in eighths, and a half and a quarter for small groups. Each size is compiled,
    which rules out more. Under 8 rows the choice costs more than it saves.
    """
    mean = -(-num_rows // num_groups)
    largest = min(-(-mean * 5 // 32) * 8, _LARGEST_BLOCK, num_rows)
    smaller = {-(-largest * eighths // 64) * 8 for eighths in (2, 4, 5, 6, 7)}
    return (*sorted(size for size in smaller if 8 <= size < largest), largest)


def plan_blocks(group_sizes: Int[Array, " groups"], num_rows: int, block_size: int) -> _Blocks:
    num_groups = group_sizes.shape[0]
    group_stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    blocks_per_group = -(-group_sizes // block_size)
    last_blocks = jnp.cumsum(blocks_per_group, dtype=jnp.int32)
    block = jnp.arange(num_rows // block_size + num_groups, dtype=jnp.int32)
    group = jnp.searchsorted(last_blocks, block, side="right").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    within = block - (last_blocks - blocks_per_group)[group]
    # The rows of a group are split evenly: a full block and a short one waste more.
    share = -(-group_sizes // jnp.maximum(blocks_per_group, 1))[group]
    start = (group_stops - group_sizes)[group] + within * share
    stop = jnp.minimum(start + share, group_stops[group])
    return _Blocks(last_blocks[-1], group, start, stop, within == 0)


def at_smallest_size(
    sizes: tuple[int, ...], live: Int[Array, ""], compute: Callable[[int], T]
) -> T:
    """`compute` at the smallest of `sizes` that holds `live` rows. Its results have one shape,
    because a branch that returned the whole output would copy it."""
    if len(sizes) == 1:
        return compute(sizes[0])
    branch = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), live)
    return jax.lax.switch(branch, [lambda size=size: compute(size) for size in sizes])


def window(
    array: Float[Array, "rows size"], start: Int[Array, ""], size: int, dtype: jnp.dtype
) -> tuple[Float[Array, "window size"], Int[Array, ""]]:
    """`size` rows that hold the ones from `start` on, and the row that they begin with: earlier
    than `start` where the array would end too soon."""
    begin = jnp.minimum(start, array.shape[0] - size)
    return jax.lax.dynamic_slice_in_dim(array, begin, size).astype(dtype), begin


def live_rows(begin: Array, size: int, start: Array, stop: Array) -> Array:
    row = begin + jnp.arange(size, dtype=jnp.int32)
    return ((row >= start) & (row < stop))[:, None]


def of_group(
    stack: Float[Array, "groups a b"], group: Int[Array, ""], dtype: jnp.dtype
) -> Float[Array, "a b"]:
    """One matrix of the stack, widened to `dtype`. Called in a loop over `group`."""
    return part_of_group(stack, group, (0, 0), (stack.shape[1], stack.shape[2]), dtype)


def part_of_group(
    stack: Float[Array, "groups _a _b"],
    group: Int[Array, ""],
    begin: tuple[int | Int[Array, ""], int | Int[Array, ""]],
    shape: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "a b"]:
    """The part of one matrix of the stack that starts at `begin`, widened to `dtype`."""
    narrow = stack.dtype
    row, column = (jnp.asarray(index, group.dtype) for index in begin)
    if narrow.itemsize >= 4:
        return jax.lax.dynamic_slice(stack, (group, row, column), (1, *shape))[0].astype(dtype)
    # XLA slices narrow floats on a CPU by widening the whole stack, once, before the loop; as
    # integers it does not, nor can what depends on the loop's counter leave the loop.
    stack, group = jax.lax.optimization_barrier((stack, group))
    integer = {1: jnp.uint8, 2: jnp.uint16}[narrow.itemsize]
    bits = jax.lax.bitcast_convert_type(stack, integer)
    part = jax.lax.dynamic_slice(bits, (group, row, column), (1, *shape))[0]
    return jax.lax.bitcast_convert_type(part, narrow).astype(dtype)


def _multiply(
    rows: Float[Array, "rows size_in"],
    weight: Float[Array, "groups a b"],
    group_sizes: Int[Array, " groups"],
    transposed: bool,
) -> Float[Array, "rows size_out"]:
    num_rows = rows.shape[0]
    size_out = weight.shape[1 if transposed else 2]
    dtype = accumulation_dtype(rows, weight)
    # Like the rows: inside `jax.shard_map` a loop's carry has to vary over the mesh as they do.
    output = jax.lax.full_like(rows, 0, dtype, (num_rows, size_out))
    if num_rows == 0:
        return output
    sizes = block_sizes(num_rows, weight.shape[0])
    largest = sizes[-1]
    blocks = plan_blocks(group_sizes, num_rows, largest)
    contraction = (((1,), (1 if transposed else 0,)), ((), ()))

    def step(i, output):
        start, stop = blocks.start[i], blocks.stop[i]
        matrix = of_group(weight, blocks.group[i], dtype)
        previous, first_row = window(output, start, largest, dtype)

        def compute(size):
            block, begin = window(rows, start, size, dtype)
            product = jax.lax.dot_general(block, matrix, contraction)
            padded = jnp.zeros((largest, size_out), dtype)
            return jax.lax.dynamic_update_slice_in_dim(padded, product, begin - first_row, 0)

        product = at_smallest_size(sizes, stop - start, compute)
        # A window reaches into its neighbours' rows: only the block's own are written.
        product = jnp.where(live_rows(first_row, largest, start, stop), product, previous)
        return jax.lax.dynamic_update_slice_in_dim(output, product, first_row, 0)

    return jax.lax.fori_loop(0, blocks.count, step, output)


def _outer(
    left: Float[Array, "rows a"], right: Float[Array, "rows b"], group_sizes: Int[Array, " groups"]
) -> Float[Array, "groups a b"]:
    num_rows = left.shape[0]
    dtype = accumulation_dtype(left, right)
    shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
    output = jax.lax.full_like(left, 0, dtype, shape)
    if num_rows == 0:
        return output
    sizes = block_sizes(num_rows, group_sizes.shape[0])
    blocks = plan_blocks(group_sizes, num_rows, sizes[-1])
    contraction = (((0,), (0,)), ((), ()))

    def step(i, output):
        start, stop, group = blocks.start[i], blocks.stop[i], blocks.group[i]

        def compute(size):
            # Both sides are cleared of their neighbours' rows: 0 * NaN is NaN.
            (window_left, begin), (window_right, _) = (
                window(array, start, size, dtype) for array in (left, right)
            )
            live = live_rows(begin, size, start, stop)
            return jax.lax.dot_general(
                jnp.where(live, window_left, 0), jnp.where(live, window_right, 0), contraction
            )

        product = at_smallest_size(sizes, stop - start, compute)
        previous = jax.lax.dynamic_index_in_dim(output, group, keepdims=False)
        product = jnp.where(blocks.first[i], product, previous + product)
        return jax.lax.dynamic_update_index_in_dim(output, product, group, 0)

    return jax.lax.fori_loop(0, blocks.count, step, output)


# Compiled once for each shape, also when the block is called outside of `jax.jit`.
BLOCKS = Kernels(jax.jit(_multiply, static_argnums=3), jax.jit(_outer))

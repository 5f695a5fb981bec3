"""The feed-forward network of decoding: so few rows that reading the weights is what takes time.

A loop over blocks copies every matrix out of its stack before it multiplies. The copy costs more
than the product itself if a group has a handful of rows. If most groups have rows, the first rows
of every group are multiplied with the whole weight stack at once. The remaining rows (all rows, if
few groups are in use) are processed in blocks, four at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .network import Activation, FeedForwardWeights, accumulation_dtype, activate
from .stacks import of_group

_LARGEST_MEAN = 16  # rows of a group
_BLOCKS_AT_ONCE = 4  # measured: a third faster than one at a time, more gain nothing


def tile_size(num_rows: int, num_groups: int) -> int | None:
    """Rows of a tile from static shapes alone: the mean group and a third of it, in steps of 8, or
    4 rows where those hold twice the mean. `None` where groups are large enough for a loop over
    blocks. Measured: a row that is padded costs as much as one that is not, and a second tile for
    the few groups that need one costs less than padding all others."""
    if not 0 < num_rows <= _LARGEST_MEAN * num_groups:
        return None
    if num_rows <= 2 * num_groups:
        return 4
    return -(-4 * num_rows // (3 * 8 * num_groups)) * 8


class _Tiles(NamedTuple):
    """`first` rows of each group go with the whole stack, the others in `count` blocks."""

    starts: Int[Array, " groups"]
    stops: Int[Array, " groups"]
    first: Int[Array, " groups"]
    blocks_before: Int[Array, " groups"]
    count: Int[Array, ""]
    group: Int[Array, " blocks"]
    block_start: Int[Array, " blocks"]


def _plan(group_sizes, num_rows: int, size: int, whole) -> _Tiles:
    num_groups = group_sizes.shape[0]
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = stops - group_sizes
    first = jnp.where(whole, jnp.minimum(group_sizes, size), 0)
    blocks = -(-(group_sizes - first) // size)
    blocks_to = jnp.cumsum(blocks, dtype=jnp.int32)
    most = min(num_rows // size + num_groups, num_rows)
    most = -(-most // _BLOCKS_AT_ONCE) * _BLOCKS_AT_ONCE
    block = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(blocks_to, block, side="right").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    before = blocks_to - blocks
    start = (starts + first)[group] + (block - before[group]) * size
    return _Tiles(starts, stops, first, before, blocks_to[-1], group, start)


def _take(rows, starts, stops, size: int, dtype):
    """`size` rows from each start on, zero from its stop on: `(tiles, size, hidden)`."""
    row = starts[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    taken = rows.at[jnp.minimum(row, rows.shape[0] - 1)].get(mode="promise_in_bounds")
    return jnp.where((row < stops[:, None])[..., None], taken, 0).astype(dtype)


def _multiply_tiles(tiles: Array, weights: FeedForwardWeights, activation: Activation) -> Array:
    """`(tiles, size, hidden)` through the network of each tile."""
    before = jax.lax.dot_general(weights.up, tiles, (((2,), (2,)), ((0,), (0,))))
    # The weights on the left are read twice as fast; without the barrier XLA swaps the sides.
    before = jax.lax.optimization_barrier(before).swapaxes(1, 2)
    if weights.up_bias is not None:
        before = before + weights.up_bias[:, None]
    activations = activate(activation, before)
    output = jax.lax.dot_general(activations, weights.down, (((2,), (1,)), ((0,), (0,))))
    return output if weights.down_bias is None else output + weights.down_bias[:, None]


def forward_few_rows(
    rows: Float[Array, "rows hidden"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    activation: Activation,
    size: int,
) -> Float[Array, "rows hidden"]:
    """The output, with tiles of `size` rows. Rows of no group hold anything."""
    num_rows, (num_groups, _, hidden) = rows.shape[0], weights.down.shape
    dtype = accumulation_dtype(rows, weights.up, weights.down)
    # A product with a stack of narrow numbers would widen all of it first.
    in_place = weights.up.dtype == dtype and weights.down.dtype == dtype
    whole = in_place & (2 * jnp.count_nonzero(group_sizes) >= num_groups)
    plan = _plan(group_sizes, num_rows, size, whole)

    def zeros(tiles):
        # Made of the rows: inside `jax.shard_map` a carry has to vary over the mesh as they do.
        return jax.lax.full_like(rows, 0, dtype, (tiles, size, hidden))

    def with_whole_stack():
        tiles = _take(rows, plan.starts, plan.stops, size, dtype)
        return _multiply_tiles(tiles, weights, activation)

    def step(i, outputs):
        begin = i * _BLOCKS_AT_ONCE
        group, start = (
            jax.lax.dynamic_slice_in_dim(array, begin, _BLOCKS_AT_ONCE)
            for array in (plan.group, plan.block_start)
        )
        block = begin + jnp.arange(_BLOCKS_AT_ONCE, dtype=jnp.int32)
        stop = jnp.where(block < plan.count, plan.stops[group], 0)
        tiles = _take(rows, start, stop, size, dtype)
        tiles = _multiply_tiles(tiles, _of_groups(weights, group, dtype), activation)
        return jax.lax.dynamic_update_slice_in_dim(outputs, tiles, begin, 0)

    steps = -(-plan.count // _BLOCKS_AT_ONCE)
    outputs = jax.lax.fori_loop(0, steps, step, zeros(plan.group.shape[0]))
    if in_place:
        first = jax.lax.cond(whole, with_whole_stack, lambda: zeros(num_groups))
        outputs = jnp.concatenate([first, outputs])
    place = _places(plan, num_rows, size, num_groups if in_place else 0)
    return outputs.reshape(-1, hidden).at[place].get(mode="promise_in_bounds")


def _of_groups(weights: FeedForwardWeights, group: Array, dtype: jnp.dtype) -> FeedForwardWeights:
    """The weights of several groups, stacked and widened to `dtype`."""
    matrices = (
        jnp.stack([of_group(stack, group[i], dtype) for i in range(_BLOCKS_AT_ONCE)])
        for stack in (weights.up, weights.down)
    )
    biases = (
        None if bias is None else bias[group].astype(dtype)
        for bias in (weights.up_bias, weights.down_bias)
    )
    return FeedForwardWeights(*matrices, *biases)


def _places(plan: _Tiles, num_rows: int, size: int, num_first: int) -> Int[Array, " rows"]:
    """Where each row's output lies among the rows of all tiles, `num_first` whole-stack ones
    before the blocks; rows of no group read any."""
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(plan.stops, row, side="right").astype(jnp.int32)
    group = jnp.minimum(group, plan.stops.shape[0] - 1)
    position = row - plan.starts[group]
    later = position - plan.first[group]
    tile = num_first + plan.blocks_before[group] + later // size
    place = jnp.where(later < 0, group * size + position, tile * size + later % size)
    return jnp.where(row < plan.stops[-1], place, 0)

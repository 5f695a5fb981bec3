"""Tiles of a Pallas Mosaic GPU kernel: their rows, and how they move between memories."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from .._mesh import varying_alike

UNIT = 64  # rows of an instruction of the tensor cores, and 128 bytes of 16-bit numbers
ALIGNMENT = 8  # rows: a copy between memories begins at a multiple
_STEPS = 4  # tiles of an operand in flight


class Tiles(NamedTuple):
    """The rows `start` to `stop` of each tile, and where its window begins. Entries past `count`
    are padding and never read."""

    count: Int[Array, " one"]
    group: Int[Array, " tiles"]
    begin: Int[Array, " tiles"]
    start: Int[Array, " tiles"]
    stop: Int[Array, " tiles"]


def plan_tiles(group_sizes: Int[Array, " groups"], num_rows: int, height: int) -> Tiles:
    """Tiles of `height` rows. The window of a group's first tile begins at an aligned row, and the
    other ones follow."""
    groups = group_sizes.shape[0]
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = stops - group_sizes
    origins = starts // ALIGNMENT * ALIGNMENT
    counts = jnp.where(group_sizes > 0, -(-(stops - origins) // height), 0)
    most = (num_rows + (ALIGNMENT - 1) * groups) // height + groups
    group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), counts, total_repeat_length=most)
    tile_stops = jnp.cumsum(counts, dtype=jnp.int32)
    within = jnp.arange(most, dtype=jnp.int32) - (tile_stops - counts)[group]
    window = origins[group] + within * height
    start = jnp.maximum(starts[group], window)
    stop = jnp.minimum(stops[group], window + height)
    return Tiles(tile_stops[-1:], group, jnp.minimum(window, num_rows - height), start, stop)


def padded(rows, least: int):
    """`rows` with rows of nobody at the end, so that a window fits everywhere."""
    num_rows = rows.shape[0]
    missing = max(-(-num_rows // ALIGNMENT) * ALIGNMENT, least) - num_rows
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def tile_width(size: int) -> int:
    """The widest tile that divides `size`, a multiple of the unit."""
    return 2 * UNIT if size % (2 * UNIT) == 0 else UNIT


def aligned(row):
    return pl.multiple_of(row, ALIGNMENT)


def window(shape, corner):
    """Windows of `shape` at `corner(i)`. Their memory is free one step after their product has
    begun."""
    return plgpu.BlockSpec(tuple(map(pl.Element, shape)), corner, delay_release=1)


def pipeline(step, num_steps, specs):
    """`step` for the windows of one step after the other, while the next ones are loaded."""
    return plgpu.emit_pipeline(step, grid=(num_steps,), in_specs=specs, max_concurrent_steps=_STEPS)


def clear_neighbours(window, begin, start, stop):
    """The rows of `window` outside of `start` to `stop` 0: a select, because 0 * NaN is NaN."""
    row = begin + jax.lax.broadcasted_iota(jnp.int32, window.shape, 0)
    live = (row >= start) & (row < stop)
    window[...] = jnp.where(live, window[...], jnp.zeros((), window.dtype))


def write(tiles, buffers):
    """`tiles` to `buffers`, as soon as the copies of what they held have left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for tile, buffer in zip(tiles, buffers, strict=True):
        buffer[...] = tile.astype(buffer.dtype)
    plgpu.commit_smem()


def store_rows(buffers, places, begin, start, stop):
    """The rows `start` to `stop` of `buffers`, whose first is row `begin`, to `places`: outputs and
    columns. A copy has a static size, so the rows go out as powers of 2."""
    size = buffers[0].shape[0]
    while size:
        live = ((stop - start) & size) != 0

        @pl.when(live)
        def _(start=start, size=size):
            for buffer, (output, column) in zip(buffers, places, strict=True):
                window = (pl.ds(start, size), pl.ds(column, buffer.shape[1]))
                plgpu.copy_smem_to_gmem(buffer.at[pl.ds(start - begin, size)], output.at[window])

        start = start + jnp.where(live, size, 0)
        size //= 2


def run(kernel, output, buffers, num_cores: int, *operands):
    """The `output` of `kernel` for `operands` on every core, with `buffers` in its own memory."""

    def body(*references):
        kernel(*references)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    compiled = plgpu.kernel(
        body,
        out_type=output,
        scratch_types=buffers,
        grid=(num_cores,),
        grid_names=("core",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    # Inside of `jax.shard_map` the output varies as the operands do, which no kernel tells JAX.
    return varying_alike((operands, compiled(*operands)))[1]

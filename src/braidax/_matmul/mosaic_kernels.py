"""The programs of `Mosaic()` for a core of a Hopper GPU. Importing this file imports Pallas.

Every core walks over tiles of the results. Tables made outside of the kernels say which rows a
tile has, so that no core searches through the groups. The window of a tile may reach into its
neighbours: their rows are loaded, and never stored or summed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

UNIT = 64  # rows of an instruction of the tensor cores, and 128 bytes of 16-bit numbers
_ALIGNMENT = 8  # rows: a copy between memories begins at a multiple
_STEPS = 4  # tiles of an operand in flight


class _Tiles(NamedTuple):
    """The rows `start` to `stop` of each tile, and where its window begins. Entries past `count`
    are padding and never read."""

    count: Int[Array, " one"]
    group: Int[Array, " tiles"]
    begin: Int[Array, " tiles"]
    start: Int[Array, " tiles"]
    stop: Int[Array, " tiles"]


def multiply(rows, weight, group_sizes, *, transposed: bool, out_dtype, num_cores: int):
    """`rows`, `(rows, a)`, times `weight`, `(groups, a, b)` or `(groups, b, a)`, by group."""
    (output,) = _by_tiles(
        lambda product: [[product]],
        [(1, out_dtype)],
        (rows, weight, group_sizes),
        transposed=transposed,
        num_cores=num_cores,
    )
    return output


def activate(rows, up, group_sizes, activation, parts: int, *, saving: bool, num_cores: int):
    """`activation` of the `parts` of `rows`, `(rows, hidden)`, times `up`, `(groups, parts *
    intermediate, hidden)`, in the dtype of `up`; with `saving` the parts beside it, in float32."""

    def finish(*before):
        return [[activation(*before)], *([before] if saving else [])]

    outputs = [(1, up.dtype), *([(parts, jnp.float32)] if saving else [])]
    operands = (rows, up, group_sizes)
    return _by_tiles(finish, outputs, operands, transposed=True, parts=parts, num_cores=num_cores)


def outer(left, right, group_sizes, *, out_dtype, num_cores: int):
    """For each group `left^T right` over its rows: `(groups, a, b)`."""
    left, right = _padded(left, UNIT), _padded(right, UNIT)
    num_rows, groups = left.shape[0], group_sizes.shape[0]
    shape = (groups, left.shape[1], right.shape[1])
    height, width = _tile(shape[1]), _tile(shape[2])
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)

    def kernel(start, stop, left, right, output, buffer):
        @plgpu.nd_loop((groups, shape[1] // height, shape[2] // width), collective_axes="core")
        def _(loop):
            group, row, column = loop.index
            first, last = start[group], stop[group]
            origin = first // _ALIGNMENT * _ALIGNMENT
            num_blocks = jnp.where(last > first, pl.cdiv(last - origin, UNIT), 0)

            def begin(i):
                return _aligned(jnp.minimum(origin + i * UNIT, num_rows - UNIT))

            def accumulate(total):
                def step(index, left, right):
                    (i,) = index
                    start = jnp.maximum(first, origin + i * UNIT)
                    stop = jnp.minimum(last, origin + (i + 1) * UNIT)

                    @pl.when(stop - start < UNIT)
                    def _():
                        _clear_neighbours(left, begin(i), start, stop)
                        _clear_neighbours(right, begin(i), start, stop)
                        plgpu.commit_smem()

                    plgpu.wgmma(total, plgpu.transpose_ref(left, (1, 0)), right)
                    plgpu.wgmma_wait(1)

                corners = (lambda i: (begin(i), row * height), lambda i: (begin(i), column * width))
                specs = (_spec((UNIT, height), corners[0]), _spec((UNIT, width), corners[1]))
                _pipeline(step, num_blocks, specs)(left, right)
                return total[...]

            product = pl.run_scoped(accumulate, plgpu.ACC((height, width)))
            _write([product], [buffer])
            window = (group, pl.ds(row * height, height), pl.ds(column * width, width))
            plgpu.copy_smem_to_gmem(buffer, output.at[window])

    output = jax.ShapeDtypeStruct(shape, out_dtype)
    buffers = [plgpu.SMEM((height, width), out_dtype)]
    return _run(kernel, output, buffers, num_cores)(stops - group_sizes, stops, left, right)


def _by_tiles(finish, outputs, operands, *, transposed: bool, num_cores: int, parts: int = 1):
    """The results of `finish` for the products of the rows with each of the `parts` that the
    columns of the weights consist of.

    **Arguments:**

    - `finish(*products)`: of a tile of every part. For each output its tiles, one after the other.
    - `outputs`: how many tiles each has, and its dtype.
    - `operands`: the rows, the weights and the group sizes.
    """
    rows, weight, group_sizes = operands
    num_rows, groups = rows.shape[0], weight.shape[0]
    size = weight.shape[1 if transposed else 2] // parts
    height = 2 * UNIT if num_rows > UNIT * groups else UNIT
    width = UNIT if parts > 1 else _tile(size)
    rows = _padded(rows, height)
    tiles = _plan(group_sizes, rows.shape[0], height)
    num_outputs = len(outputs)

    def kernel(count, group, begin, start, stop, rows, weight, *references):
        outputs, buffers = references[:num_outputs], references[num_outputs:]

        @plgpu.nd_loop((count[0], size // width), collective_axes="core")
        def _(loop):
            tile, column = loop.index
            columns = [part * size + column * width for part in range(parts)]
            first = _aligned(begin[tile])

            def accumulate(*totals):
                def step(_, left, *rights):
                    for total, right in zip(totals, rights, strict=True):
                        right = plgpu.transpose_ref(right, (1, 0)) if transposed else right
                        plgpu.wgmma(total, left, right)
                    plgpu.wgmma_wait(parts)

                specs = [_spec((height, UNIT), lambda i: (first, i * UNIT))]
                for at in columns:
                    if transposed:
                        specs.append(_spec((width, UNIT), lambda i, at=at: (at, i * UNIT)))
                    else:
                        specs.append(_spec((UNIT, width), lambda i, at=at: (i * UNIT, at)))
                matrices = [weight.at[group[tile]]] * parts
                _pipeline(step, rows.shape[1] // UNIT, specs)(rows, *matrices)
                return [total[...] for total in totals]

            products = pl.run_scoped(accumulate, *[plgpu.ACC((height, width))] * parts)
            results = finish(*products)
            _write([tile for tiles in results for tile in tiles], buffers)
            places = [
                (output, at)
                for output, tiles in zip(outputs, results, strict=True)
                for at in columns[: len(tiles)]
            ]
            _store_rows(buffers, places, first, start[tile], stop[tile])

    results = [
        jax.ShapeDtypeStruct((rows.shape[0], count * size), dtype) for count, dtype in outputs
    ]
    buffers = [
        plgpu.SMEM((height, width), dtype) for count, dtype in outputs for _ in range(count)
    ]
    results = _run(kernel, results, buffers, num_cores)(*tiles, rows, weight)
    return [result[:num_rows] for result in results]


def _plan(group_sizes: Int[Array, " groups"], num_rows: int, height: int) -> _Tiles:
    """Tiles of `height` rows. The window of a group's first tile begins at an aligned row, and the
    other ones follow."""
    groups = group_sizes.shape[0]
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = stops - group_sizes
    origins = starts // _ALIGNMENT * _ALIGNMENT
    counts = jnp.where(group_sizes > 0, -(-(stops - origins) // height), 0)
    most = (num_rows + (_ALIGNMENT - 1) * groups) // height + groups
    group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), counts, total_repeat_length=most)
    tile_stops = jnp.cumsum(counts, dtype=jnp.int32)
    within = jnp.arange(most, dtype=jnp.int32) - (tile_stops - counts)[group]
    window = origins[group] + within * height
    start = jnp.maximum(starts[group], window)
    stop = jnp.minimum(stops[group], window + height)
    return _Tiles(tile_stops[-1:], group, jnp.minimum(window, num_rows - height), start, stop)


def _padded(rows, least: int):
    """`rows` with rows of nobody at the end, so that a window fits everywhere."""
    num_rows = rows.shape[0]
    missing = max(-(-num_rows // _ALIGNMENT) * _ALIGNMENT, least) - num_rows
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _tile(size: int) -> int:
    """The widest tile that divides `size`, a multiple of the unit."""
    return 2 * UNIT if size % (2 * UNIT) == 0 else UNIT


def _aligned(row):
    return pl.multiple_of(row, _ALIGNMENT)


def _spec(shape, corner):
    """Windows of `shape` at `corner(i)`. Their memory is free one step after their product has
    begun."""
    return plgpu.BlockSpec(tuple(map(pl.Element, shape)), corner, delay_release=1)


def _pipeline(step, num_steps, specs):
    """`step` for the windows of one step after the other, while the next ones are loaded."""
    return plgpu.emit_pipeline(
        step, grid=(num_steps,), in_specs=specs, max_concurrent_steps=_STEPS
    )


def _clear_neighbours(window, begin, start, stop):
    """The rows of `window` outside of `start` to `stop` 0: a select, because 0 * NaN is NaN."""
    row = begin + jax.lax.broadcasted_iota(jnp.int32, window.shape, 0)
    live = (row >= start) & (row < stop)
    window[...] = jnp.where(live, window[...], jnp.zeros((), window.dtype))


def _write(tiles, buffers):
    """`tiles` to `buffers`, as soon as the copies of what they held have left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for tile, buffer in zip(tiles, buffers, strict=True):
        buffer[...] = tile.astype(buffer.dtype)
    plgpu.commit_smem()


def _store_rows(buffers, places, begin, start, stop):
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


def _run(kernel, output, buffers, num_cores: int):
    """`kernel` on every core, with `buffers` in its own memory."""

    def body(*references):
        kernel(*references)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        body,
        out_type=output,
        scratch_types=buffers,
        grid=(num_cores,),
        grid_names=("core",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )

"""The programs of `Mosaic()` for a core of a Hopper GPU. Importing this file imports Pallas.

Every core walks over tiles of the results. Tables made outside of the kernels say which rows a
tile has, so that no core searches through the groups. The window of a tile may reach into its
neighbours: their rows are loaded, and never stored or summed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .elementwise import inlined
from .mosaic_tiles import (
    ALIGNMENT,
    UNIT,
    aligned,
    clear_neighbours,
    padded,
    pipeline,
    plan_tiles,
    run,
    store_rows,
    tile_width,
    window,
    write,
)


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
        return [[inlined(activation)(*before)], *([before] if saving else [])]

    outputs = [(1, up.dtype), *([(parts, jnp.float32)] if saving else [])]
    operands = (rows, up, group_sizes)
    return _by_tiles(finish, outputs, operands, transposed=True, parts=parts, num_cores=num_cores)


def outer(left, right, group_sizes, *, out_dtype, num_cores: int):
    """For each group `left^T right` over its rows: `(groups, a, b)`."""
    left, right = padded(left, UNIT), padded(right, UNIT)
    num_rows, groups = left.shape[0], group_sizes.shape[0]
    shape = (groups, left.shape[1], right.shape[1])
    height, width = tile_width(shape[1]), tile_width(shape[2])
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)

    def kernel(start, stop, left, right, output, buffer):
        @plgpu.nd_loop((groups, shape[1] // height, shape[2] // width), collective_axes="core")
        def _(loop):
            group, row, column = loop.index
            first, last = start[group], stop[group]
            origin = first // ALIGNMENT * ALIGNMENT
            num_blocks = jnp.where(last > first, pl.cdiv(last - origin, UNIT), 0)

            def begin(i):
                return aligned(jnp.minimum(origin + i * UNIT, num_rows - UNIT))

            def accumulate(total):
                def step(index, left, right):
                    (i,) = index
                    start = jnp.maximum(first, origin + i * UNIT)
                    stop = jnp.minimum(last, origin + (i + 1) * UNIT)

                    @pl.when(stop - start < UNIT)
                    def _():
                        clear_neighbours(left, begin(i), start, stop)
                        clear_neighbours(right, begin(i), start, stop)
                        plgpu.commit_smem()

                    plgpu.wgmma(total, left.T, right)
                    plgpu.wgmma_wait(1)

                corners = (lambda i: (begin(i), row * height), lambda i: (begin(i), column * width))
                specs = (window((UNIT, height), corners[0]), window((UNIT, width), corners[1]))
                pipeline(step, num_blocks, specs)(left, right)
                return total[...]

            product = pl.run_scoped(accumulate, plgpu.ACC((height, width)))
            write([product], [buffer])
            place = (group, pl.ds(row * height, height), pl.ds(column * width, width))
            plgpu.copy_smem_to_gmem(buffer, output.at[place])

    output = jax.ShapeDtypeStruct(shape, out_dtype)
    buffers = [plgpu.SMEM((height, width), out_dtype)]
    return run(kernel, output, buffers, num_cores, stops - group_sizes, stops, left, right)


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
    width = UNIT if parts > 1 else tile_width(size)
    rows = padded(rows, height)
    tiles = plan_tiles(group_sizes, rows.shape[0], height)
    num_outputs = len(outputs)

    def kernel(count, group, begin, start, stop, rows, weight, *references):
        outputs, buffers = references[:num_outputs], references[num_outputs:]

        @plgpu.nd_loop((count[0], size // width), collective_axes="core")
        def _(loop):
            tile, column = loop.index
            columns = [part * size + column * width for part in range(parts)]
            first = aligned(begin[tile])

            def accumulate(*totals):
                def step(_, left, *rights):
                    for total, right in zip(totals, rights, strict=True):
                        right = right.T if transposed else right
                        plgpu.wgmma(total, left, right)
                    plgpu.wgmma_wait(parts)

                specs = [window((height, UNIT), lambda i: (first, i * UNIT))]
                for at in columns:
                    if transposed:
                        specs.append(window((width, UNIT), lambda i, at=at: (at, i * UNIT)))
                    else:
                        specs.append(window((UNIT, width), lambda i, at=at: (i * UNIT, at)))
                matrices = [weight.at[group[tile]]] * parts
                pipeline(step, rows.shape[1] // UNIT, specs)(rows, *matrices)
                return [total[...] for total in totals]

            products = pl.run_scoped(accumulate, *[plgpu.ACC((height, width))] * parts)
            results = finish(*products)
            write([tile for tiles in results for tile in tiles], buffers)
            places = [
                (output, at)
                for output, tiles in zip(outputs, results, strict=True)
                for at in columns[: len(tiles)]
            ]
            store_rows(buffers, places, first, start[tile], stop[tile])

    results = [
        jax.ShapeDtypeStruct((rows.shape[0], count * size), dtype) for count, dtype in outputs
    ]
    buffers = [plgpu.SMEM((height, width), dtype) for count, dtype in outputs for _ in range(count)]
    results = run(kernel, results, buffers, num_cores, *tiles, rows, weight)
    return [result[:num_rows] for result in results]

"""The feed-forward network of a block of rows at a time: both products while it is in cache.

Nothing of intermediate width outlives its block, but for the pre-activations that a backward pass
needs. On a CPU much of the time goes into touching fresh memory, so that what is not allocated is
what is saved.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .blocks import at_smallest_size, block_sizes, live_rows, of_group, plan_blocks, window
from .feed_forward import Activation, FeedForwardKernels
from .few_rows import forward_few_rows, tile_size
from .grouped_matmul import accumulation_dtype
from .single_rows import are_single_rows, forward_single_rows


def _dot(a, b, contract_a, contract_b):
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())))


def _place(block, largest, offset):
    """`block` among the rows of the largest window, the others zero."""
    if block.shape[0] == largest:
        return block
    padded = jnp.zeros((largest, block.shape[1]), block.dtype)
    return jax.lax.dynamic_update_slice_in_dim(padded, block, offset, 0)


def _write(array, block, begin, live):
    """Only the block's own rows: its window reaches into its neighbours'."""
    previous = jax.lax.dynamic_slice_in_dim(array, begin, block.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(array, jnp.where(live, block, previous), begin, 0)


def _owned(rows, group_sizes):
    """Rows of no group are zero."""
    return jnp.where((jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None], rows, 0)


def _forward(
    rows: Float[Array, "rows hidden"],
    up: Float[Array, "groups up hidden"],
    down: Float[Array, "groups intermediate hidden"],
    group_sizes: Int[Array, " groups"],
    activation: Activation,
    *,
    save: bool,
):
    num_rows = rows.shape[0]
    dtype = accumulation_dtype(rows, up, down)
    if save:
        # Like the rows: inside `jax.shard_map` a loop's carry has to vary over the mesh as they do.
        outputs = tuple(
            jax.lax.full_like(rows, 0, dtype, (num_rows, size))
            for size in (down.shape[2], up.shape[1])
        )
    else:
        # Nobody needs the rows any more: a block's are replaced by what comes of them, in place.
        outputs = (_owned(rows, group_sizes).astype(dtype),)
    if num_rows > 0:
        sizes = block_sizes(num_rows, up.shape[0])
        blocks = plan_blocks(group_sizes, num_rows, sizes[-1])

        def step(i, outputs):
            start, stop, group = blocks.start[i], blocks.stop[i], blocks.group[i]
            matrix_up, matrix_down = (of_group(stack, group, dtype) for stack in (up, down))
            first_row = jnp.minimum(start, num_rows - sizes[-1])

            def compute(size):
                block, begin = window(rows if save else outputs[0], start, size, dtype)
                before = _dot(block, matrix_up, 1, 1)
                activations = activation(before)
                results = (_dot(activations, matrix_down, 1, 0), before)[: len(outputs)]
                return tuple(_place(result, sizes[-1], begin - first_row) for result in results)

            results = at_smallest_size(sizes, stop - start, compute)
            live = live_rows(first_row, sizes[-1], start, stop)
            return tuple(
                _write(output, result, first_row, live)
                for output, result in zip(outputs, results, strict=True)
            )

        outputs = jax.lax.fori_loop(0, blocks.count, step, outputs)
    return outputs if save else outputs[0]


def _backward(
    rows: Float[Array, "rows hidden"],
    up: Float[Array, "groups up hidden"],
    down: Float[Array, "groups intermediate hidden"],
    group_sizes: Int[Array, " groups"],
    before: Float[Array, "rows up"],
    cotangent: Float[Array, "rows hidden"],
    activation: Activation,
    sums: tuple[Array, Array] | None = None,
):
    num_rows = rows.shape[0]
    dtype = accumulation_dtype(rows, up, down)
    narrow = jnp.result_type(rows, up)
    # A block's cotangent is replaced by what comes of it, in place.
    outputs = (_owned(cotangent, group_sizes).astype(dtype),)
    if sums is None:
        outputs += tuple(jax.lax.full_like(rows, 0, dtype, stack.shape) for stack in (up, down))
    else:
        outputs += tuple(total.astype(dtype) for total in sums)
    if num_rows == 0:
        return outputs
    sizes = block_sizes(num_rows, up.shape[0])
    blocks = plan_blocks(group_sizes, num_rows, sizes[-1])

    def step(i, outputs):
        start, stop, group = blocks.start[i], blocks.stop[i], blocks.group[i]
        matrix_up, matrix_down = (of_group(stack, group, dtype) for stack in (up, down))
        first_row = jnp.minimum(start, num_rows - sizes[-1])

        def compute(size):
            begin = jnp.minimum(start, num_rows - size)
            live = live_rows(begin, size, start, stop)
            # All are cleared of their neighbours' rows: 0 * NaN is NaN.
            block, pre, back = (
                jnp.where(live, window(array, start, size, array.dtype)[0], 0)
                for array in (rows, before, outputs[0])
            )
            block = block.astype(dtype)
            activations, pullback = jax.vjp(activation, pre)
            (inner,) = pullback(_dot(back, matrix_down, 1, 1))
            inner = inner.astype(narrow).astype(dtype)
            return (
                _place(_dot(inner, matrix_up, 1, 0), sizes[-1], begin - first_row),
                _dot(inner, block, 0, 0),
                _dot(activations, back, 0, 0),
            )

        back, *products = at_smallest_size(sizes, stop - start, compute)
        live = live_rows(first_row, sizes[-1], start, stop)
        written = [_write(outputs[0], back, first_row, live)]
        for output, product in zip(outputs[1:], products, strict=True):
            previous = jax.lax.dynamic_index_in_dim(output, group, keepdims=False)
            # A first block replaces the zeros, unless it adds to what was there before.
            replaces = blocks.first[i] if sums is None else False
            product = jnp.where(replaces, product, previous + product)
            written.append(jax.lax.dynamic_update_index_in_dim(output, product, group, 0))
        return tuple(written)

    return jax.lax.fori_loop(0, blocks.count, step, outputs)


def _infer(
    rows: Float[Array, "rows hidden"],
    up: Float[Array, "groups up hidden"],
    down: Float[Array, "groups intermediate hidden"],
    group_sizes: Int[Array, " groups"],
    activation: Activation,
):
    if are_single_rows(rows.shape[0], up.shape[0]):
        return forward_single_rows(rows, up, down, group_sizes, activation)
    size = tile_size(rows.shape[0], up.shape[0])
    if size is None:
        return _forward(rows, up, down, group_sizes, activation, save=False)
    return forward_few_rows(rows, up, down, group_sizes, activation, size)


FEED_FORWARD = FeedForwardKernels(
    jax.jit(_infer, static_argnums=4),
    jax.jit(partial(_forward, save=True), static_argnums=4),
    jax.jit(_backward, static_argnums=6),
)

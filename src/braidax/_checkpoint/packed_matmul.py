"""Grouped matrix product with weights in 4 or 8 bits, decoded expert by expert.

Linear in the rows, and the transpose of the product with a matrix is the product with its
transpose: a `custom_vjp` that calls itself closes it under reverse mode. As in
`_experts.grouped_matmul`, `custom_vmap` sits inside and sorts the rows of all examples together.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from .._matmul import accumulation_dtype
from .._matmul.mapped import mapped_multiply as vmappable_multiply
from .dtypes import FLOAT4

_BLOCK_SIZES = (8, 64, 256)  # rows that are multiplied at once: the smallest that holds them


class PackedMatrices(eqx.Module):
    """A matrix (size_out, size_in) for each expert, in 4 or 8 bits, with scales.

    All arrays are integers, so no gradient, optimizer or cast of floating-point parameters
    touches them.

    - `payload`: uint8, the bytes of the numbers; of two FP4 numbers the first is the low half.
    - `scale`: one for each row and group of columns: E8M0 as uint8, or float32 bits as uint32.
    - `number`: the dtype of the numbers, such as `"float4_e2m1fn"` or `"float8_e4m3fn"`.
    - `block`: the rows and columns that share a scale. Rows are repeated here, columns are not.
    """

    payload: UInt[Array, "experts size_out bytes"]
    scale: UInt[Array, "experts size_out scales"]
    number: str = eqx.field(static=True)
    block: tuple[int, int] = eqx.field(static=True)

    @property
    def size_in(self) -> int:
        """Numbers in a row."""
        return self.payload.shape[-1] * (2 if self.number == FLOAT4.name else 1)

    def decode(self, expert: Int[Array, ""]) -> Float[Array, "size_out size_in"]:
        """The matrix of one expert in float32. Numbers below 2**-126 may be flushed to zero."""
        payload, scale = (
            jax.lax.dynamic_index_in_dim(array, expert, keepdims=False)
            for array in (self.payload, self.scale)
        )
        numbers = jax.lax.bitcast_convert_type(payload, jnp.dtype(self.number))
        numbers = numbers.reshape(payload.shape[0], -1).astype(jnp.float32)
        stored = jnp.float8_e8m0fnu if scale.dtype == jnp.uint8 else jnp.float32
        scale = jax.lax.bitcast_convert_type(scale, stored).astype(jnp.float32)
        return numbers * jnp.repeat(scale, self.block[1], axis=1)[:, : numbers.shape[1]]


def packed_matmul(
    rows: Float[Array, "rows size_in"],
    matrices: PackedMatrices,
    group_sizes: Int[Array, " experts"],
) -> Float[Array, "rows size_out"]:
    """Every row times the transpose of the matrix of its group, in float32 or wider.

    Rows past the groups give 0. Only experts with rows are decoded.
    """
    return _product(rows, matrices, group_sizes, True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows, matrices, group_sizes, transposed):
    return _KERNELS[transposed](rows, matrices, group_sizes)


def _product_forward(rows, matrices, group_sizes, transposed):
    return _product(rows, matrices, group_sizes, transposed), (rows[:0], matrices, group_sizes)


def _product_backward(transposed, residuals, cotangent):
    no_rows, matrices, group_sizes = residuals
    rows = _product(cotangent, matrices, group_sizes, not transposed)
    return rows.astype(no_rows.dtype), None, None


_product.defvjp(_product_forward, _product_backward)


def _multiply(
    transposed: bool,
    rows: Float[Array, "rows size_in"],
    matrices: PackedMatrices,
    group_sizes: Int[Array, " experts"],
) -> Float[Array, "rows size_out"]:
    num_rows = rows.shape[0]
    size_out = jax.eval_shape(matrices.decode, 0).shape[0 if transposed else 1]
    dtype = accumulation_dtype(rows)
    # Like the rows: inside `jax.shard_map` a loop's carry has to vary over the mesh as they do.
    output = jax.lax.full_like(rows, 0, dtype, (num_rows, size_out))
    if num_rows == 0:
        return output
    sizes = sorted({min(size, num_rows) for size in _BLOCK_SIZES})
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    used = jnp.argsort(group_sizes == 0, stable=True)
    contraction = (((1,), (1 if transposed else 0,)), ((), ()))

    def one_expert(i, output):
        expert = used[i]
        stop, count = stops[expert], group_sizes[expert].astype(jnp.int32)
        matrix = matrices.decode(expert).astype(dtype)

        def at_size(size, output):
            def block(j, output):
                start = stop - count + j * size
                # Moved back where the rows would end too soon; only the block's own are written.
                begin = jnp.minimum(start, num_rows - size)
                row = begin + jnp.arange(size, dtype=jnp.int32)
                live = (row >= start) & (row < stop)
                window = jax.lax.dynamic_slice_in_dim(rows, begin, size).astype(dtype)
                product = jax.lax.dot_general(window, matrix, contraction)
                previous = jax.lax.dynamic_slice_in_dim(output, begin, size)
                product = jnp.where(live[:, None], product, previous)
                return jax.lax.dynamic_update_slice_in_dim(output, product, begin, 0)

            return jax.lax.fori_loop(0, -(-count // size), block, output)

        branch = jnp.minimum(jnp.searchsorted(jnp.asarray(sizes), count), len(sizes) - 1)
        return jax.lax.switch(branch, [partial(at_size, size) for size in sizes], output)

    return jax.lax.fori_loop(0, (group_sizes > 0).sum(), one_expert, output)


_KERNELS = {
    transposed: vmappable_multiply(jax.jit(partial(_multiply, transposed)))
    for transposed in (False, True)
}

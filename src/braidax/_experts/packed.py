"""Matrices that stay in 4 or 8 bits, and are read as if they were arrays."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, UInt

_FLOAT4 = "float4_e2m1fn"


class PackedMatrices(eqx.Module):
    """A matrix for each group, in 4 or 8 bits with scales: it stands in for an array of `Experts`.

    A kernel decodes a group's matrix when it has rows. All arrays are integers, so no gradient,
    optimizer or cast of floating-point parameters touches them.

    - `payload`: the bytes of the numbers; of two FP4 numbers the first is the low half.
    - `scale`: one for each row and group of columns: E8M0 as uint8, or float32 bits as uint32.
    - `number`: the dtype of the numbers, such as `"float4_e2m1fn"` or `"float8_e4m3fn"`.
    - `block`: the rows and columns that share a scale. Rows are repeated here, columns are not.
    - `parts`: a matrix is so many of equal size, one after the other, and `shape` has an axis for
      them; `None` is no such axis.
    - `transposed`: whether the matrices are read as their transposes.
    """

    payload: UInt[Array, "groups size_out bytes"]
    scale: UInt[Array, "groups size_out scales"]
    number: str = eqx.field(static=True)
    block: tuple[int, int] = eqx.field(static=True)
    parts: int | None = eqx.field(static=True, default=None)
    transposed: bool = eqx.field(static=True, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        *groups, rows, columns = self.payload.shape
        columns *= 2 if self.number == _FLOAT4 else 1
        if self.parts is not None:
            groups, rows = [*groups, self.parts], rows // self.parts
        return (*groups, columns, rows) if self.transposed else (*groups, rows, columns)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that holds what is decoded."""
        return jnp.dtype(jnp.float32)

    def merged(self) -> "PackedMatrices":
        """The same without an axis for the parts: (groups, parts * rows, columns)."""
        return dataclasses.replace(self, parts=None)

    def of_group(self, group: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "a b"]:
        """The matrix of one group in `dtype`. Numbers below 2**-126 may be flushed to zero."""
        payload, scale = (
            jax.lax.dynamic_index_in_dim(array, group, keepdims=False)
            for array in (self.payload, self.scale)
        )
        numbers = jax.lax.bitcast_convert_type(payload, jnp.dtype(self.number))
        numbers = numbers.reshape(payload.shape[0], -1).astype(jnp.float32)
        stored = jnp.float8_e8m0fnu if scale.dtype == jnp.uint8 else jnp.float32
        scale = jax.lax.bitcast_convert_type(scale, stored).astype(jnp.float32)
        matrix = numbers * jnp.repeat(scale, self.block[1], axis=1)[:, : numbers.shape[1]]
        return (matrix.T if self.transposed else matrix).astype(dtype)

"""Stored matrices as stacks in memory: decoded to floating point, or packed as they are stored."""

import mmap

import jax
import numpy as np
from jaxtyping import Float

from .._experts.packed import PackedMatrices
from .dtypes import DTYPES, FLOAT4
from .errors import mistake
from .layer import Stack
from .stored_matrix import StoredMatrix


def decoded_stack(
    stack: Stack, dtype: np.dtype, *, transposed: bool
) -> Float[np.ndarray, "experts a b"]:
    """The matrices in `dtype`, (size_out, size_in) or `transposed`, without a second copy."""
    rows, columns = sum(part.shape[0] for part in stack[0]), stack[0][0].shape[1]
    shape = (columns, rows) if transposed else (rows, columns)
    array = _aligned_empty((len(stack), *shape), dtype)
    for parts, matrix in zip(stack, np.swapaxes(array, 1, 2) if transposed else array, strict=True):
        start = 0
        for part in parts:
            for strip, numbers in part.decoded(dtype):
                matrix[start + strip.start : start + strip.stop] = numbers
            start += part.shape[0]
    return array


def packed_stack(stack: Stack, *, parts: int | None, transposed: bool) -> PackedMatrices:
    """The matrices as they are stored: bytes copied, nothing decoded. `parts` and `transposed` are
    those of `PackedMatrices`.

    **Raises:** `ValueError` if the matrices are floating point, not all of one kind, or if two
    parts share a scale.
    """
    first = stack[0][0]
    _check_kinds(first, stack)
    assert first.block is not None  # `_check_kinds` has refused a matrix without scales.
    rows = sum(part.shape[0] for part in stack[0])
    size = rows // (parts or 1)
    if len(stack[0]) < (parts or 1) and size % first.block[0]:
        must = f"have blocks of {first.block[0]} rows that gate and up do not share"
        found = f"an intermediate size of {size}"
        raise mistake(first.path, first.names.weight, must, found)
    payload, scale = (
        _aligned_empty((len(stack), rows, array.shape[1]), array.dtype) for array in _packed(first)
    )
    for members, *matrix in zip(stack, payload, scale, strict=True):
        start = 0
        for part in members:
            for array, own in zip(matrix, _packed(part), strict=True):
                array[start : start + len(own)] = own
            start += part.shape[0]
    number = FLOAT4 if first.format == "fp4" else DTYPES[first.format]
    arrays = (jax.device_put(payload), jax.device_put(scale))
    return PackedMatrices(*arrays, number.name, first.block, parts, transposed)


def _packed(matrix: StoredMatrix) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of every row, and its scales: uint8 exponents, or the bits of float32."""
    scale, block, num_rows = matrix.scale(), matrix.block, matrix.shape[0]
    assert scale is not None and block is not None
    scale = scale.view(np.uint32) if scale.dtype == np.float32 else scale
    scale = np.repeat(scale, min(block[0], num_rows), axis=0)[:num_rows]
    return matrix.payload().view(np.uint8), scale


def _check_kinds(first: StoredMatrix, stack: Stack) -> None:
    if first.format == "float" or first.block is None:
        must = 'be FP4 or FP8 with scales, for `dtype="packed"`'
        raise mistake(first.path, first.names.weight, must, "floating point")
    for matrix in (part for parts in stack for part in parts):
        if _kind(matrix) != _kind(first):
            must = f'be stored as {first.names.weight} is, for `dtype="packed"`: {_kind(first)}'
            raise mistake(matrix.path, matrix.names.weight, must, _kind(matrix))


def _kind(matrix: StoredMatrix) -> tuple[str, tuple[int, int] | None, bool]:
    scale = matrix.names.scale
    is_float = scale is not None and matrix.tensors.entry(scale).dtype == "F32"
    return matrix.format, matrix.block, is_float


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory at the start of a page.

    `jax.device_put` on a CPU takes aligned arrays over. It copies others, which would need their
    memory twice."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    pages = mmap.mmap(-1, max(count * dtype.itemsize, 1))
    return np.frombuffer(pages, dtype, count).reshape(shape)

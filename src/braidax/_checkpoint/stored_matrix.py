"""A weight as it lies in a file: its dtype and geometry say what it is.

The configuration is never asked. A `config.json` often keeps the dtype from before a checkpoint
was saved anew, and it never states the dtype of the scales.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .dequantize import FP4_GROUP, decode_blocks, decode_fp4
from .dtypes import PACKED
from .errors import mistake
from .index import StoredTensors

BLOCKS = ((128, 128), (32, 32), (1, 32))  # V3 and V4, V4.1, MXFP8
FLOATS = ("F64", "F32", "F16", "BF16")
FP4_TYPES = ("I8", "U8", PACKED)
_KNOWN = (*FLOATS, "F8_E4M3", "F8_E5M2", *FP4_TYPES)
_SCALES = ("F8_E8M0", "U8", "F32")
_E8M0_NAN = 255
_SMALLEST_RANGE = 1e38  # of the dtypes that hold whatever was stored: not of float16
STRIP = 128  # rows decoded at once: a multiple of every block's, and they stay in the cache


class MatrixNames(NamedTuple):
    """The tensor of a matrix and, if it has one, that of its scales."""

    weight: str
    scale: str | None


class StoredMatrix(NamedTuple):
    """One matrix (size_out, size_in) in a checkpoint, or a stack of them.

    `shape` counts numbers, not bytes. `format` is `"float"`, `"fp4"`, or the file's name of an
    8-bit type. `block` is the rows and columns that share a scale, None without scales. `index`
    is the place of one matrix in its stack. Only a single matrix can be read.
    """

    tensors: StoredTensors
    names: MatrixNames
    format: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    index: int | None = None

    @property
    def path(self) -> pathlib.Path:
        """The file that holds the weight."""
        return self.tensors.where(self.names.weight)

    def of_stack(self, index: int) -> "StoredMatrix":
        """One matrix of a stack."""
        return self._replace(shape=self.shape[1:], index=index)

    def payload(self) -> np.ndarray:
        """The weight as stored, memory-mapped: packed FP4 as bytes, (size_out, size_in / 2)."""
        rows, columns = self.shape
        if self.format == "fp4":
            array, columns = self.tensors.raw(self.names.weight), columns // 2
        else:
            array = self.tensors.read(self.names.weight)
        return array.reshape(-1, rows, columns)[self.index or 0]

    def scale(self) -> np.ndarray | None:
        """The scales, E8M0 as their raw bytes.

        **Raises:** `ValueError` for a scale that is not a number."""
        name = self.names.scale
        if name is None:
            return None
        array = self.tensors.read(name)
        array = array if self.index is None else array[self.index]
        if array.dtype == np.float32:
            if not np.isfinite(array).all():
                raise mistake(self.tensors.where(name), name, "be finite", "NaN or infinity")
            return array
        array = array.view(np.uint8)
        if (array == _E8M0_NAN).any():
            place = [int(axis) for axis in np.argwhere(array == _E8M0_NAN)[0]]
            found = f"byte 255, NaN, at {place}"
            raise mistake(self.tensors.where(name), name, "hold E8M0 bytes up to 254", found)
        return array

    def decoded(self, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
        """The numbers in `dtype`, some rows at a time: which rows, and their numbers.

        **Raises:** `ValueError` for numbers that `dtype` cannot hold. A dtype as wide as float32
        holds all, except stored numbers that become infinite in it."""
        payload, scale = self.payload(), self.scale()
        narrow = float(jnp.finfo(dtype).max) < _SMALLEST_RANGE
        narrow |= payload.dtype == np.float64 and np.dtype(dtype) != np.float64
        for start in range(0, payload.shape[0], STRIP):
            rows = slice(start, min(start + STRIP, payload.shape[0]))
            numbers = self._decoded_rows(payload, scale, rows, dtype)
            if narrow and np.isinf(numbers).any():
                found = f"numbers beyond {float(jnp.finfo(dtype).max):g}"
                raise mistake(self.path, self.names.weight, f"fit {dtype}", found)
            yield rows, numbers

    def _decoded_rows(
        self, payload: np.ndarray, scale: np.ndarray | None, rows: slice, dtype: np.dtype
    ) -> np.ndarray:
        if scale is None or self.block is None:
            with np.errstate(over="ignore"):
                return payload[rows].astype(dtype)
        height = self.block[0]
        scale = scale[rows.start // height : -(-rows.stop // height)]
        if self.format == "fp4":
            return decode_fp4(payload[rows], scale, dtype)
        return decode_blocks(payload[rows], scale, self.block, dtype)


def stored_matrix(
    tensors: StoredTensors, names: MatrixNames, shape: tuple[int, ...]
) -> StoredMatrix:
    """The matrix called `names`, which must have the configuration's `shape` in numbers.

    **Raises:** `ValueError` naming file and tensor: another shape, a missing scale, a payload or
    scale of another kind than the library decodes, scales that do not tile the matrix.
    """
    path, entry = tensors.where(names.weight), tensors.entry(names.weight)
    kind, found = entry.dtype, entry.shape
    if kind not in _KNOWN:
        raise mistake(path, names.weight, f"have a dtype among {', '.join(_KNOWN)}", kind)
    if kind in FP4_TYPES and kind != PACKED and found:
        found = (*found[:-1], 2 * found[-1])
    if found != shape:
        got = f"{found}, {kind} {list(entry.shape)} in the file"
        raise mistake(path, names.weight, f"have the configuration's shape {shape}", got)
    if names.scale is None:
        if kind not in FLOATS:
            raise mistake(path, names.weight, "have a scale beside it", f"{kind} and no scale")
        return StoredMatrix(tensors, names, "float", shape, None)
    name = "fp4" if kind in FP4_TYPES else "float" if kind in FLOATS else kind
    block = _block(tensors, names.weight, names.scale, name, shape)
    return StoredMatrix(tensors, names, name, shape, block)


def _block(
    tensors: StoredTensors, weight: str, scale: str, name: str, shape: tuple[int, ...]
) -> tuple[int, int]:
    """The rows and columns that share a scale, from the shapes of weight and scale."""
    path, entry = tensors.where(scale), tensors.entry(scale)
    if entry.dtype not in _SCALES:
        raise mistake(path, scale, f"have a dtype among {', '.join(_SCALES)}", entry.dtype)
    if name == "fp4" and shape[-1] % FP4_GROUP:
        must = f"have a last axis of whole groups of {FP4_GROUP}"
        raise mistake(tensors.where(weight), weight, must, shape)
    blocks = ((1, FP4_GROUP),) if name == "fp4" else BLOCKS
    grids = {block: grid(shape, block) for block in blocks}
    for block, wanted in grids.items():
        if entry.shape == wanted:
            return block
    wanted = " or ".join(
        f"{shape} for {rows}x{columns}" for (rows, columns), shape in grids.items()
    )
    raise mistake(path, scale, f"have shape {wanted}", entry.shape)


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of `shape`, one for each block, the last blocks cut off."""
    *lead, size_out, size_in = shape
    return (*lead, -(-size_out // block[0]), -(-size_in // block[1]))

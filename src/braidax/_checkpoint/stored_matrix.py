"""A weight as it lies in a file: what it is, told from its dtype and geometry alone.

The configuration is never asked: it lies about dtypes in files that were saved anew, and says
nothing about those of scales.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .dequantise import FP4_GROUP, decode_blocks, decode_fp4
from .dtypes import PACKED
from .errors import mistake
from .index import Checkpoint
from .names import MatrixNames

BLOCKS = ((128, 128), (32, 32), (1, 32))  # V3 and V4, V4.1, MXFP8
FLOATS = ("F64", "F32", "F16", "BF16")
_SCALES = ("F8_E8M0", "U8", "F32")
_BYTES = ("F8_E4M3", "F8_E5M2")
FP4_TYPES = ("I8", "U8", PACKED)
_E8M0_NAN = 255
_SMALLEST_RANGE = 1e38  # of the dtypes that hold whatever was stored: not of float16
STRIP = 128  # rows decoded at once: a multiple of every block's, and they stay in the cache


class StoredMatrix(NamedTuple):
    """One matrix (size_out, size_in), or a stack of them, in a checkpoint.

    `shape` counts numbers, not bytes. `format` is `"float"`, `"fp4"`, or the file's name of an
    8-bit type; `block` the rows and columns that share a scale, None without scales.
    """

    checkpoint: Checkpoint
    names: MatrixNames
    format: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None

    @property
    def path(self) -> pathlib.Path:
        """The file that holds the weight."""
        return self.checkpoint.where(self.names.weight)

    def payload(self, expert: int | None = None) -> np.ndarray:
        """The weight as stored, memory-mapped: packed FP4 as bytes, (..., size_in / 2). `expert`
        picks one of a stack."""
        checkpoint, name = self.checkpoint, self.names.weight
        if self.format != "fp4":
            array = checkpoint.read(name)
        else:
            array = checkpoint.raw(name).reshape(*self.shape[:-1], self.shape[-1] // 2)
        return array if expert is None else array[expert]

    def scale(self, expert: int | None = None) -> np.ndarray | None:
        """The scales, E8M0 as their raw bytes.

        **Raises:** `ValueError` for one that is not a number."""
        name = self.names.scale
        if name is None:
            return None
        array = self.checkpoint.read(name)
        array = array if expert is None else array[expert]
        if array.dtype == np.float32:
            if not np.isfinite(array).all():
                raise mistake(self.checkpoint.where(name), name, "be finite", "NaN or infinity")
            return array
        array = array.view(np.uint8)
        if (array == _E8M0_NAN).any():
            place = [int(axis) for axis in np.argwhere(array == _E8M0_NAN)[0]]
            found = f"byte 255, NaN, at {place}"
            raise mistake(self.checkpoint.where(name), name, "hold E8M0 bytes up to 254", found)
        return array

    def decoded(
        self, dtype: np.dtype, expert: int | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The numbers in `dtype`, some rows at a time: which rows, and those (rows, size_in).

        **Raises:** `ValueError` for numbers that `dtype` cannot hold: those of a narrower one than
        float32, and stored ones that become infinite."""
        payload, scale = self.payload(expert), self.scale(expert)
        narrow = float(jnp.finfo(dtype).max) < _SMALLEST_RANGE
        narrow |= payload.dtype == np.float64 and np.dtype(dtype) != np.float64
        for start in range(0, payload.shape[-2], STRIP):
            rows = slice(start, min(start + STRIP, payload.shape[-2]))
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
    checkpoint: Checkpoint, names: MatrixNames, shape: tuple[int | None, ...]
) -> StoredMatrix:
    """The matrix called `names`, which must have `shape` in numbers; None matches any size.

    **Raises:** `ValueError` naming file and tensor: another shape, a missing scale, a payload or
    scale of another kind than the library decodes, scales that do not tile the matrix.
    """
    path, entry = checkpoint.where(names.weight), checkpoint.entry(names.weight)
    kind, found = entry.dtype, entry.shape
    is_fp4 = kind in FP4_TYPES
    if is_fp4 and kind != PACKED and found:
        found = (*found[:-1], 2 * found[-1])
    known = (*FLOATS, *_BYTES, *FP4_TYPES)
    if kind not in known:
        raise mistake(path, names.weight, f"have a dtype among {', '.join(known)}", kind)
    fits = len(found) == len(shape)
    if not fits or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        got = f"({', '.join(map(str, found))}), {kind} {list(entry.shape)} in the file"
        raise mistake(path, names.weight, f"have shape ({wanted})", got)
    if names.scale is None:
        if kind not in FLOATS:
            raise mistake(path, names.weight, "have a scale beside it", f"{kind} and no scale")
        return StoredMatrix(checkpoint, names, "float", found, None)
    name = "fp4" if is_fp4 else "float" if kind in FLOATS else kind
    block = _block(checkpoint, names.weight, names.scale, name, found)
    return StoredMatrix(checkpoint, names, name, found, block)


def _block(
    checkpoint: Checkpoint, weight: str, scale: str, name: str, shape: tuple[int, ...]
) -> tuple[int, int]:
    """The rows and columns that share a scale, from the shapes of both."""
    path, entry = checkpoint.where(scale), checkpoint.entry(scale)
    if entry.dtype not in _SCALES:
        raise mistake(path, scale, f"have a dtype among {', '.join(_SCALES)}", entry.dtype)
    blocks = ((1, FP4_GROUP),) if name == "fp4" else BLOCKS
    if name == "fp4" and shape[-1] % FP4_GROUP:
        must = f"have a last axis of whole groups of {FP4_GROUP}"
        raise mistake(checkpoint.where(weight), weight, must, shape)
    grids = {block: grid(shape, block) for block in blocks}
    for block, wanted in grids.items():
        if entry.shape == wanted:
            return block
    wanted = " or ".join(
        f"{shape} for {rows}x{columns}" for (rows, columns), shape in grids.items()
    )
    raise mistake(path, scale, f"have shape {wanted}", entry.shape)


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of `shape`, one for each block, the last ones cut off."""
    *lead, size_out, size_in = shape
    return (*lead, -(-size_out // block[0]), -(-size_in // block[1]))

"""A weight as it lies in a file: its dtype and geometry say what it is.

The configuration is never asked. A `config.json` often keeps the dtype from before a checkpoint
was saved anew, and it never states the dtype of the scales.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .dtypes import PACKED
from .quantization import FP4_GROUP, decode_blocks, decode_fp4
from .safetensors_reader import StoredTensor

BLOCKS = ((128, 128), (32, 32), (1, 32))  # V3 and V4, V4.1, MXFP8
FLOATS = ("F64", "F32", "F16", "BF16")
FP4_TYPES = ("I8", "U8", PACKED)
_KNOWN = (*FLOATS, "F8_E4M3", "F8_E5M2", *FP4_TYPES)
_SCALES = ("F8_E8M0", "U8", "F32")
_E8M0_NAN = 255
_SMALLEST_RANGE = 1e38  # of the dtypes that hold whatever was stored: not of float16
STRIP = 128  # rows decoded at once: a multiple of every block's, and they stay in the cache


class StoredMatrix(NamedTuple):
    """One matrix (size_out, size_in) in a checkpoint, or a stack of them.

    `shape` counts numbers, not bytes. `format` is `"float"`, `"fp4"`, or the file's name of an
    8-bit type. `block` is the rows and columns that share a scale, None without scales. `index`
    is the place of one matrix in its stack. Only a single matrix can be read.
    """

    weight: StoredTensor
    scale: StoredTensor | None
    format: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    index: int | None = None

    def payload(self) -> np.ndarray:
        """The weight as stored, memory-mapped: packed FP4 as bytes, (size_out, size_in / 2)."""
        is_fp4, (rows, columns) = self.format == "fp4", self.shape
        array = self.weight.raw() if is_fp4 else self.weight.read()
        return array.reshape(-1, rows, columns // 2 if is_fp4 else columns)[self.index or 0]

    def scales(self) -> np.ndarray | None:
        """The scales, which must be numbers: float32, or E8M0 as its raw bytes."""
        if self.scale is None:
            return None
        array = self.scale.read()
        array = array if self.index is None else array[self.index]
        if array.dtype != np.float32:
            array = array.view(np.uint8)
        wrong = array == _E8M0_NAN if array.dtype == np.uint8 else ~np.isfinite(array)
        if wrong.any():
            place = np.argwhere(wrong)[0].tolist()
            found = f"{array[tuple(place)]} at {place}"
            raise self.scale.mistake("be finite, as E8M0 bytes up to 254 are", found)
        return array

    def decoded(self, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
        """The numbers in `dtype`, which must hold them, some rows at a time: which rows, and their
        numbers. A dtype as wide as float32 holds all but float64."""
        payload, scales, block = self.payload(), self.scales(), self.block
        largest = float(jnp.finfo(dtype).max)
        narrow = largest < _SMALLEST_RANGE or (payload.dtype == np.float64 and dtype != np.float64)
        for start in range(0, payload.shape[0], STRIP):
            rows = slice(start, min(start + STRIP, payload.shape[0]))
            if scales is None or block is None:
                with np.errstate(over="ignore"):
                    numbers = payload[rows].astype(dtype)
            else:
                strip = scales[rows.start // block[0] : -(-rows.stop // block[0])]
                if self.format == "fp4":
                    numbers = decode_fp4(payload[rows], strip, dtype)
                else:
                    numbers = decode_blocks(payload[rows], strip, block, dtype)
            if narrow and np.isinf(numbers).any():
                raise self.weight.mistake(f"fit {dtype}", f"numbers beyond {largest:g}")
            yield rows, numbers


def stored_matrix(
    weight: StoredTensor, scale: StoredTensor | None, shape: tuple[int, ...]
) -> StoredMatrix:
    """The matrix of `weight` and `scale`, which must have the configuration's `shape` in numbers,
    and be of a kind that the library decodes."""
    kind, found = weight.dtype, weight.shape
    if kind not in _KNOWN:
        raise weight.mistake(f"have a dtype among {', '.join(_KNOWN)}", kind)
    if kind in FP4_TYPES and len(found) == len(shape) + 1:  # groups have an axis in GPT-OSS
        found = (*found[:-2], found[-2] * found[-1])
    if kind in FP4_TYPES and kind != PACKED and found:
        found = (*found[:-1], 2 * found[-1])
    if found != shape:
        got = f"{found}, {kind} {list(weight.shape)} in the file"
        raise weight.mistake(f"have the configuration's shape {shape}", got)
    name = "fp4" if kind in FP4_TYPES else "float" if kind in FLOATS else kind
    if scale is None:
        if name != "float":
            raise weight.mistake("have a scale beside it", f"{kind} and no scale")
        return StoredMatrix(weight, None, name, shape, None)
    if scale.dtype not in _SCALES:
        raise scale.mistake(f"have a dtype among {', '.join(_SCALES)}", scale.dtype)
    if name == "fp4" and shape[-1] % FP4_GROUP:
        raise weight.mistake(f"have a last axis of whole groups of {FP4_GROUP}", shape)
    blocks = ((1, FP4_GROUP),) if name == "fp4" else BLOCKS
    grids = {block: grid(shape, block) for block in blocks}
    for block, tiles in grids.items():
        if scale.shape == tiles:
            return StoredMatrix(weight, scale, name, shape, block)
    wanted = " or ".join(
        f"{tiles} for {rows}x{columns}" for (rows, columns), tiles in grids.items()
    )
    raise scale.mistake(f"have shape {wanted}", scale.shape)


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of `shape`, one for each block, the last blocks cut off."""
    *lead, size_out, size_in = shape
    return (*lead, -(-size_out // block[0]), -(-size_in // block[1]))

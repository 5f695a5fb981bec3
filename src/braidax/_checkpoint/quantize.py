"""Floating point to FP4 and FP8 with E8M0 scales: the inverse of `dequantize`.

A scale is the smallest power of two that brings the largest number of its block within the
format. So nothing saturates, and a number that was decoded from the format is encoded without loss.

**Source:** DeepSeek-V4 (arXiv:2606.19348) and its released files: `scale_fmt` `"ue8m0"`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float8e4m3fn, UInt8

from .dequantize import FP4_GROUP, decode_scale
from .dtypes import FLOAT4, SCALE

FP8_BLOCK = (128, 128)
_FLOAT8 = np.dtype(jnp.float8_e4m3fn)
_ONE = 127  # the byte of scale 1
_SMALLEST, _LARGEST = 1, 253  # products with the bytes 0 and 254 leave float32
_LARGEST_NUMBER = 2.0**127


def encode_fp4(
    numbers: Float[np.ndarray, "*lead unpacked"],
) -> tuple[UInt8[np.ndarray, "*lead packed"], np.ndarray]:
    """FP4 (E2M1) in groups of 32 along the last axis.

    **Returns:** the bytes (*lead, n / 2), first number in the low half, and the E8M0 scales
    (*lead, n / 32).

    **Raises:** `ValueError` unless the last axis is whole groups and all numbers are finite and
    at most 2**127.
    """
    *lead, size = numbers.shape
    if size % FP4_GROUP:
        raise ValueError(
            f"`numbers` must have a last axis of whole groups of {FP4_GROUP}. Got {size}."
        )
    grouped = _finite(numbers).reshape(*lead, size // FP4_GROUP, FP4_GROUP)
    scale = _scales(np.abs(grouped).max(axis=-1, initial=0), FLOAT4)
    codes = (grouped / decode_scale(scale)[..., None]).astype(FLOAT4).view(np.uint8) & 15
    codes = codes.reshape(*lead, size // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, scale


def encode_fp8(
    numbers: Float[np.ndarray, "size_out size_in"], block: tuple[int, int] = FP8_BLOCK
) -> tuple[Float8e4m3fn[np.ndarray, "size_out size_in"], np.ndarray]:
    """FP8 (E4M3) in blocks of rows and columns, the last ones cut off by the edges.

    **Returns:** the numbers and their E8M0 scales.

    **Raises:** `ValueError` unless all numbers are finite and at most 2**127.
    """
    rows, columns = numbers.shape
    padding = [(0, -size % width) for size, width in zip(numbers.shape, block, strict=True)]
    blocks = np.pad(_finite(numbers), padding)
    blocks = blocks.reshape(-(-rows // block[0]), block[0], -(-columns // block[1]), block[1])
    scale = _scales(np.abs(blocks).max(axis=(1, 3), initial=0), _FLOAT8)
    codes = (blocks / decode_scale(scale)[:, None, :, None]).astype(_FLOAT8)
    codes = codes.reshape(rows + padding[0][1], columns + padding[1][1])
    return np.ascontiguousarray(codes[:rows, :columns]), scale


def _finite(numbers: np.ndarray) -> Float[np.ndarray, "..."]:
    numbers = np.asarray(numbers, np.float32)
    # A larger number may round up to one that float32 does not have.
    within = np.abs(numbers) <= _LARGEST_NUMBER
    if not within.all():
        found = numbers[~within][0]
        raise ValueError(f"`numbers` must be finite and at most 2**127. Got {found}.")
    return numbers


def _scales(largest: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The smallest power of two that brings `largest` within `dtype`, as E8M0."""
    # frexp is exact where a logarithm rounds: largest / limit = fraction * 2**exponent.
    fraction, exponent = np.frexp(largest.astype(np.float64) / float(jnp.finfo(dtype).max))
    exponent = np.where(fraction > 0.5, exponent, exponent - 1)
    byte = np.where(largest > 0, np.clip(exponent + _ONE, _SMALLEST, _LARGEST), _ONE)
    return byte.astype(np.uint8).view(SCALE)

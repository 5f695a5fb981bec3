"""Numbers of 4 and 8 bits with shared scales, to and from floating point.

Decoding is exact, and numpy's: XLA on a CPU flushes numbers below 2**-126 to zero, and scales
reach 2**-127. Encoding takes as scale the smallest power of two that brings the largest number of
its block within the format. So nothing saturates, and what was decoded is encoded without loss.

**Source:** OCP microscaling formats v1.0; `Fp8Dequantize` of transformers 5.23, with which the
decoding agrees byte for byte; DeepSeek-V4 (arXiv:2606.19348), `scale_fmt` `"ue8m0"`.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float8e4m3fn, UInt8

from .dtypes import FLOAT4, SCALE

FP4_GROUP = 32
FP8_BLOCK = (128, 128)
_FLOAT8 = np.dtype(jnp.float8_e4m3fn)
_ONE = 127  # the byte of scale 1
_SMALLEST, _LARGEST = 1, 253  # products with the bytes 0 and 254 leave float32
_LARGEST_NUMBER = 2.0**127

_CODES = np.arange(256, dtype=np.uint8)


def decode_scale(scale: np.ndarray) -> Float[np.ndarray, "*grid"]:
    """Scales as float32: E8M0, its raw bytes in uint8, or floating point already."""
    if scale.dtype == np.uint8:
        scale = scale.view(SCALE)
    return scale.astype(np.float32)


def decode_fp4(
    payload: UInt8[np.ndarray, "*lead packed"], scale: np.ndarray, dtype: np.dtype
) -> Float[np.ndarray, "*lead unpacked"]:
    """Two E2M1 numbers a byte, low half first, times the scale of their group of 32, in float32 and
    then rounded to `dtype`; `scale` (*lead, unpacked / 32) as for `decode_scale`."""
    *lead, packed = payload.shape
    grouped = payload.reshape(*lead, packed * 2 // FP4_GROUP, FP4_GROUP // 2)
    if scale.dtype.itemsize == 1:
        # Looking every product up is several times faster than multiplying.
        index = scale.view(np.uint8).astype(np.uint16)[..., None] << 8 | grouped
        pairs = np.take(_products(np.dtype(dtype)), index)
        return pairs.view(dtype).reshape(*lead, packed * 2)
    numbers = _pairs()[grouped].reshape(*lead, -1, FP4_GROUP)
    return _multiply(numbers, scale[..., None], dtype).reshape(*lead, packed * 2)


def decode_blocks(
    payload: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype
) -> Float[np.ndarray, "*lead size_out size_in"]:
    """Each number, of 8 bits or more, times the scale of its block of rows and columns, in float32
    and then rounded to `dtype`. The edges cut the last blocks off."""
    rows, columns = payload.shape[-2:]
    scale = decode_scale(scale)
    scale = np.repeat(scale, min(block[0], rows), axis=-2)[..., :rows, :]
    scale = np.repeat(scale, min(block[1], columns), axis=-1)[..., :columns]
    if payload.dtype.itemsize > 1:
        return _multiply(payload.astype(np.float32), scale, dtype)
    return _multiply(_numbers(payload.dtype)[payload.view(np.uint8)], scale, dtype)


def _multiply(numbers: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # A product beyond the range is infinity, as stored: nothing to warn about.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.multiply(numbers, scale, dtype=np.float32).astype(dtype)


@functools.cache
def _numbers(dtype: np.dtype) -> Float[np.ndarray, "256"]:
    return _CODES.view(dtype).astype(np.float32)


@functools.cache
def _pairs() -> Float[np.ndarray, "256 2"]:
    return np.stack((_CODES & 15, _CODES >> 4), axis=-1).view(FLOAT4).astype(np.float32)


@functools.cache
def _products(dtype: np.dtype) -> np.ndarray:
    """The decoded pair for every scale byte (high) and payload byte (low), as one element."""
    products = _multiply(_pairs()[None], decode_scale(_CODES)[:, None, None], dtype)
    return np.ascontiguousarray(products).view((np.void, 2 * dtype.itemsize)).reshape(-1)


def encode_fp4(
    numbers: Float[np.ndarray, "*lead unpacked"],
) -> tuple[UInt8[np.ndarray, "*lead packed"], np.ndarray]:
    """FP4 (E2M1) in groups of 32 along the last axis: the bytes, first number in the low half, and
    the E8M0 scales (*lead, unpacked / 32).

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
    """FP8 (E4M3) in blocks, the last ones cut off by the edges: the numbers and their E8M0 scales.

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

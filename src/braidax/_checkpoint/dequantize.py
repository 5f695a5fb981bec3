"""Numbers of 4 and 8 bits with shared scales, decoded to floating point bit for bit.

The decoding is numpy's: XLA on a CPU flushes numbers below 2**-126 to zero, and scales reach
2**-127.

**Source:** OCP microscaling formats v1.0; `Fp8Dequantize` of transformers 5.23, with which this
file agrees byte for byte.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8

from .dtypes import FLOAT4, SCALE

FP4_GROUP = 32
_CODES = np.arange(256, dtype=np.uint8)


def decode_scale(scale: np.ndarray) -> Float[np.ndarray, "*grid"]:
    """Scales as float32: E8M0, its raw bytes in uint8, or floating point already."""
    if scale.dtype == np.uint8:
        scale = scale.view(SCALE)
    return scale.astype(np.float32)


def decode_fp4(
    payload: UInt8[np.ndarray, "*lead packed"], scale: np.ndarray, dtype: np.dtype
) -> Float[np.ndarray, "*lead unpacked"]:
    """Two E2M1 numbers a byte, low half first, times the scale of their group of 32.

    **Arguments:** `payload` (*lead, n / 2); `scale` (*lead, n / 32) as for `decode_scale`.

    **Returns:** (*lead, n), the float32 product rounded to `dtype`.
    """
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
    """Each number times the scale of its block of rows and columns.

    **Arguments:** `payload` (*lead, size_out, size_in) of 8 bits or more; `scale` as for
    `decode_scale`, one for each `block`, the last ones cut off by the edges.

    **Returns:** the float32 products, rounded to `dtype`.
    """
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

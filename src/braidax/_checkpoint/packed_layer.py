"""Stored experts as `PackedSwiGLUExperts`: bytes copied, nothing decoded."""

from collections.abc import Sequence

import jax
import numpy as np

from .decode_layer import aligned_empty
from .dtypes import DTYPES, FLOAT4
from .errors import mistake
from .layer import StoredLayer
from .packed_experts import PackedSwiGLUExperts
from .packed_matmul import PackedMatrices
from .stored_matrix import StoredMatrix


def packed_experts(layer: StoredLayer, limit: float | None) -> PackedSwiGLUExperts:
    """The experts of `layer` as they are stored.

    **Raises:** `ValueError` if they are floating point, not all of one kind, or if gate and up
    share a scale.
    """
    gate_up, intermediate = layer.experts[0].gate_up, layer.intermediate_size
    block = gate_up[0].block
    if len(gate_up) == 1 and block is not None and intermediate % block[0]:
        must = f"have blocks of {block[0]} rows that gate and up do not share"
        found = f"an intermediate size of {intermediate}"
        raise mistake(gate_up[0].path, gate_up[0].names.weight, must, found)
    indices = [expert.index for expert in layer.experts]
    gate_up = _stack([expert.gate_up for expert in layer.experts], indices)
    down = _stack([(expert.down,) for expert in layer.experts], indices)
    return PackedSwiGLUExperts(gate_up, down, limit)


def _stack(
    experts: Sequence[tuple[StoredMatrix, ...]], indices: Sequence[int | None]
) -> PackedMatrices:
    first = experts[0][0]
    _check_kind(first, experts)
    rows = [sum(part.shape[-2] for part in parts) for parts in experts]
    payload_size = first.payload(indices[0]).shape[-1]
    scales = _row_scales(first, indices[0])
    payload = aligned_empty((len(experts), rows[0], payload_size), np.dtype(np.uint8))
    scale = aligned_empty((len(experts), rows[0], scales.shape[-1]), scales.dtype)
    for parts, index, to_payload, to_scale in zip(experts, indices, payload, scale, strict=True):
        start = 0
        for part in parts:
            stop = start + part.shape[-2]
            to_payload[start:stop] = part.payload(index).view(np.uint8)
            to_scale[start:stop] = _row_scales(part, index)
            start = stop
    number = FLOAT4 if first.format == "fp4" else DTYPES[first.format]
    assert first.block is not None  # `_check_kind` has refused what has no scales.
    return PackedMatrices(jax.device_put(payload), jax.device_put(scale), number.name, first.block)


def _row_scales(matrix: StoredMatrix, index: int | None) -> np.ndarray:
    """The scales of every row: uint8 exponents, or the bits of float32."""
    scale, block = matrix.scale(index), matrix.block
    assert scale is not None and block is not None
    scale = scale.view(np.uint32) if scale.dtype == np.float32 else scale
    num_rows = matrix.shape[-2]
    return np.repeat(scale, min(block[0], num_rows), axis=0)[:num_rows]


def _check_kind(first: StoredMatrix, experts: Sequence[tuple[StoredMatrix, ...]]) -> None:
    if first.format == "float" or first.block is None:
        must = 'be FP4 or FP8 with scales, for `dtype="packed"`'
        raise mistake(first.path, first.names.weight, must, "floating point")
    for matrix in (part for parts in experts for part in parts):
        if _kind(matrix) != _kind(first):
            must = f'be stored as {first.names.weight} is, for `dtype="packed"`: {_kind(first)}'
            raise mistake(matrix.path, matrix.names.weight, must, _kind(matrix))


def _kind(matrix: StoredMatrix) -> tuple[str, tuple[int, int] | None, bool]:
    scale = matrix.names.scale
    is_float = scale is not None and matrix.checkpoint.entry(scale).dtype == "F32"
    return matrix.format, matrix.block, is_float

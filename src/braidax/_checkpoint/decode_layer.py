"""Experts decoded one by one into the arrays that the block computes with."""

import mmap
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from .layer import ExpertMatrices


def decode_matrices(
    experts: Sequence[ExpertMatrices], dtype: np.dtype
) -> tuple[Float[Array, "experts gate_and_up hidden"], Float[Array, "experts intermediate hidden"]]:
    """`gate_up` and `down` of `SwiGLUExperts`, in `dtype`, without a second copy of either."""
    hidden, intermediate = experts[0].down.shape[-2:]
    gate_up = aligned_empty((len(experts), 2 * intermediate, hidden), dtype)
    down = aligned_empty((len(experts), intermediate, hidden), dtype)
    for expert, own_gate_up, own_down in zip(experts, gate_up, down, strict=True):
        parts = np.split(own_gate_up, len(expert.gate_up))
        for matrix, part in zip(expert.gate_up, parts, strict=True):
            for rows, numbers in matrix.decoded(dtype, expert.index):
                part[rows] = numbers
        for rows, numbers in expert.down.decoded(dtype, expert.index):
            own_down[:, rows] = numbers.T
    return jax.device_put(gate_up), jax.device_put(down)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at the start of a page. `jax.device_put` on a CPU takes aligned arrays
    over and copies others, which would need their memory twice."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    pages = mmap.mmap(-1, max(count * dtype.itemsize, 1))
    return np.frombuffer(pages, dtype, count).reshape(shape)

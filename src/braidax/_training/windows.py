"""Which windows of the text a step and the held-out pass see: pure functions of their arguments."""

import numpy as np
from jaxtyping import Int, UInt8


def training_windows(
    data: UInt8[np.ndarray, " _"], *, batch: int, length: int, seed: int, step: int
) -> Int[np.ndarray, "batch {length}+1"]:
    """Random windows of `length + 1` bytes: a pure function of `(seed, step)`.

    A counter-based generator (Philox, Salmon et al. 2011) needs no state, so a resumed run sees
    the windows that the uninterrupted run would have seen. `random_raw` is used because NumPy
    keeps the raw stream the same for ever, and `Generator.integers` not.
    """
    generator = np.random.Philox(key=seed, counter=[0, 0, 0, step])
    starts = generator.random_raw(batch) % np.uint64(data.size - length)
    return _windows(data, starts.astype(np.int64), length)


def held_out_windows(
    data: UInt8[np.ndarray, " _"], *, count: int, length: int
) -> Int[np.ndarray, "batch {length}+1"]:
    """At most `count` fixed windows of `length + 1` bytes, disjoint and spread evenly."""
    available = data.size // (length + 1)
    count = min(count, available)
    starts = np.arange(count, dtype=np.int64) * available // count * (length + 1)
    return _windows(data, starts, length)


def held_out_batches(
    data: UInt8[np.ndarray, " _"], *, count: int, length: int, batch: int
) -> Int[np.ndarray, "batches batch {length}+1"]:
    """Those windows in whole batches of `batch` or all, so that one compiled function serves all;
    a last part of a batch is left out."""
    windows = held_out_windows(data, count=count, length=length)
    batch = min(batch, len(windows))
    return windows[: len(windows) // batch * batch].reshape(-1, batch, length + 1)


def _windows(
    data: UInt8[np.ndarray, " _"], starts: Int[np.ndarray, " batch"], length: int
) -> Int[np.ndarray, "batch {length}+1"]:
    return data[starts[:, None] + np.arange(length + 1)[None, :]].astype(np.int32)

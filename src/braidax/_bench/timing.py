"""Interleaved timing: machines drift, so only ratios inside one run mean anything."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

_SHORTEST_SAMPLE = 0.02  # seconds: below, the clock and the scheduler are what is measured


class Timing(NamedTuple):
    """Seconds a call, over the rounds of one interleaved run."""

    median: float
    lowest: float
    highest: float


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time every candidate once a round, in turn. Each call must wait for its own result.

    Every candidate is called twice before: once to compile, once to choose how many calls make a
    sample of at least 20 ms.
    """
    repeats = {}
    for name, call in candidates.items():
        call()
        repeats[name] = max(1, round(_SHORTEST_SAMPLE / _seconds(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            samples[name].append(_seconds(call, repeats[name]) / repeats[name])
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    }


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start

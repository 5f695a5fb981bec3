"""Samples of several candidates, taken in turn, in one process.

A machine drifts by 10 to 30 % within minutes. Only ratios inside one run mean anything, and the
method makes them fair:

- **Interleaved.** A round takes one sample of every candidate. Every second round runs backwards.
- **Untimed calls before every sample.** OpenMP threads go on spinning for milliseconds after a call
  of torch, and slow whatever follows. Right before a sample, its candidate is therefore called
  untimed as often as the sample calls it: once, or for 20 ms. The caches then hold its arrays too.
- **Bare arrays.** A candidate of JAX is handed arrays, no modules. To take modules apart costs a
  quarter of the decoding of one token, and no layer inside a model pays that.
- **The routing is an argument.** XLA would sort a constant while it compiles.
- **Equal threads.** JAX takes every core that the process may use, and torch takes as many by
  default. The programs print both counts.
- **Ratios of medians.** A median forgets the samples that another process disturbed.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

SHORTEST_SAMPLE = 0.02  # seconds: below, the clock and the scheduler are what is measured
Call = Callable[[], object]  # waits for its own result
Sampler = Callable[[int], float]  # a number of calls -> seconds a call


class Timing(NamedTuple):
    """Seconds a call, over the rounds of one interleaved run."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ({self.lowest * 1e3:.2f}-{self.highest * 1e3:.2f})"


def sampler(call: Call, clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """A function that calls as often as asked untimed, then as often with the clock running."""

    def sample(repeats: int) -> float:
        for _ in range(repeats):
            call()
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return sample


def interleave(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, Timing]:
    """One sample of every candidate a round: a call, or as many calls as fit into 20 ms."""
    repeats = {
        name: max(1, round(SHORTEST_SAMPLE / sample(1))) for name, sample in samplers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(samplers[name](repeats[name]))
        order.reverse()
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def cores() -> int:
    """Cores that this process may use, as JAX counts them for its threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

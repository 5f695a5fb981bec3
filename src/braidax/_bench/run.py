"""One interleaved run a workload, and what it says."""

import dataclasses
from collections.abc import Iterator, Sequence

from . import candidates, torch_peers
from .timing import Timing, interleave
from .workloads import GROUPS, Workload, make_arrays

OURS = "braidax"
_TORCH_LIMIT, _JAX_LIMIT, _READ_LIMIT = "product (torch)", "product (jax)", "read weights"


@dataclasses.dataclass(frozen=True)
class Result:
    """Timings of one workload in one direction, all from one interleaved run."""

    group: str
    workload: Workload
    direction: str
    timings: dict[str, Timing]

    @property
    def best_peer(self) -> str | None:
        """The fastest torch implementation, if any was measured."""
        return self._fastest([f"torch {name}" for name in torch_peers.IMPLEMENTATIONS])

    @property
    def limit(self) -> str | None:
        """The fastest plain product, or reading the weights where that is what bounds."""
        return self._fastest([_TORCH_LIMIT, _JAX_LIMIT]) or self._fastest([_READ_LIMIT])

    def ratio(self, name: str | None) -> float | None:
        """Our median over that of `name`."""
        return self.timings[OURS].median / self.timings[name].median if name else None

    def _fastest(self, names: Sequence[str]) -> str | None:
        measured = [name for name in names if name in self.timings]
        return min(measured, key=lambda name: self.timings[name].median, default=None)


def measure(
    groups: Sequence[str], directions: Sequence[str], rounds: int, backends: Sequence[str]
) -> Iterator[Result]:
    """Results one after another. The first of `backends` is ours; the others are peers."""
    for group in groups:
        for workload in GROUPS[group]:
            for direction in directions:
                # Decoding has no backward pass.
                if group == "decode" and direction != "forward":
                    continue
                calls = _calls(group, workload, direction, backends)
                yield Result(group, workload, direction, interleave(calls, rounds))


def _calls(
    group: str, workload: Workload, direction: str, backends: Sequence[str]
) -> dict[str, candidates.Call]:
    arrays = make_arrays(workload)
    calls = {
        name: candidates.ours(workload, arrays, backend, direction)
        for name, backend in zip((OURS, *backends[1:]), backends, strict=True)
    }
    decoding = group == "decode"
    if decoding:
        calls[_READ_LIMIT] = candidates.read_limit(workload)
    else:
        calls[_JAX_LIMIT] = candidates.gemm_limit(workload, arrays, direction)
    if torch_peers.available():
        if not decoding:
            calls[_TORCH_LIMIT] = torch_peers.gemm_limit(workload, arrays, direction)
        for implementation in torch_peers.IMPLEMENTATIONS:
            call = torch_peers.experts(workload, arrays, implementation, direction)
            if call is not None:
                calls[f"torch {implementation}"] = call
    return calls

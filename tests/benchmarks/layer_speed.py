"""Our experts beside torch's, plain products and reading the weights, workload after workload.

    python tests/benchmarks/layer_speed.py --groups layers decode --directions forward --rounds 7
    python tests/benchmarks/layer_speed.py --across --groups skew tokens experts

`--across` calls every workload of a group once a round, ours alone: what skew, tokens and experts
cost. Without it, one workload follows another, and a ratio between two carries the drift of the
machine. `interleaving.py` states the method. `nox -s bench` installs torch.
"""

import argparse
import importlib
import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType

import jax
import jax_candidates
from interleaving import Timing, cores, interleave, sampler
from workloads import DIRECTIONS, GROUPS, INFERENCE, make_arrays

import braidax as bx

Names = Sequence[str]
USUAL = ("layers", "decode", "prefill", "bfloat16")


def torch_candidates() -> ModuleType | None:
    """The module of the peers, or `None` without torch and transformers."""
    installed = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return importlib.import_module("torch_candidates") if installed else None


def ratios(timings: Mapping[str, Timing]) -> dict[str, float]:
    """The median of the first candidate, which is ours, over the fastest peer's and over the limit.

    The limit is the faster plain product, or reading the weights where that takes longer. Routing
    is given as its share of a layer, of routing and experts together.
    """

    def median(name: str) -> float:
        return timings[name].median

    def fastest(kind: str) -> list[str]:
        return sorted((name for name in timings if name.startswith(kind)), key=median)[:1]

    ours = median(next(iter(timings)))
    limit = sorted(fastest("product") + fastest("reading"), key=median)[-1:]
    found = {f"/ {name}": ours / median(name) for name in fastest("torch")}
    found |= {f"/ limit ({name})": ours / median(name) for name in limit}
    if "routing" in timings:
        found["routing share"] = median("routing") / (median("routing") + ours)
    return found


def beside_peers(groups: Names, directions: Names, matmuls: Names, rounds: int) -> Iterator[str]:
    """One line a workload and direction."""
    peers = torch_candidates()
    tasks = [
        (workload, direction)
        for group in groups
        for workload in GROUPS[group]
        for direction in (DIRECTIONS[:1] if group in INFERENCE else directions)
    ]
    for workload, direction in tasks:
        arrays = make_arrays(workload)
        kernels = jax_candidates.named(matmuls)
        calls = jax_candidates.layers(workload, arrays, direction, kernels)
        calls |= jax_candidates.bounds(workload, arrays, direction)
        if peers is not None:
            calls |= peers.candidates(workload, arrays, direction)
        start = time.perf_counter()
        next(iter(calls.values()))()
        first = time.perf_counter() - start
        timings = interleave({name: sampler(call) for name, call in calls.items()}, rounds)
        ours = next(iter(timings.values())).median
        cells = [f"{name} {timing}" for name, timing in timings.items()]
        cells += [f"{name} {ratio:.2f}" for name, ratio in ratios(timings).items()]
        cells += [f"{workload.flops(direction) / ours / 1e9:.0f} GFLOP/s"]
        cells += [f"compiled in {first - ours:.1f} s"]
        yield f"{workload.name:14} {direction:17} " + "  ".join(cells)


def across_workloads(
    groups: Names, directions: Names, matmuls: Names, rounds: int
) -> Iterator[str]:
    """One line a workload, with the ratio to the first of its group."""
    for group in groups:
        for direction in directions:
            samplers = {}
            for workload in GROUPS[group]:
                arrays = make_arrays(workload)
                kernels = jax_candidates.named(matmuls)
                calls = jax_candidates.layers(workload, arrays, direction, kernels)
                samplers[workload.name] = sampler(next(iter(calls.values())))
            timings = interleave(samplers, rounds)
            first = next(iter(timings.values())).median
            for name, timing in timings.items():
                yield f"{name:14} {direction:17} {timing}  x {timing.median / first:.2f}"


def header() -> str:
    """Versions, device and thread counts. Without them a ratio means nothing."""
    names, threads, device = ["braidax", "jax"], f"{cores()} of jax", jax.devices()[0]
    if torch_candidates() is not None:
        torch = importlib.import_module("torch")
        names, threads = [*names, "torch"], f"{threads}, {torch.get_num_threads()} of torch"
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{versions}; {device.platform}, {device.device_kind}; threads: {threads}"


def main() -> None:
    """Print each result when it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=USUAL)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--matmuls", nargs="+", default=["Auto"], help="the first is ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--across", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="without braidax.keep_memory()")
    given = parser.parse_args()
    # One process, one allocator: torch has what we have.
    memory = "kept" if not given.fresh and bx.keep_memory() else "fresh"
    print(f"{header()}; memory: {memory}", "median ms (lowest-highest)", sep="\n", flush=True)
    run = across_workloads if given.across else beside_peers
    for line in run(given.groups, given.directions, given.matmuls, given.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()

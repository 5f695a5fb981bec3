"""Our layer on all workloads of one group, interleaved: what skew, tokens and experts cost.

`python -m braidax bench` interleaves candidates and takes one workload after the other, so that its
ratios between workloads carry the drift of the machine. Here every workload is called once a round.

    python tests/benchmarks/across_workloads.py skew tokens experts [--rounds 7]
"""

import argparse

from braidax._bench.candidates import DIRECTIONS, ours
from braidax._bench.timing import interleave
from braidax._bench.workloads import GROUPS, device_text, make_arrays


def main() -> None:
    """Print one line a workload, with the ratio to the first of its group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="+", choices=("skew", "tokens", "experts"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(device_text())
    for group in arguments.groups:
        arrays = {workload: make_arrays(workload) for workload in GROUPS[group]}
        for direction in DIRECTIONS:
            calls = {
                workload.name: ours(workload, arrays[workload], "blocks", direction)
                for workload in GROUPS[group]
            }
            timings = interleave(calls, arguments.rounds)
            first = timings[GROUPS[group][0].name].median
            for name, timing in timings.items():
                spread = f"({timing.lowest * 1e3:.0f} to {timing.highest * 1e3:.0f})"
                print(
                    f"{name:12} {direction:17} {timing.median * 1e3:7.0f} ms {spread:>16}"
                    f"  x {timing.median / first:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

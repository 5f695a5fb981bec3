"""What a run looks like: a text table, JSON, a picture."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from .._backends import check_backend
from .._inspect.plots import COLOURS, require_matplotlib
from .._training.report import installed_version
from .._training.settings import UserError
from . import torch_peers
from .candidates import DIRECTIONS
from .run import OURS, Result, measure
from .workloads import GROUPS, device_text

_SCALING = {"tokens": "tokens", "experts": "experts"}


def run_and_report(
    groups: Sequence[str],
    directions: Sequence[str],
    backends: Sequence[str],
    rounds: int,
    out: pathlib.Path | None,
) -> int:
    """Measure, print each result when it is there, and write `out/bench.json` and `bench.png`.

    **Raises:** `UserError` for an unknown name or fewer than one round.
    """
    _check_names("--groups", groups, list(GROUPS))
    _check_names("--directions", directions, list(DIRECTIONS))
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1. Got {rounds}.")
    for backend in backends:
        try:
            check_backend(backend)
        except ValueError as error:
            raise UserError(str(error)) from error
    if set(groups) == {"decode"} and "forward" not in directions:
        raise UserError("--groups decode has no backward pass: add --directions forward.")
    print(header(), flush=True)
    results = []
    for result in measure(groups, directions, rounds, backends):
        results.append(result)
        print(line(result), flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "bench.json", results)
        try:
            draw(out / "bench.png", results)
        except ImportError as error:
            print(f"no bench.png: {error}")
    return 0


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} must be among {', '.join(known)}. Got {name!r}.")


def environment() -> dict[str, Any]:
    """Versions, devices and thread counts: without them a ratio means nothing."""
    versions = {name: installed_version(name) for name in ("braidax", "jax", "jaxlib")}
    threads = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None}
    if torch_peers.available():
        versions |= {name: installed_version(name) for name in ("torch", "transformers")}
        threads["torch"] = torch_peers.threads()
    return {"versions": versions, "device": device_text(), "threads": threads}


def header() -> str:
    """The environment in one line."""
    facts = environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = ", ".join(f"{name} {count}" for name, count in facts["threads"].items())
    return f"{versions}; {facts['device']}; threads: {threads}\nmedian ms (lowest-highest)"


def line(result: Result) -> str:
    """One result: every candidate, then our ratios."""
    cells = [
        f"{name} {timing.median * 1e3:.2f} ({timing.lowest * 1e3:.2f}-{timing.highest * 1e3:.2f})"
        for name, timing in result.timings.items()
    ]
    ratios = [
        f"{text} {ratio:.2f}"
        for text, ratio in (
            (f"/ best torch ({result.best_peer})", result.ratio(result.best_peer)),
            (f"/ limit ({result.limit})", result.ratio(result.limit)),
        )
        if ratio is not None
    ]
    return f"{result.workload.name:14} {result.direction:17} " + "  ".join([*cells, *ratios])


def write_json(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Everything measured, in seconds."""
    rows = [
        {
            "group": result.group,
            "workload": result.workload._asdict(),
            "direction": result.direction,
            "seconds": {name: timing._asdict() for name, timing in result.timings.items()},
            "ratio_to_best_torch": result.ratio(result.best_peer),
            "ratio_to_limit": result.ratio(result.limit),
        }
        for result in results
    ]
    path.write_text(json.dumps({**environment(), "results": rows}, indent=2) + "\n")


def draw(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Ratio to the limit for each workload, and scaling in tokens and in experts where measured.

    **Raises:** `ImportError` without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    scaling = [group for group in _SCALING if any(result.group == group for result in results)]
    compared = [result for result in results if result.group not in _SCALING and result.limit]
    panels = [None] * bool(compared) + scaling
    height = max(4.0, 1.2 + 0.5 * len(compared))
    figure = Figure(figsize=(5.5 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, group in zip(axes, panels, strict=True):
        if group is None:
            _draw_ratios(ax, compared)
        else:
            _draw_scaling(ax, group, [result for result in results if result.group == group])
    figure.savefig(path, dpi=150)


def _draw_ratios(ax: Any, results: Sequence[Result]) -> None:
    names = [f"{result.workload.name}\n{result.direction}" for result in results]
    for offset, colour, label, ratios in (
        (-0.2, COLOURS[0], OURS, [result.ratio(result.limit) for result in results]),
        (0.2, COLOURS[1], "best torch", [_peer_ratio(result) for result in results]),
    ):
        places = [place + offset for place, ratio in enumerate(ratios) if ratio is not None]
        heights = [ratio for ratio in ratios if ratio is not None]
        if heights:
            ax.barh(places, heights, 0.38, color=colour, label=label)
    ax.axvline(1, color="#555555", linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("time / limit (plain product, or reading the weights)")
    ax.set_title("Time over the limit")
    ax.legend()


def _peer_ratio(result: Result) -> float | None:
    if result.best_peer is None or result.limit is None:
        return None
    return result.timings[result.best_peer].median / result.timings[result.limit].median


def _draw_scaling(ax: Any, group: str, results: Sequence[Result]) -> None:
    directions = dict.fromkeys(result.direction for result in results)
    for colour, direction in zip(COLOURS, directions, strict=False):
        chosen = [result for result in results if result.direction == direction]
        sizes = [getattr(result.workload, group) for result in chosen]
        times = [result.timings[OURS].median * 1e3 for result in chosen]
        ax.plot(sizes, times, "o-", color=colour, label=direction)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlabel(_SCALING[group])
    ax.set_ylabel("ms")
    ax.set_title(f"Scaling in {_SCALING[group]}")
    ax.legend()

"""The benchmarks: they compute what they say, and the method is the one that they promise."""

import itertools
import json
import pathlib
import sys

import numpy as np
import oracle
import pytest
from cases import assert_close

import braidax as bx

sys.path.insert(0, str(pathlib.Path(__file__).parent / "benchmarks"))

import interleaving  # noqa: E402
import jax_candidates  # noqa: E402
import layer_speed  # noqa: E402
import on_device  # noqa: E402
import study  # noqa: E402
import study_variants  # noqa: E402
import workloads  # noqa: E402

TINY = workloads.Workload("tiny", 8, 4, 5, 2, 6)


def test_each_sample_follows_an_untimed_call():
    events, times = [], iter([10.0, 16.0])

    def clock():
        return events.append("clock") or next(times)

    sample = interleaving.sampler(lambda: events.append("call"), clock)
    assert sample(3) == 2.0
    assert events == [*["call"] * 3, "clock", *["call"] * 3, "clock"]


def test_samples_take_turns_and_last_twenty_milliseconds():
    asked = []
    times = {"a": itertools.count(1), "b": itertools.repeat(0.002)}

    def sampler(name):
        return lambda repeats: asked.append((name, repeats)) or float(next(times[name]))

    timings = interleaving.interleave({"a": sampler("a"), "b": sampler("b")}, 3)
    a, b = ("a", 1), ("b", 10)
    assert asked == [("a", 1), ("b", 1), a, b, b, a, a, b]
    assert timings == {"a": (3.0, 2.0, 4.0), "b": (0.002, 0.002, 0.002)}


def test_ratios_are_of_medians_and_to_the_fastest():
    medians = {"braidax Auto": 3.0, "torch eager": 6.0, "torch grouped_mm": 4.0, "routing": 1.0}
    medians |= {"product of jax": 2.0, "product of torch": 1.5}

    def ratios(**others):
        found = (medians | others).items()
        return layer_speed.ratios({n: interleaving.Timing(m, 0.1, 99.0) for n, m in found})

    peer = {"/ torch grouped_mm": 0.75, "routing share": 0.25}
    assert ratios() == ratios(reading=0.1) == peer | {"/ limit (product of torch)": 2.0}
    assert ratios(reading=6.0) == peer | {"/ limit (reading)": 0.5}
    assert layer_speed.ratios({"braidax Auto": interleaving.Timing(1.0, 1.0, 1.0)}) == {}


def test_work_is_counted():
    # 12 rows times (8 x 8 and 4 x 8) numbers, a multiplication and an addition each.
    assert TINY.flops("forward") == 2 * 12 * (64 + 32) == 2304
    assert TINY.flops("forward+backward") == 3 * 2304
    arrays = workloads.make_arrays(TINY)._replace(indices=np.array([[0, 3], [3, 4]]))
    assert workloads.touched_bytes(TINY, arrays) == 3 * (3 * 8 * 4) * 4
    assert workloads.touched_bytes(TINY._replace(dtype="bfloat16"), arrays) == 3 * (3 * 8 * 4) * 2


def test_loads():
    def counts(load):
        workload = TINY._replace(tokens=400, experts=20, load=load)
        return np.bincount(workloads.make_arrays(workload).indices.ravel(), minlength=20)

    assert 15 < counts("uniform").min() and counts("uniform").max() < 80
    assert counts("same").tolist() == [400, 400] + [0] * 18
    assert counts("zipf")[0] > 4 * counts("zipf")[10:].mean()


def test_what_is_timed_is_the_layer_and_its_gradients():
    arrays = workloads.make_arrays(TINY)
    names = ("hidden_states", "weights", "gate_up", "down", "cotangent")
    tokens, *others, cotangent = (np.asarray(getattr(arrays, name), np.float64) for name in names)
    given = (tokens, arrays.indices, *others, workloads.LIMIT)
    want = oracle.block_and_gradients(*given, cotangent)
    kernels = jax_candidates.named(["Auto"])
    calls = jax_candidates.layers(TINY, arrays, "forward+backward", kernels)
    output, (experts, *gradients) = calls["braidax Auto"]()
    found = (output, *gradients, experts.gate_up, experts.down)
    for ours, theirs in zip(found, want, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("run", [layer_speed.beside_peers, layer_speed.across_workloads])
def test_a_group(run, monkeypatch):
    monkeypatch.setattr(layer_speed, "GROUPS", {"decode": (TINY,)})
    monkeypatch.setattr(layer_speed, "torch_candidates", lambda: None)
    (line,) = run(["decode"], ["forward"], ["Ragged"], 1)
    assert line.split()[:2] == ["tiny", "forward"]
    assert "threads: " in layer_speed.header()


class Doubled(bx.matmul.Ragged):
    """A kernel that is wrong."""

    def ragged_dot_general(self, *operands, **options):
        return 2 * super().ragged_dot_general(*operands, **options)


class Broken(bx.matmul.Ragged):
    """A kernel that does not run."""

    def ragged_dot_general(self, *operands, **options):
        raise NotImplementedError("not here")


@pytest.mark.slow
def test_on_a_device_only_what_is_right_is_timed(monkeypatch, tmp_path, capsys):
    tiny = TINY._replace(dtype="bfloat16")
    kernels = {"Auto": bx.matmul.Auto(), "doubled": Doubled(), "broken": Broken()}
    kernels = {name: (kernel, None) for name, kernel in kernels.items()}
    monkeypatch.setattr(on_device, "kernels", lambda: kernels)
    monkeypatch.setattr(on_device, "CHECKED", tiny)
    monkeypatch.setattr(on_device, "SMALL", (tiny,))
    path = tmp_path / "found.json"
    found = on_device.main(["--small", "--rounds", "1", "--json", str(path)])
    assert [check["right"] for check in found["checks"]] == [True, False, False]
    assert "NotImplementedError: not here" in found["checks"][2]["error"]
    assert json.loads(path.read_text()) == found
    timed = [(row["direction"], row["candidate"]) for row in found["times"] if "median" in row]
    ours = [(direction, "Auto") for direction in workloads.DIRECTIONS]
    assert [row for row in timed if not row[1].startswith(("torch", "product"))] == ours
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert all(line.count("|") == 7 for line in lines)


def test_nothing_starts_after_the_time_is_up(monkeypatch):
    monkeypatch.setattr(on_device, "check", list)
    found = on_device.main(["--small", "--minutes", "0"])
    assert found["times"] == [] and len(found["left out"]) == len(workloads.DIRECTIONS)


def test_the_page_of_the_study_shows_the_runs_that_are_kept():
    root = pathlib.Path(__file__).parents[1]
    runs = study.read_runs(root / "tests" / "benchmarks" / "study.jsonl")
    assert {name: sorted(found) for name, found in runs.items()} == {
        name: list(study_variants.SEEDS) for name in study_variants.VARIANTS
    }
    assert study.table(runs) in (root / "docs" / "study.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(monkeypatch, tmp_path):
    tiny = {"steps": 2, "batch": 2, "length": 16, "hidden": 16, "layers": 2, "intermediate": 8}
    base = {**study_variants.BASE, **tiny, "eval_windows": 4}
    monkeypatch.setattr(study_variants, "BASE", base)
    path, names = tmp_path / "study.jsonl", ["dense", "expert choice"]
    assert study.missing(names, path) == dict.fromkeys(names, [0, 1, 2])
    for name in names:
        study.run(name, [0], path)
    assert study.missing(names, path) == dict.fromkeys(names, [1, 2])
    dense, chosen = study.table(study.read_runs(path)).splitlines()[2:]
    assert dense.endswith("| - | - |") and chosen.endswith("| 0.00 (0.00 to 0.00) | 0 |")
    monkeypatch.setitem(base, "steps", 3)
    with pytest.raises(SystemExit, match="'dense', seed 0, had other settings"):
        study.read_runs(path)

"""The benchmark program: what it measures is the layer, and what it writes is what it measured."""

import json

import jax
import numpy as np
import oracle
import pytest
from cases import assert_close

from braidax import __main__ as program
from braidax._bench import candidates, report, run, timing, torch_peers, workloads

TINY = workloads.Workload("tiny", 8, 4, 5, 2, 6)


def test_it_measures_the_layer_of_its_arrays():
    arrays = workloads.make_arrays(TINY)
    output = candidates.ours(TINY, arrays, "blocks", "forward")()
    names = ("hidden_states", "indices", "weights", "gate_up", "down")
    tokens, indices, *others = (getattr(arrays, name) for name in names)
    wide = [np.asarray(array, np.float64) for array in (tokens, *others)]
    want = oracle.routed(wide[0], indices, *wide[1:], candidates.LIMIT)
    assert_close(output, want)
    assert all(len(set(row)) == 2 for row in indices.tolist())


def test_backward_gives_every_gradient():
    arrays = workloads.make_arrays(TINY)
    _, gradients = candidates.ours(TINY, arrays, "blocks", "forward+backward")()
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(gradients))
    assert shapes == sorted([(5, 8, 8), (5, 4, 8), (6, 8), (6, 2)])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_loads():
    def most(load):
        workload = TINY._replace(tokens=400, experts=20, load=load)
        return np.bincount(workloads.make_arrays(workload).indices.ravel(), minlength=20)

    assert most("uniform").max() < 80 and most("uniform").min() > 15
    assert most("same").tolist() == [400, 400] + [0] * 18
    assert most("zipf")[0] > 4 * most("zipf")[10:].mean()


def test_flops_and_bytes():
    s = workloads.GROUPS["layers"][0]
    assert s.rows == 24_576 and s.forward_flops == 2 * 24_576 * 3 * 512 * 256
    p8 = workloads.GROUPS["decode"][1]
    assert p8.touched_bytes == 48 * 3 * 512 * 256 * 4


def test_samples_are_interleaved():
    calls = []
    timings = timing.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls[:4] == ["a", "a", "b", "b"]
    turns = [
        name for name, before in zip(calls[4:], ["", *calls[4:]], strict=False) if name != before
    ]
    assert turns == list("ababab")
    assert all(t.lowest <= t.median <= t.highest for t in timings.values())


def result(**medians):
    timings = {name: timing.Timing(m, m, m) for name, m in medians.items()}
    return run.Result("layers", TINY, "forward", timings)


def test_ratios_are_to_the_fastest():
    measured = result(
        **{"braidax": 3.0, "torch eager": 6.0, "torch grouped_mm": 4.0, "product (jax)": 2.0}
    )
    assert measured.best_peer == "torch grouped_mm" and measured.ratio(measured.best_peer) == 0.75
    assert measured.limit == "product (jax)" and measured.ratio(measured.limit) == 1.5
    alone = result(braidax=1.0)
    assert alone.best_peer is None and alone.ratio(alone.limit) is None


@pytest.fixture
def tiny_groups(monkeypatch):
    groups = {
        "layers": (TINY,),
        "decode": (TINY._replace(tokens=1),),
        "tokens": (TINY, TINY._replace(tokens=12)),
    }
    monkeypatch.setattr(run, "GROUPS", groups)
    monkeypatch.setattr(report, "GROUPS", groups)
    monkeypatch.setattr(torch_peers, "available", lambda: False)


def test_the_program(tiny_groups, tmp_path, capsys):
    arguments = ["bench", "--rounds", "2", "--backends", "blocks", "dense", "--out", str(tmp_path)]
    assert program.main([*arguments, "--groups", "layers", "decode", "tokens"]) == 0
    output = capsys.readouterr().out
    assert f"jax {jax.__version__}" in output and "threads: cores" in output
    assert output.count("forward+backward") == 3 and output.count("braidax ") >= 7
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["workload"]["tokens"] for row in written["results"]] == [6, 6, 1, 6, 6, 12, 12]
    first = written["results"][0]
    assert first["seconds"].keys() == {"braidax", "dense", "product (jax)"}
    medians = [first["seconds"][name]["median"] for name in ("braidax", "product (jax)")]
    assert first["ratio_to_limit"] == medians[0] / medians[1]
    assert (tmp_path / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--groups", "all"], "--groups must be among layers"),
        (["--directions", "backward"], "--directions must be among forward, forward"),
        (["--rounds", "0"], "--rounds must be at least 1. Got 0"),
        (["--groups", "decode", "--directions", "forward+backward"], "no backward pass"),
        (["--backends", "fast"], "`backend` must be one of"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["bench", *arguments])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

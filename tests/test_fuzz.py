"""Damaged files and odd arguments: a few hundred of each here, BRAIDAX_FUZZ=10000 for more."""

import os
import pathlib

import pytest
from fuzz import Target, run
from fuzz_targets import TARGETS

COUNT = int(os.environ.get("BRAIDAX_FUZZ", "300"))
SEED = 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_input_works_or_gives_one_clear_error(target, tmp_path, unchecked, capsys):
    result = run(target, COUNT, SEED, tmp_path)
    with capsys.disabled():
        print(
            f"\n{target.name}: {COUNT} inputs, {result.worked} worked, {result.refused} refused,"
            f" slowest {result.slowest:.2f} s, {len(result.findings)} findings"
        )
    assert result.findings == []
    # Neither all refused nor all fine: the inputs reach both ends of the reader.
    assert result.worked >= COUNT // 50 and result.refused >= COUNT // 10


def take_memory(given, folder):
    return str(len(bytearray(2**31)))


def wait(given, folder):
    while True:
        pass


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda given, folder: [][1], "IndexError"),
        (lambda given, folder: "two\nlines", "not one printable line"),
        (lambda given, folder: "", "an empty message"),
        (lambda given, folder: "x" * 10_000, "10000 characters"),
        (lambda given, folder: os._exit if given < 0 else exit(3), "SystemExit"),
        (take_memory, "MemoryError"),
        (wait, "Hang"),
    ],
)
def test_the_runner_finds(use, what, tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setattr("fuzz.MOST_SECONDS", 0.2)
    target = Target("broken", lambda random: 1, use)
    (finding,) = run(target, 1, SEED, tmp_path).findings
    assert what in finding.what or (what == "Hang" and finding.what.endswith(" s"))

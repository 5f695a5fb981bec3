"""`python -m braidax train` on many devices, in one process and in two."""

import csv
import dataclasses
import json
import signal
import sys

import numpy as np
import pytest
from test_processes import free_port, run_pair

from braidax.__main__ import main
from braidax.training import Settings, loop, resume, train

pytestmark = pytest.mark.slow

SIZES = {"hidden": 16, "layers": 2, "heads": 2, "experts": 4, "intermediate": 8}
RUN = {"batch": 4, "length": 16, "steps": 3, "eval_windows": 8, "log_every": 1, **SIZES}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"routers choose, experts compute, sums return.\n\n\n" * 100)
    return Settings(text=str(path), **RUN)


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """Folders of the same run on one device and on four."""
    folders = {}
    for name, size in (("one", None), ("many", 2)):
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        assert train(settings, folders[name], expert_parallel=size) == 0
    return folders


def read(folder):
    """`(losses of all steps, held-out bits per byte, loads of the layers)`."""
    with open(folder / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    report = json.loads((folder / "report.json").read_text())
    loads = [layer["load"] for layer in report["layers"]]
    return np.array(losses), report["validation_bits_per_byte"], np.array(loads)


def assert_same_run(folder, other):
    for one, two in zip(read(folder), read(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_many_devices_train_as_one(runs):
    assert_same_run(runs["many"], runs["one"])


def test_a_run_continues_on_other_numbers_of_devices(settings, runs, tmp_path, monkeypatch):
    """Three steps, stopped by a signal in each but the last: on four devices in two ways, and on
    one in between."""
    windows, steps = loop.training_windows, []

    def noted(data, *, step, **others):
        steps.append(step)
        if step < settings.steps:
            signal.raise_signal(signal.SIGTERM)
        return windows(data, step=step, **others)

    monkeypatch.setattr(loop, "training_windows", noted)
    folder, stopped = tmp_path / "out", 128 + signal.SIGTERM
    assert train(settings, folder, expert_parallel=2) == stopped and steps == [1]
    assert resume(folder) == stopped and steps == [1, 2]
    assert resume(folder, expert_parallel=4) == 0 and steps == [1, 2, 3]
    assert_same_run(folder, runs["one"])


def command_and_environments(settings, folder):
    """A training run of two processes with two devices each, as Slurm would start it."""
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(settings).items()
        if name in (*RUN, "text")
    ]
    command = [sys.executable, "-m", "braidax", "train", f"--out={folder}", *options]
    port, environments = free_port(), []
    for process in (0, 1):
        address = f"127.0.0.1:{port}"
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process),
        }
        environments.append(variables)
    return [[*command, "--distributed", "--expert-parallel=4"]] * 2, environments


def test_two_processes_train_as_one(settings, runs, tmp_path):
    run_pair(*command_and_environments(settings, tmp_path / "out"))
    assert_same_run(tmp_path / "out", runs["one"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name, reason", [("", "File exists"), ("metrics.csv", "Is a dir")])
def test_two_processes_end_together_if_the_first_cannot_write(name, reason, settings, tmp_path):
    """The first save, and what comes after it. Only the first process writes, and fails."""
    folder = tmp_path / "out"
    if name:
        (folder / name).mkdir(parents=True)
    else:
        folder.write_text("a file")
    # Not by giving up on a heartbeat, after 100 s: that would end in another way.
    outputs = run_pair(*command_and_environments(settings, folder), code=2)
    for output, end in zip(outputs, ("", " (another process)"), strict=True):
        errors = [line for line in output.splitlines() if "error:" in line]
        assert len(errors) == 1 and "Traceback" not in output
        assert f"cannot write to {folder}: {reason}" in errors[0]
        assert end in errors[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--expert-parallel 0", "--expert-parallel must divide the 4 devices. Got 0."),
        ("--expert-parallel 3", "--expert-parallel must divide the 4 devices. Got 3."),
        ("--expert-parallel 4 --experts 6", "--expert-parallel must divide --experts. Got 4 and 6"),
        ("--expert-parallel 2 --dense", "need experts: remove --dense"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, settings, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", f"--out={tmp_path}", f"--text={settings.text}", *arguments.split()])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1

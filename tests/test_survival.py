"""What training survives: batches that are not finite, kills, full disks, read-only folders."""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import braidax
from braidax._training import checkpoint, corpus, loop, progress
from braidax._training.checkpoint import CheckpointError, Header
from braidax._training.corpus import CorpusError, read_corpus
from braidax._training.filters import trainable
from braidax._training.memory import least_bytes
from braidax._training.settings import Settings
from braidax._training.step import initial_state, make_optimizer, make_step

SIZES = {"hidden": 16, "layers": 2, "heads": 2, "experts": 4, "intermediate": 8}
TINY = Settings(
    batch=4, length=16, steps=6, eval_windows=8, log_every=1, checkpoint_every=2, **SIZES
)
BAD_ID = 300  # no byte: the hash layer answers NaN for that token
ARRAYS = {"weights": np.arange(3000, dtype=np.float32), "step": np.int32(7)}


@pytest.fixture(scope="module")
def compiled():
    """`(optimizer, step)` of TINY, compiled once."""
    optimizer = make_optimizer(TINY)
    return optimizer, make_step(TINY, optimizer)


@pytest.fixture
def run(tmp_path, monkeypatch, compiled):
    """`(settings, folder)` of a run that uses the compiled step and draws nothing."""
    (tmp_path / "text.txt").write_bytes(
        b"routers choose, experts compute, sums return.\n\n\n" * 200
    )
    monkeypatch.setattr(loop, "make_step", lambda settings, optimizer: compiled[1])
    monkeypatch.setattr(loop, "draw_balance", lambda folder, settings: "no picture")
    return dataclasses.replace(TINY, text=str(tmp_path / "text.txt")), tmp_path / "out"


def batch(seed):
    return np.random.default_rng(seed).integers(0, 256, (4, 17), dtype=np.int32)


def bad_batch(seed):
    windows = batch(seed)
    windows[1, 5] = BAD_ID
    return windows


def frozen(state):
    """The bytes of every leaf but the counter `skipped`: the step reuses a state's memory."""
    kept = (state.model, state.optimizer_state, state.step)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(kept, eqx.is_array))]


def after(step, state, batches):
    for windows in batches:
        state, metrics = step(windows, state)
    return state, metrics


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(compiled):
    optimizer, step = compiled
    state, metrics = after(step, initial_state(TINY, optimizer), [batch(0), batch(1)])
    assert (int(metrics.skipped), int(state.step)) == (0, 2)
    bias = np.array(state.model.layers[1].feed_forward.routed.router.score_correction_bias)
    assert np.any(bias != 0)  # there is something to keep
    before = frozen(state)
    state, metrics = after(step, state, [bad_batch(2), bad_batch(3)])
    assert np.isnan(metrics.loss) and int(metrics.skipped) == int(state.skipped) == 2
    assert frozen(state) == before

    # The bad batches leave no trace in what follows either: schedule, moments, bias.
    state, _ = after(step, state, [batch(4)])
    clean, _ = after(step, initial_state(TINY, optimizer), [batch(0), batch(1), batch(4)])
    assert frozen(state) == frozen(clean) and int(clean.skipped) == 0


def test_a_finite_loss_with_an_infinite_update_is_skipped():
    settings = dataclasses.replace(TINY, layers=1, dense=True, hash_layers=0)
    optimizer = optax.scale(float("inf"))
    state = initial_state(settings, optimizer)
    before = frozen(state)
    state, metrics = make_step(settings, optimizer)(batch(0), state)
    assert np.isfinite(metrics.loss) and int(metrics.skipped) == 1 and frozen(state) == before


def test_skipped_steps_are_reported_and_survive_a_resume(run, monkeypatch, capsys):
    settings, folder = run
    good = loop.training_windows

    def windows(data, *, step, **others):
        found = good(data, step=step, **others)
        return np.where(found == found[0, 0], BAD_ID, found) if step in (2, 3) else found

    monkeypatch.setattr(loop, "training_windows", windows)
    monkeypatch.setattr(loop, "write_report", fail(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match="checkpoint of step 6 is whole"):
        loop.start(settings, folder)
    monkeypatch.undo()
    monkeypatch.setattr(loop, "draw_balance", lambda folder, settings: "no picture")
    assert loop.resume(folder) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["skipped_steps"] == 2 and np.isfinite(report["validation_bits_per_byte"])
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped_steps"] for row in rows] == ["0", "1", "2", "2", "2", "2"]
    assert [row["loss"] == "nan" for row in rows] == [False, True, True, False, False, False]
    output = capsys.readouterr().out
    assert "skipped: 2 of 6 steps changed nothing" in output and "  skipped 2\n" in output


def fail(error):
    def raise_it(*arguments, **options):
        raise error

    return raise_it


EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("where", "error"),
    [("open", READ_ONLY), ("write", FULL), ("fsync", FULL), ("replace", READ_ONLY)]
    + [("metrics", FULL)],
)
def test_a_full_disk_or_read_only_folder_is_one_line_and_the_checkpoint_stays(
    where, error, run, compiled, monkeypatch
):
    settings, folder = run
    places = {
        "open": (checkpoint, "open"),
        "write": (checkpoint._HashingWriter, "write"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "metrics": (progress, "open"),
    }
    step = compiled[1]

    def breaks_in_step_4(windows, state):
        state, metrics = step(windows, state)
        if int(state.step) == 4:
            monkeypatch.setattr(*places[where], fail(error), raising=False)
        return state, metrics

    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_step", lambda *arguments: breaks_in_step_4)
        with pytest.raises(CheckpointError) as raised:
            loop.start(settings, folder)
    monkeypatch.undo()
    message = str(raised.value)
    assert message.startswith(f"cannot write to {folder}: {error.strerror}; ")
    assert "its checkpoint of step 2 is whole: " in message
    assert message.endswith(f"continue with: python -m braidax train --resume {folder}")
    assert "\n" not in message
    assert [path.name for path in folder.glob("*.tmp")] == []
    header = checkpoint.read_header(folder)
    state = checkpoint.load_state(folder, initial_state(settings, make_optimizer(settings)))
    assert header.step == int(state.step) == 2


def test_the_system_refuses_to_write_and_the_old_file_stays(tmp_path):
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), ARRAYS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # bytes a file may have
    try:
        with pytest.raises(OSError) as raised:
            checkpoint.save(tmp_path, Header(TINY, 2, "hash"), ARRAYS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.eqx"]
    assert checkpoint.read_header(tmp_path).step == 1
    loaded = checkpoint.load_state(tmp_path, ARRAYS)
    assert np.array_equal(loaded["weights"], ARRAYS["weights"])


def test_a_new_file_and_its_name_are_synced(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append("folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "file")
        fsync(descriptor)

    def record_replace(*paths):
        calls.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), ARRAYS)
    assert calls == ["file", "replace", "folder"]


# One process is started and forks a writer for each kill: importing JAX 50 times would take
# minutes. The writers hold NumPy arrays and never use JAX, so that its warning does not apply.
KILLER = """
import json, os, pathlib, random, signal, sys, time, warnings
warnings.filterwarnings("ignore", message="os.fork")
import numpy as np
from braidax._training import checkpoint
from braidax._training.settings import Settings

folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
state = lambda step: {name: np.full((200, 500), step, np.int32) for name in "abc"}
save = lambda step: checkpoint.save(
    folder, checkpoint.Header(Settings(steps=step + 1), step, "hash"), state(step)
)
begin = time.perf_counter()
save(0)
duration = time.perf_counter() - begin
generator, step = random.Random(0), 0
for _ in range(kills):
    writer = os.fork()
    if not writer:
        while True:
            step += 1
            save(step)
    time.sleep(generator.uniform(0, 4 * duration))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    cut_off = (folder / "checkpoint.eqx.tmp").exists()
    header = checkpoint.read_header(folder)
    loaded = checkpoint.load_state(folder, state(0))
    step = header.step
    same = all((array == step).all() for array in loaded.values())
    print(json.dumps([step, same and header.settings.steps == step + 1, cut_off]))
"""


def test_fifty_kills_at_random_moments_leave_a_checkpoint_that_loads(tmp_path):
    kills = 50
    source = pathlib.Path(braidax.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills)],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    steps, same, cut_off = zip(*map(json.loads, result.stdout.splitlines()), strict=True)
    assert len(steps) == kills and all(same)
    # The kills did hit: in the middle of a save, and after some had ended.
    assert sum(cut_off) >= kills // 10 and steps[-1] >= kills // 10
    assert list(steps) == sorted(steps)


def test_a_row_cut_off_by_a_kill_is_left_out(tmp_path):
    settings = dataclasses.replace(TINY, log_every=100)
    whole = "step,...\r\n100,1.5,2.1,9,0,0.5,0.5\r\n200,1.4,2.0,9,0,0.5,0.5\r\n"
    for rest in ("", "1", "10", "300", "300,1.3,1."):
        (tmp_path / "metrics.csv").write_text(whole + rest, newline="")
        progress.Progress(settings, tmp_path, 200)
        steps, violations = progress.read_history(tmp_path)
        assert (steps, violations) == ([100, 200], [[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("error", [MemoryError(), EXHAUSTED])
def test_too_big_for_the_machine_is_one_line(error, run, monkeypatch):
    settings, folder = run
    monkeypatch.setattr(loop, "initial_state", fail(error))
    with pytest.raises(ValueError, match="does not fit in memory: lower --batch"):
        loop.start(settings, folder)
    assert not folder.exists()


def test_other_errors_of_the_compiler_are_not_hidden(run, monkeypatch):
    settings, folder = run
    monkeypatch.setattr(loop, "initial_state", fail(jax.errors.JaxRuntimeError("INTERNAL: bug")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: bug"):
        loop.start(settings, folder)


def test_a_run_larger_than_the_machine_is_refused_before_it_starts(run, monkeypatch):
    settings, folder = run
    monkeypatch.setattr(loop, "initial_state", fail(AssertionError("started")))
    for name in ("hidden", "layers", "experts", "intermediate", "batch", "length"):
        huge = dataclasses.replace(settings, **{"heads": 1, name: 2**31 - 2})
        with pytest.raises(ValueError, match="needs at least .* GiB of memory, the machine has"):
            loop.start(huge, folder)


@pytest.mark.parametrize("dense", [False, True])
def test_the_bound_of_memory_counts_the_parameters(dense):
    settings = dataclasses.replace(TINY, dense=dense, batch=1, length=1)
    state = initial_state(settings, optax.identity())
    trained = eqx.filter(state.model, trainable(state.model))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained))
    bound = (least_bytes(settings) / 4 - 2 * 256) / 4
    assert 0.98 * parameters < bound <= parameters  # the norms' scales are left out


def test_a_device_and_a_whole_disk_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="^--text /dev/zero: neither a file nor a folder$"):
        read_corpus("/dev/zero")
    for name in "abcdef":
        (tmp_path / name).write_bytes(b"x" * 100)
    monkeypatch.setattr(corpus, "_MOST_BYTES", 599)
    monkeypatch.setattr(corpus, "_read", fail(AssertionError("read")))
    with pytest.raises(CorpusError, match="too long: at most 599 bytes are read"):
        read_corpus(str(tmp_path))

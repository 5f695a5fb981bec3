"""What training survives: batches that are not finite, kills, full disks, read-only folders."""

import contextlib
import csv
import dataclasses
import errno
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import SENTENCE, TINY, compiled_step

import braidax
from braidax import _atomic_file
from braidax._checkpoint.safetensors_writer import write_safetensors
from braidax.training import (
    UserError,
    checkpoint,
    corpus,
    initial_state,
    loop,
    make_step,
    metrics,
    read_corpus,
    resume,
    train,
)
from braidax.training.checkpoint import Header

BAD_ID = 300  # no byte: the hash layer answers NaN for that token
ARRAYS = {"weights": np.arange(3000, dtype=np.float32), "step": np.int32(7)}


def like_arrays(settings):
    return {"weights": jnp.zeros(3000), "step": jnp.int32(0)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`(settings, folder)` of a run of six steps that uses the compiled step."""
    (tmp_path / "text.txt").write_bytes(SENTENCE * 200)
    changes = {"steps": 6, "log_every": 1, "checkpoint_every": 2}
    settings = dataclasses.replace(TINY, text=str(tmp_path / "text.txt"), **changes)
    monkeypatch.setattr(loop, "make_step", lambda settings: compiled_step(TINY))
    return settings, tmp_path / "out"


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
        state, loss, _ = step(windows, state)
    return state, float(loss)


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted():
    step = compiled_step(TINY)
    state, _ = after(step, initial_state(TINY), [batch(0), batch(1)])
    assert (int(state.skipped), int(state.step)) == (0, 2)
    assert np.any(np.array(braidax.routers(state.model)[1].score_correction_bias) != 0)
    before = frozen(state)
    state, loss = after(step, state, [bad_batch(2), bad_batch(3)])
    assert np.isnan(loss) and int(state.skipped) == 2 and frozen(state) == before

    # The bad batches leave no trace in what follows either: schedule, moments, bias.
    state, _ = after(step, state, [batch(4)])
    clean, _ = after(step, initial_state(TINY), [batch(0), batch(1), batch(4)])
    assert frozen(state) == frozen(clean) and int(clean.skipped) == 0


def test_a_finite_loss_with_an_update_that_overflows_is_skipped():
    settings = dataclasses.replace(TINY, layers=1, dense=True, hash_layers=0)
    state, optimizer = initial_state(settings), optax.scale(float("inf"))
    trained = eqx.filter(state.model, braidax.trainable(state.model))
    state = dataclasses.replace(state, optimizer_state=optimizer.init(trained))
    before = frozen(state)
    state, loss = after(make_step(settings, optimizer), state, [batch(0)])
    assert np.isfinite(loss) and int(state.skipped) == 1 and frozen(state) == before


def test_a_finite_gradient_whose_norm_overflows_is_skipped():
    """Clipping would divide by the norm, and move all moments towards zero."""
    state = initial_state(TINY)
    large = 1e25 * state.model.head.weight
    state = eqx.tree_at(lambda state: state.model.head.weight, state, large)
    before = frozen(state)
    state, loss = after(compiled_step(TINY), state, [batch(0)])
    assert 1e20 < loss < np.inf and int(state.skipped) == 1 and frozen(state) == before


@pytest.mark.slow
def test_skipped_steps_are_reported_and_survive_a_resume(run, monkeypatch, capsys):
    settings, folder = run
    good = loop.training_windows

    def windows(data, *, step, **others):
        found = good(data, step=step, **others)
        return np.where(found == found[0, 0], BAD_ID, found) if step in (2, 3) else found

    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_windows", windows)
        patched.setattr(loop, "write_report", fail(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(UserError, match="its last checkpoint is whole"):
            train(settings, folder)
    assert resume(folder) == 0
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


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))
PLACES = {
    "open": (_atomic_file, "open", READ_ONLY),
    "fsync": (os, "fsync", FULL),
    "replace": (os, "replace", READ_ONLY),
    "metrics": (metrics, "open", FULL),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_full_disk_or_read_only_folder_is_one_line_and_the_checkpoint_stays(
    where, run, monkeypatch
):
    (settings, folder), (module, name, error) = run, PLACES[where]
    step = compiled_step(TINY)

    def breaks_in_step_4(windows, state):
        results = step(windows, state)
        if int(results[0].step) == 4:
            monkeypatch.setattr(module, name, fail(error), raising=False)
        return results

    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_step", lambda settings: breaks_in_step_4)
        with pytest.raises(UserError) as raised:
            train(settings, folder)
    monkeypatch.undo()
    message = str(raised.value)
    assert message.startswith(f"cannot write to {folder}: {error.strerror}; ")
    assert "its last checkpoint is whole: " in message and "\n" not in message
    assert message.endswith(f"python -m braidax train --resume {folder}")
    assert list(folder.glob("*.tmp")) == []
    header, state = checkpoint.load(folder, initial_state)
    assert header.step == int(state.step) == 2


def test_a_folder_that_cannot_be_made_is_one_line(run):
    settings, folder = run
    folder.write_text("a file")
    with pytest.raises(UserError, match=f"^cannot write to {folder}: File exists$"):
        train(settings, folder)


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
    header, loaded = checkpoint.load(tmp_path, like_arrays)
    assert header == Header(TINY, 1, "hash") and loaded["step"] == 7
    assert np.array_equal(loaded["weights"], ARRAYS["weights"])


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), ARRAYS)
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("refused", [None, "fsync"])
@pytest.mark.parametrize("write", ["checkpoint.eqx", "layer.safetensors"])
def test_no_open_file_is_renamed_or_removed(tmp_path, monkeypatch, write, refused):
    """Windows does neither. Both writers must have closed the file by then, on an error too."""
    calls, replace, unlink = [], os.replace, os.unlink

    def look(path):
        open_files = (os.path.realpath(link) for link in pathlib.Path("/proc/self/fd").iterdir())
        calls.append(os.fspath(path) in open_files)

    monkeypatch.setattr(os, "replace", lambda old, new: (look(old), replace(old, new)))
    monkeypatch.setattr(os, "unlink", lambda path: (look(path), unlink(path)))
    if refused:
        monkeypatch.setattr(os, refused, fail(FULL))
    with pytest.raises(OSError) if refused else contextlib.nullcontext():
        if write == "checkpoint.eqx":
            checkpoint.save(tmp_path, Header(TINY, 1, "hash"), ARRAYS)
        else:
            write_safetensors(tmp_path / write, {"x": np.zeros(3)})
    assert calls == [False]
    assert [path.name for path in tmp_path.iterdir()] == ([] if refused else [write])


@pytest.mark.parametrize("damage", ["cut", "longer", "bit", "empty", "text"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path):
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), ARRAYS)
    path = tmp_path / "checkpoint.eqx"
    whole = path.read_bytes()
    bit = whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]
    damaged = {"cut": whole[:-3], "longer": whole + b"x", "bit": bit, "empty": b"", "text": b"a\n"}
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="is damaged or no checkpoint: its checksum"):
        checkpoint.load(tmp_path, like_arrays)


@pytest.mark.parametrize(
    "changes",
    [{"format": 99}, {"settings": {"stepz": 1}}, {"settings": {"steps": 0}}, {"more": 1}, {}],
)
def test_a_checkpoint_of_another_version_is_named(changes, tmp_path):
    """Another header, or with `{}` other arrays, under a checksum that is right."""
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), ARRAYS)
    path = tmp_path / "checkpoint.eqx"
    line, leaves = path.read_bytes()[:-32].split(b"\n", 1)
    content = json.dumps({**json.loads(line), **changes}).encode() + b"\n" + leaves
    path.write_bytes(content + checkpoint.hashlib.sha256(content).digest())
    like = like_arrays if changes else lambda settings: {"step": jnp.zeros(5)}
    with pytest.raises(UserError, match="is not a checkpoint of this version: ") as error:
        checkpoint.load(tmp_path, like)
    assert "\n" not in str(error.value)


def test_a_changed_text_is_named(run):
    settings, folder = run
    checkpoint.save(folder, Header(settings, 0, "0123"), initial_state(settings))
    with pytest.raises(UserError, match="has changed: sha256 .* trained on 0123"):
        resume(folder)


WRITER = """
import pathlib, sys
import numpy as np
from braidax.training import Settings, checkpoint

folder, step = pathlib.Path(sys.argv[1]), 0
while True:
    state = {name: np.full((200, 500), step, np.int32) for name in "abc"}
    checkpoint.save(folder, checkpoint.Header(Settings(steps=step + 1), step, "hash"), state)
    step += 1
"""


def test_fifty_kills_at_random_moments_leave_a_checkpoint_that_loads(tmp_path):
    """A stopped process leaves what a killed one does, and goes on to the next moment: a new
    process for each would take minutes to import JAX. The last one is killed."""
    source, path = pathlib.Path(braidax.__file__).parents[1], tmp_path / "checkpoint.eqx"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    generator, steps, cut_off = random.Random(0), [], 0

    def look():
        header, loaded = checkpoint.load(
            tmp_path, lambda settings: {name: jnp.zeros((200, 500), jnp.int32) for name in "abc"}
        )
        assert all(np.all(array == header.step) for array in loaded.values())
        assert header.settings.steps == header.step + 1
        steps.append(header.step)
        return any(tmp_path.glob("*.tmp"))

    try:
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        for _ in range(50):
            time.sleep(generator.uniform(0, 0.03))
            writer.send_signal(signal.SIGSTOP)
            os.waitpid(writer.pid, os.WUNTRACED)
            cut_off += look()
            writer.send_signal(signal.SIGCONT)
    finally:
        writer.kill()
        writer.wait()
    look()
    # The moments were in the middle of a save, and after some had ended.
    assert steps == sorted(steps) and steps[-1] >= 5 and cut_off >= 5


def test_a_device_and_a_whole_disk_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="^--text /dev/zero: neither a file nor a folder$"):
        read_corpus("/dev/zero")
    (tmp_path / "large").write_bytes(b"x" * 600)
    monkeypatch.setattr(corpus, "_MOST_BYTES", 599)
    monkeypatch.setattr(pathlib.Path, "read_bytes", fail(AssertionError("read")))
    with pytest.raises(UserError, match="too long: at most 599 bytes are read"):
        read_corpus(str(tmp_path))

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braidax
from braidax.__main__ import main
from braidax._training import checkpoint, loop
from braidax._training.checkpoint import CheckpointError, Header
from braidax._training.language_model import LanguageModel
from braidax._training.settings import Settings, UserError
from braidax._training.step import initial_state, make_optimizer, make_step

SIZES = {"hidden": 16, "layers": 2, "heads": 2, "experts": 4, "intermediate": 8}
TINY = Settings(batch=4, length=16, steps=6, eval_windows=8, log_every=2, **SIZES)
OPTIONS = (
    "--hidden 16 --layers 2 --heads 2 --experts 4 --intermediate 8 --batch 4 --length 16"
    " --eval-windows 8 --steps 500 --log-every 25 --checkpoint-every 20"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 9,600 bytes: one sentence, again and again."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"routers choose, experts compute, sums return.\n\n\n" * 200)
    return str(path)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, text):
    """`(settings, folder, output)` of one short run, made once and only read."""
    settings, folder = dataclasses.replace(TINY, text=text), tmp_path_factory.mktemp("run") / "out"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert loop.start(settings, folder) == 0
    return settings, folder, output.getvalue()


def test_first_layer_routes_by_id_alone_and_the_last_by_hidden_state(getkey):
    model = LanguageModel(dataclasses.replace(TINY, layers=4), key=getkey())
    ids = jax.random.randint(getkey(), (2, 12), 0, 256)
    hidden_states = jax.random.normal(getkey(), (2, 12, 16))
    permuted = hidden_states[:, ::-1]

    @eqx.filter_jit
    def routing(block, hidden_states, ids):
        return block(hidden_states, ids)[1]

    def indices(layer, hidden_states, ids):
        return np.sort(routing(model.layers[layer].feed_forward, hidden_states, ids).indices)

    by_id = indices(0, hidden_states, ids)
    assert np.array_equal(by_id, indices(0, permuted, ids))
    assert np.array_equal(by_id, np.sort(model.layers[0].feed_forward.routed.router.table[ids]))
    assert not np.array_equal(by_id, indices(0, hidden_states, ids[:, ::-1]))

    by_content = indices(3, hidden_states, ids)
    assert np.array_equal(by_content, indices(3, hidden_states, ids[:, ::-1]))
    assert np.array_equal(by_content[:, ::-1], indices(3, permuted, ids))
    assert not np.array_equal(by_content, indices(3, permuted, ids))


def test_model_is_causal_and_returns_one_routing_per_layer(getkey):
    model = LanguageModel(TINY, key=getkey())
    ids = jax.random.randint(getkey(), (2, 12), 0, 256)
    model = eqx.filter_jit(model)
    logits, routings = model(ids)
    assert logits.shape == (2, 12, 256) and len(routings) == 2
    changed, _ = model(ids.at[:, 7].set((ids[:, 7] + 1) % 256))
    assert jnp.allclose(logits[:, :7], changed[:, :7], atol=1e-5)
    assert not jnp.allclose(logits[:, 7:], changed[:, 7:], atol=1e-3)


def test_dense_model_has_at_least_the_active_parameters(getkey):
    settings = Settings()
    active = 3 * 64 * 64 * (2 + 1) + 16 * 64  # three experts' matrices and the gate
    dense = 3 * 64 * settings.dense_width()
    assert active <= dense < active + 3 * 64
    model = LanguageModel(dataclasses.replace(TINY, dense=True, layers=1), key=getkey())
    _, routings = model(jnp.zeros((1, 3), dtype=jnp.int32))
    assert routings == ()


@pytest.mark.parametrize("dense", [False, True])
def test_loss_falls_and_the_table_stays(dense):
    settings = dataclasses.replace(TINY, steps=60, dense=dense, learning_rate=0.01)
    optimizer = make_optimizer(settings)
    state = initial_state(settings, optimizer)
    routers = [] if dense else [layer.feed_forward.routed.router for layer in state.model.layers]
    table = np.array(routers[0].table) if routers else None
    step = make_step(settings, optimizer)
    windows = np.frombuffer(b"abcdefgh" * 9, np.uint8)[: 4 * 17].reshape(4, 17).astype(np.int32)
    losses = []
    for _ in range(settings.steps):
        state, metrics = step(windows, state)
        losses.append(float(metrics.loss))
    assert losses[0] > 4 and losses[-1] < 1
    if routers:
        routers = [layer.feed_forward.routed.router for layer in state.model.layers]
        assert np.array_equal(routers[0].table, table)
        bias = np.asarray(routers[1].score_correction_bias)
        assert np.any(bias != 0) and np.all(np.abs(bias) <= settings.steps * settings.balance_rate)


def test_run_writes_everything(finished_run):
    _, folder, output = finished_run
    report = json.loads((folder / "report.json").read_text())
    written = {path.name for path in folder.iterdir()}
    assert {"checkpoint.eqx", "metrics.csv", "report.json"} <= written
    assert not [name for name in written if name.endswith(".tmp")]
    assert report["corpus"]["sha256"] in output and "by position" in output
    assert f"validation: {report['validation_bits_per_byte']:.4f} bits/byte" in output
    assert [layer["layer"] for layer in report["layers"]] == ["0 (hash)", "1"]
    for layer in report["layers"]:
        load = layer["load"]
        assert sum(load) == report["validation_bytes"] * 2
        assert layer["max_violation"] == pytest.approx(max(load) / np.mean(load) - 1, rel=1e-5)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].endswith("max_violation_layer_0,max_violation_layer_1")
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "4", "6"]
    loss, bits = (float(value) for value in rows[-1].split(",")[1:3])
    assert bits == pytest.approx(loss / math.log(2))


@pytest.fixture(scope="module")
def command(text, tmp_path_factory):
    """A function that starts the program on `text`; the processes share what they compile."""
    source = pathlib.Path(braidax.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # The loader of cached programs reports machine features at length.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

    def start(*arguments):
        # A file and not a pipe: nobody reads it while the run goes on, and a full pipe stops it.
        errors = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            [sys.executable, "-m", "braidax", "train", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        return process, errors

    return start


def finish(started):
    process, errors = started
    with errors:
        output, _ = process.communicate(timeout=120)
        errors.seek(0)
        return process.returncode, output, errors.read()


def stop_after(started, line, number):
    """Send `number` as soon as the run has printed a line that contains `line`."""
    process, errors = started
    for printed in process.stdout:
        if line in printed:
            process.send_signal(number)
            return
    process.wait(timeout=120)
    errors.seek(0)
    raise AssertionError(errors.read())


def losses(folder):
    """The rows of metrics.csv without the speed."""
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    return [row.split(",")[:3] + row.split(",")[4:] for row in rows]


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)],
)
def test_a_killed_or_stopped_run_resumes_exactly(number, exit_code, tmp_path, text, command, whole):
    process = command(*OPTIONS, "--text", text, "--out", tmp_path / "out")
    stop_after(process, "step  25/", number)
    code, output, errors = finish(process)
    assert (code, errors) == (exit_code, "")
    step = checkpoint.read_header(tmp_path / "out").step
    assert 20 <= step < 500
    if number != signal.SIGKILL:
        assert f"stopped after step {step}; continue with: " in output
        assert output.strip().endswith(f"--resume {tmp_path / 'out'}")

    code, output, errors = finish(command("--resume", tmp_path / "out"))
    assert (code, errors) == (0, "") and f"after step {step}\n" in output
    for name in ("checkpoint.eqx", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert losses(tmp_path / "out") == losses(whole)


def test_sigterm_saves_and_exits_with_143(tmp_path, text, command):
    process = command(*OPTIONS, "--text", text, "--out", tmp_path / "out")
    stop_after(process, "step   1/", signal.SIGTERM)
    code, output, errors = finish(process)
    step = checkpoint.read_header(tmp_path / "out").step
    assert (code, errors) == (143, "") and f"stopped after step {step};" in output


@pytest.fixture(scope="module")
def whole(command, text, tmp_path_factory):
    """The folder of the same run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, errors = finish(command(*OPTIONS, "--text", text, "--out", folder))
    assert (code, errors) == (0, "")
    return folder


def test_a_stop_request_lets_the_second_signal_through():
    from braidax._training.interrupt import StopRequest

    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.signal_number is None
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        assert request.signal_number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    state = {"values": jnp.arange(3.0)}
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), state)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(eqx, "tree_serialise_leaves", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, Header(TINY, 2, "hash"), state)
    assert checkpoint.read_header(tmp_path) == Header(TINY, 1, "hash")
    restored = checkpoint.load_state(tmp_path, {"values": jnp.zeros(3)})
    assert restored["values"].tolist() == [0.0, 1.0, 2.0]


def test_changed_text_is_named(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"some text. " * 500)
    settings = dataclasses.replace(TINY, text=str(tmp_path / "text.txt"))
    checkpoint.save(tmp_path, Header(settings, 0, "0123"), {})
    with pytest.raises(CheckpointError, match="has changed: sha256 .* trained on 0123"):
        loop.resume(tmp_path)


def test_damaged_checkpoint_is_named(tmp_path):
    state, path = {"values": jnp.arange(3.0)}, tmp_path / "checkpoint.eqx"
    checkpoint.save(tmp_path, Header(TINY, 1, "hash"), state)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole + b"x", whole.replace(b"NUMPY", b"DUMPY")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged") as error:
            checkpoint.load_state(tmp_path, state)
        assert "\n" not in str(error.value)
    for header in (b"", b"text\n", b'{"format": 99}\n', b"[]\n", b"\xff\xfe\n"):
        path.write_bytes(header)
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            checkpoint.read_header(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --step 3", "unrecognized arguments"),
        ("train --steps x", "invalid int value"),
        ("train --steps 0", "--steps must be at least 1. Got 0."),
        ("train --learning-rate nan", "--learning-rate must be at least 0. Got nan."),
        ("train --seed -1", "--seed must be at least 0"),
        ("train --hidden 30", "--hidden must be a multiple of twice --heads"),
        ("train --experts 4 --experts-per-token 5", "--experts-per-token must be at most"),
        ("train --layers 2 --hash-layers 3", "--hash-layers must be at most"),
        ("train --text missing.txt", "no such file or folder"),
        ("train --text empty.txt", "no text to train on"),
        ("train --text short.txt", "too short"),
        ("train --text short.txt --length 2 --out short.txt", "cannot write to --out"),
        ("train --resume nowhere", "cannot read nowhere"),
        ("train --resume nowhere --seed 1", "remove --seed"),
        ("train --resume nowhere --out other", "remove --out"),
        ("walk", "invalid choice"),
        ("", "required"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("only a few words, thirty or more bytes")
    with pytest.raises(SystemExit) as exit_request:
        main(arguments.split())
    output, errors = capsys.readouterr()
    assert exit_request.value.code == 2 and output == ""
    assert message in errors and errors.count("\n") == 1 and "error: " in errors
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_overwritten(finished_run):
    settings, folder, _ = finished_run
    with pytest.raises(UserError, match="already holds a run"):
        loop.start(settings, folder)


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_request:
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit_request.value.code == 0 and "0.001" in shown
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        default = "(default: off)" if field.default is False else f"(default: {field.default})"
        assert flag in shown and (field.default is None or default in shown)


def test_importing_the_package_leaves_the_training_program_alone():
    source = pathlib.Path(braidax.__file__).parents[1]
    script = (
        "import sys, braidax; heavy = ('_training.loop', '_training.language_model', 'matplotlib',"
        " 'tqdm'); print([m for m in sys.modules if m.endswith(heavy)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"

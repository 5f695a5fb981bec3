"""`python -m braidax train` and `report`: the model, the run, its files and its end."""

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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but_one
from training_runs import SENTENCE, TINY, compiled_step, share_compiled_steps

import braidax
from braidax.__main__ import main
from braidax.training import (
    LanguageModel,
    Settings,
    UserError,
    checkpoint,
    initial_state,
    loop,
    resume,
    train,
)
from braidax.training.reports import byte_text


@pytest.fixture(autouse=True)
def shared_steps(monkeypatch):
    share_compiled_steps(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 9,600 bytes: one sentence, again and again."""
    path = tmp_path_factory.mktemp("text") / "text <b>.txt"
    path.write_bytes(SENTENCE * 200)
    return str(path)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, text):
    """`(settings, folder, output)` of one short run, made once and only read."""
    settings, folder = dataclasses.replace(TINY, text=text), tmp_path_factory.mktemp("run") / "out"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as monkeypatch:
        share_compiled_steps(monkeypatch)
        assert train(settings, folder) == 0
    return settings, folder, output.getvalue()


# --- the model --------------------------------------------------------------------------------


def test_first_layer_routes_by_id_alone_and_the_last_by_hidden_state(getkey):
    model = LanguageModel(TINY, key=getkey())
    ids = jax.random.randint(getkey(), (2, 12), 0, 256)
    hidden_states = jax.random.normal(getkey(), (2, 12, 16))
    permuted = hidden_states[:, ::-1]
    routing = eqx.filter_jit(lambda block, hidden_states, ids: block(hidden_states, ids)[1])

    def indices(layer, hidden_states, ids):
        return np.sort(routing(model.layers[layer].feed_forward, hidden_states, ids).indices)

    by_id = indices(0, hidden_states, ids)
    assert np.array_equal(by_id, indices(0, permuted, ids))
    assert np.array_equal(by_id, np.sort(model.layers[0].feed_forward.routed.router.table[ids]))
    assert not np.array_equal(by_id, indices(0, hidden_states, ids[:, ::-1]))

    by_content = indices(1, hidden_states, ids)
    assert np.array_equal(by_content, indices(1, hidden_states, ids[:, ::-1]))
    assert np.array_equal(by_content[:, ::-1], indices(1, permuted, ids))
    assert not np.array_equal(by_content, indices(1, permuted, ids))


def test_model_is_causal_knows_positions_and_returns_one_routing_per_layer(getkey):
    model = eqx.filter_jit(LanguageModel(TINY, key=getkey()))
    ids = jax.random.randint(getkey(), (2, 12), 0, 256)
    logits, routings = model(ids)
    assert logits.shape == (2, 12, 256) and len(routings) == 2
    changed, _ = model(ids.at[:, 7].set((ids[:, 7] + 1) % 256))
    assert jnp.allclose(logits[:, :7], changed[:, :7], atol=1e-5)
    assert not jnp.allclose(logits[:, 7:], changed[:, 7:], atol=1e-3)
    # Attention alone does not tell the order of what came before.
    swapped, _ = model(ids[:, [1, 0, *range(2, 12)]])
    assert not jnp.allclose(logits[:, 2:], swapped[:, 2:], atol=1e-4)


def test_dense_model_has_at_least_the_active_parameters():
    settings = Settings()
    active = 3 * 64 * 64 * (2 + 1) + 16 * 64  # three experts' matrices and the gate
    assert active <= 3 * 64 * settings.dense_width() < active + 3 * 64
    assert dataclasses.replace(settings, dense=True).layer_names() == ()


@pytest.mark.parametrize("dense", slow_but_one([False, True]))
def test_loss_falls_and_the_table_stays(dense):
    settings = dataclasses.replace(TINY, dense=dense)
    state, step = initial_state(settings), compiled_step(settings)
    routers = braidax.routers(state.model)
    assert len(routers) == (0 if dense else 2)
    table = None if dense else np.array(routers[0].table)
    windows = np.frombuffer(b"abcdefgh" * 9, np.uint8)[: 4 * 17].reshape(4, 17).astype(np.int32)
    losses = []
    for _ in range(150):
        state, loss, violations = step(windows, state)
        losses.append(float(loss))
    assert losses[0] > 4 and losses[-1] < 1 and violations.shape == (len(routers),)
    if not dense:
        routers = braidax.routers(state.model)
        assert np.array_equal(routers[0].table, table)
        bias = np.asarray(routers[1].score_correction_bias)
        assert np.any(bias != 0) and np.all(np.abs(bias) <= 150 * settings.balance_rate)


# --- the run ----------------------------------------------------------------------------------


def test_run_writes_everything(finished_run):
    _, folder, output = finished_run
    report = json.loads((folder / "report.json").read_text())
    names = {"checkpoint.eqx", "metrics.csv", "report.json", "balance.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "balance.png").read_bytes().startswith(b"\x89PNG")
    assert report["corpus"]["sha256"] in output
    assert f"validation: {report['validation_bits_per_byte']:.4f} bits/byte" in output
    assert [layer["layer"] for layer in report["layers"]] == ["0 (hash)", "1"]
    for layer in report["layers"]:
        load = layer["load"]
        assert sum(load) == report["validation_bytes"] * 2 == 8 * 16 * 2
        assert layer["max_violation"] == pytest.approx(max(load) / np.mean(load) - 1, rel=1e-5)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].endswith("max_violation_layer_0,max_violation_layer_1")
    assert [row.split(",")[0] for row in rows[1:]] == ["1", *map(str, range(10, 301, 10))]
    loss, bits = (float(value) for value in rows[-1].split(",")[1:3])
    assert bits == pytest.approx(loss / math.log(2))


def test_a_dense_run_has_no_routing_to_draw_or_report(tmp_path, text, capsys):
    settings = dataclasses.replace(TINY, text=text, dense=True, log_every=200)
    assert train(settings, tmp_path) == 0
    assert "MaxVio -  dead experts -\nno balance.png: a dense model" in capsys.readouterr().out
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "200", "300"]
    with pytest.raises(UserError, match="dense model, which has no routing to report on"):
        braidax.training.report_run(tmp_path)


def test_a_run_is_not_overwritten(finished_run):
    settings, folder, _ = finished_run
    with pytest.raises(UserError, match="already holds a run"):
        train(settings, folder)


def assert_same_files(folder, other):
    for name in ("checkpoint.eqx", "report.json", "metrics.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("number", slow_but_one([signal.SIGINT, signal.SIGTERM]))
def test_a_stopped_run_resumes_exactly(number, finished_run, tmp_path, monkeypatch, capsys):
    """Stopped in step 13, which neither a checkpoint nor a row was due after."""
    settings, whole, _ = finished_run
    folder, windows, before = tmp_path / "a b", loop.training_windows, signal.getsignal(number)

    def windows_and_signal(data, *, step, **others):
        if step == 13:
            signal.raise_signal(number)
            assert signal.getsignal(number) is before  # a second one would stop the process
        return windows(data, step=step, **others)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_windows", windows_and_signal)
        assert train(settings, folder) == 128 + number
    command = f"continue with: python -m braidax train --resume '{folder}'\n"
    assert capsys.readouterr().out.endswith(f"stopped after step 13; {command}")
    assert signal.getsignal(number) is before
    assert checkpoint.load(folder, initial_state)[0].step == 13
    assert resume(folder) == 0
    assert f"resuming {folder} after step 13\n" in capsys.readouterr().out
    assert_same_files(folder, whole)


def test_a_run_that_ended_without_a_word_resumes_exactly(finished_run, tmp_path, monkeypatch):
    """It ends in step 35, and a part of the row of step 40 is there."""
    settings, whole, _ = finished_run
    windows = loop.training_windows

    def windows_until_35(data, *, step, **others):
        if step == 35:
            raise SystemExit
        return windows(data, step=step, **others)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_windows", windows_until_35)
        with pytest.raises(SystemExit):
            train(settings, tmp_path)
    assert checkpoint.load(tmp_path, initial_state)[0].step == 20
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("40,1.3,1.")
    assert resume(tmp_path) == 0
    assert_same_files(tmp_path, whole)


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_resumes_exactly(finished_run, tmp_path):
    settings, whole, _ = finished_run
    values = dataclasses.asdict(settings).items()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values if name != "dense"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(braidax.__file__).parents[1]),
        # The loader of cached programs reports machine features at length.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # A file and not a pipe: nobody reads it while the run goes on.
    with open(tmp_path / "errors", "w+") as errors:
        streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        command = [sys.executable, "-m", "braidax", "train", "--out", tmp_path / "out", *options]
        with subprocess.Popen(command, env=environment, **streams) as process:
            output = ""
            for line in process.stdout:
                output += line
                if line.startswith("step  10/"):
                    process.send_signal(signal.SIGTERM)
        errors.seek(0)
        assert (process.returncode, errors.read()) == (143, "")
    step = checkpoint.load(tmp_path / "out", initial_state)[0].step
    assert f"stopped after step {step}; continue with: " in output and 10 <= step < 300
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0
    assert_same_files(tmp_path / "out", whole)


# --- python -m braidax report -----------------------------------------------------------------


def test_report_says_what_the_training_run_said(finished_run, tmp_path, capsys):
    _, run, _ = finished_run
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["report", str(run), "--out", str(tmp_path / "new")]) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    output = capsys.readouterr().out
    trained = json.loads((run / "report.json").read_text())
    assert f"step 300 of 300, {trained['validation_bits_per_byte']:.4f} bits/byte on 128" in output
    assert "2 layers of 4 experts, 128 tokens in 2 batches" in output
    hashed, top_k = (f"{layer['max_violation']:.2f}" for layer in trained["layers"])
    assert output.index(f"\n1{top_k:>12}") < output.index(f"\n0{hashed:>12}")
    page = (tmp_path / "new" / "report.html").read_text()
    assert "<b>" not in page and "text &lt;b&gt;.txt" in page and "top tokens of layer 1" in page
    for name in ("load.png", "coactivation.png", "token_experts.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_report_writes_beside_the_checkpoint_and_needs_no_matplotlib(
    finished_run, tmp_path, monkeypatch, capsys
):
    _, run, _ = finished_run
    (tmp_path / "checkpoint.eqx").write_bytes((run / "checkpoint.eqx").read_bytes())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path / "checkpoint.eqx")]) == 0
    assert "no pictures: Plots need matplotlib" in capsys.readouterr().out
    names = {"checkpoint.eqx", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_bytes_as_text():
    assert [byte_text(byte) for byte in (97, 10, 228)] == ["a", "\n", "0xe4"]
    assert len({byte_text(byte) for byte in range(256)}) == 256


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --step 3", "unrecognized arguments"),
        ("train --steps x", "invalid int value"),
        ("train --steps 0", "--steps must be at least 1 and below 2**31. Got 0."),
        ("train --batch 2147483648", "--batch must be at least 1 and below 2**31"),
        ("train --learning-rate nan", "--learning-rate must be at least 0 and below 2**31"),
        ("train --seed -1", "--seed must be at least 0"),
        ("train --hidden 30", "--hidden must be a multiple of twice --heads"),
        ("train --experts 4 --experts-per-token 5", "--experts-per-token must be at most"),
        ("train --layers 2 --hash-layers 3", "--hash-layers must be at most"),
        ("train --text missing.txt", "no such file or folder"),
        ("train --text empty.txt", "no text to train on"),
        ("train --text short.txt", "too short"),
        ("train --text=", "--text must name a file or folder"),
        ("train --resume nowhere", "cannot read nowhere"),
        ("train --resume nowhere --seed 1", "remove --seed"),
        ("train --resume nowhere --out other", "remove --out"),
        ("train --resume \0", "must not hold a zero byte"),
        ("report nowhere", "cannot read nowhere"),
        ("walk", "invalid choice"),
        ("", "required"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("only a few words, thirty or more bytes")
    with pytest.raises(SystemExit) as exit_request:
        main(arguments.split(" ") if arguments else [])
    output, errors = capsys.readouterr()
    assert exit_request.value.code == 2 and output == ""
    assert message in errors and errors.count("\n") == 1 and "error: " in errors
    assert not (tmp_path / "runs").exists()


EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nby far")


@pytest.mark.parametrize("error", [MemoryError(), EXHAUSTED])
def test_too_big_for_the_machine_is_one_line(error, text, tmp_path, monkeypatch, capsys):
    def fail(settings):
        raise error

    monkeypatch.setattr(loop, "initial_state", fail)
    arguments = ["train", f"--text={text}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit):
        main(arguments)
    errors = capsys.readouterr().err
    assert "does not fit in memory: lower --batch" in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
    error = jax.errors.JaxRuntimeError("INTERNAL: bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: bug"):
        main(arguments)


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
        "import sys, braidax; heavy = ('braidax.training', 'matplotlib', 'tqdm');"
        " print([m for m in sys.modules if m.startswith(heavy)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_has_a_docstring():
    names = [name for name in vars(braidax.training) if not name.startswith("_")]
    public = [getattr(braidax.training, name) for name in names]
    functions = [value for value in public if callable(value)]
    assert len(functions) >= 15 and all(value.__doc__ for value in functions)

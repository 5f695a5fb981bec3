"""`python -m braidax report` on a run of `python -m braidax train`."""

import contextlib
import dataclasses
import io
import json
import sys

import numpy as np
import pytest

from braidax.__main__ import main
from braidax._training import loop
from braidax._training.run_report import byte_text
from braidax._training.settings import Settings

SETTINGS = Settings(
    steps=3, batch=4, length=16, eval_windows=10, hidden=16, layers=2, heads=2, experts=4,
    intermediate=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text <b>.txt"
    text.write_bytes(b"routers choose, experts compute, sums return.\n\xe4\n" * 200)
    with contextlib.redirect_stdout(io.StringIO()):
        settings = dataclasses.replace(SETTINGS, text=str(text))
        assert loop.start(settings, folder / "out") == 0
    return folder / "out"


def test_it_says_what_the_training_run_said(run, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["report", str(run), "--out", str(tmp_path / "new")]) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    output = capsys.readouterr().out
    trained = json.loads((run / "report.json").read_text())
    assert f"step 3 of 3, {trained['validation_bits_per_byte']:.4f} bits/byte on 128" in output
    assert "2 layers of 4 experts, 128 tokens in 2 batches" in output
    hashed, top_k = (f"{layer['max_violation']:.2f}" for layer in trained["layers"])
    assert output.index(f"\n1{top_k:>12}") < output.index(f"\n0{hashed:>12}")
    page = (tmp_path / "new" / "report.html").read_text()
    assert "<b>" not in page and "text &lt;b&gt;.txt" in page
    assert page.startswith("<!DOCTYPE html>") and "top tokens of layer 1" in page
    names = ("load.png", "coactivation.png", "token_experts.png")
    for name in names:
        assert f'src="{name}"' in page
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    assert ", ".join(str(tmp_path / "new" / name) for name in ("report.html", *names)) in output


def test_by_default_it_writes_beside_the_checkpoint(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run / "checkpoint.eqx")]) == 0
    output = capsys.readouterr().out
    assert "no pictures: matplotlib is missing" in output
    assert "<img" not in (run / "report.html").read_text()
    assert not (run / "load.png").exists()


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["report", *map(str, arguments)])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_mistakes_take_one_line(run, tmp_path, capsys):
    assert "cannot read" in fails(capsys, tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fails(capsys, run, "--out", tmp_path / "file")
    checkpoint = (run / "checkpoint.eqx").read_bytes()
    first, rest = checkpoint.split(b"\n", 1)
    header = json.loads(first)

    def saved(**changes):
        changed = json.dumps({**header, **changes}).encode()
        (tmp_path / "checkpoint.eqx").write_bytes(changed + b"\n" + rest)
        return tmp_path

    dense = {**header["settings"], "dense": True}
    assert "dense model, which has no routing" in fails(capsys, saved(settings=dense))
    assert "has changed: sha256" in fails(capsys, saved(corpus_sha256="0"))
    assert "its checksum does not match" in fails(capsys, saved(step=2))


def test_bytes_as_text():
    assert [byte_text(byte) for byte in (97, 10, 228)] == ["a", "\n", "0xe4"]
    assert len({byte_text(byte) for byte in np.arange(256).tolist()}) == 256

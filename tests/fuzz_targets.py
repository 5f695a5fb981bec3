"""What the fuzz run damages: one row of `TARGETS` for each reader."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import random
from typing import Any

import numpy as np
from fuzz import Target, damaged, json_text

# Target: MoEConfig.from_hf

_CONFIGS: tuple[dict, ...] = (
    {
        **{"model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 7168},
        **{"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
        **{"vocab_size": 129280, "swiglu_limit": None, "gate_temp": 1.0},
    },
    {
        **{"hidden_size": 32, "moe_intermediate_size": 16, "num_local_experts": 8},
        **{"num_experts_per_tok": 2, "scoring_func": "sqrtsoftplus", "vocab_size": 256},
        **{"mlp_layer_types": ["hash_moe", "moe"], "num_hash_layers": 1, "swiglu_limit": 10.0},
        **{"routed_scaling_factor": 1.5},
    },
)


def _config(generator: random.Random) -> Any:
    """Bytes of a file, the parsed content, or a path that is none."""
    if generator.random() < 0.05:
        return generator.choice(("missing", "x" * 5000, "a\0b", "\udcff", "", ".", "/dev/null"))
    data = json_text(_CONFIGS, generator)
    if generator.random() < 0.3:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(data)
            return content if isinstance(content, dict) else data
    return data


def _use_config(given: Any, folder: pathlib.Path) -> str | None:
    from braidax import MoEConfig

    source = given
    if isinstance(given, bytes):
        source = folder / "config.json"
        source.write_bytes(given)
    try:
        config = MoEConfig.from_hf(source)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return str(error)
    # What it accepts must be numbers that a layer can have.
    assert all(
        0 < getattr(config, name) < 2**31 and type(getattr(config, name)) is int
        for name in ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_token")
    )
    assert math.isfinite(config.scaling_factor) and math.isfinite(config.temperature)
    assert type(config.normalize) is bool and hash(config) is not None
    return None


# Target: python -m braidax

_COMMANDS = (
    "train",
    "train --out run",
    "train --resume run",
    "train --text text.txt --length 8 --steps 10 --batch 2 --seed 3",
    "train --hidden 32 --layers 2 --heads 4 --experts 8 --experts-per-token 2 --intermediate 16",
    "train --shared-experts 1 --hash-layers 0 --learning-rate 0.01 --balance-rate 0.001 --dense",
    "train --log-every 5 --checkpoint-every 50 --eval-windows 64 --text . --length 4",
    "train --help",
    "summary .",
    "summary text.txt --layer 0",
    "bench --groups layers decode --directions forward --rounds 2 --backends blocks dense",
)
_ODD_WORDS = (
    *("", " ", "-", "--", "---", "-h", "--help", "train", "--resume", "--out", "--text", "--dense"),
    *(
        "0",
        "-1",
        "1",
        "3",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e39",
        "1e-400",
        "-0.0",
        "1_000",
        "0x10",
    ),
    *("2147483647", "2147483648", "4294967295", "4294967296", "9" * 400, "9" * 5000, "٣", "１"),
    *(
        "x" * 300,
        "x" * 100_000,
        "a\0b",
        "\n",
        "a\nb",
        "\x1b[31m",
        "\udcff",
        "\u202e",
        "%s",
        "%(prog)s",
    ),
    *(".", "..", "text.txt", "empty", "binary", "short", "missing", "run", "{}", "@text.txt", "*"),
)


def _arguments(generator: random.Random) -> list[str]:
    words = generator.choice(_COMMANDS).split()
    for _ in range(generator.choice((0, 1, 1, 2, 2, 4))):
        position, kind = generator.randrange(len(words) + 1), generator.randrange(7)
        if kind == 0:
            words.insert(position, generator.choice(_ODD_WORDS))
        elif kind == 1:
            words += generator.choice(_COMMANDS).split()[1:]
        elif position < len(words):
            if kind == 2:
                del words[position]
            elif kind == 3 and position:
                words[position - 1 : position + 1] = ["=".join(words[position - 1 : position + 1])]
            elif kind == 4:
                letters = damaged(os.fsencode(words[position]), generator)
                words[position] = os.fsdecode(letters)
            else:
                words[position] = generator.choice(_ODD_WORDS)
    # Nothing outside the folder may be named: these inputs are read, and written to.
    return [word.replace("/", "|") for word in words]


def _use_arguments(given: list[str], folder: pathlib.Path) -> str | None:
    """Everything runs but the model and the steps."""
    from unittest import mock

    from braidax import __main__ as program
    from braidax._bench import report
    from braidax._training import loop

    home = _prepared(folder)
    read = loop.read_corpus
    quick = {
        "initial_state": lambda settings, optimizer: {"array": np.zeros(3, np.float32)},
        "_train": lambda folder, settings, *others, first_step: print(folder, settings) or 0,
        # The standard library is read in full otherwise.
        "read_corpus": lambda text: read(str(home / "text.txt") if text is None else text),
    }
    output, errors = _stream(), _stream()
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.multiple(loop, **quick))
    patches.enter_context(mock.patch.multiple(report, measure=lambda *given: [], header=str))
    redirected = contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors)
    with contextlib.chdir(home), patches, redirected[0], redirected[1]:
        try:
            code = program.main(list(given))
        except SystemExit as request:
            code = request.code
    output.seek(0)
    errors.seek(0)
    error = errors.read()
    if code == 0 and not error:
        return None
    assert (code, error[-1:], output.read()) == (2, "\n", ""), (code, error)
    assert error.startswith("python -m braidax") and ": error: " in error, error
    return error[:-1]


def _stream() -> io.TextIOWrapper:
    """As strict as a terminal's."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="", write_through=True)


def _prepared(folder: pathlib.Path) -> pathlib.Path:
    home = folder / "outer" / "inner"
    if not home.exists():
        home.mkdir(parents=True)
        (home / "text.txt").write_text("routers choose, experts compute. " * 90)
        (home / "short").write_text("short")
        (home / "binary").write_bytes(b"\0" * 200)
        (home / "empty").touch()
    return home


# Target: the checkpoint of a training run

_ARRAYS = {"weights": np.arange(40, dtype=np.float32), "step": np.int32(7)}


def _checkpoint_header() -> Any:
    from braidax._training.checkpoint import Header
    from braidax._training.settings import Settings

    return Header(Settings(text="text.txt"), 7, "0123")


def _checkpoint(generator: random.Random) -> bytes:
    """A damaged file, sometimes with an odd header whose checksum is right."""
    import hashlib
    import tempfile

    from braidax._training import checkpoint

    with tempfile.TemporaryDirectory() as name:
        checkpoint.save(pathlib.Path(name), _checkpoint_header(), _ARRAYS)
        data = pathlib.Path(name, checkpoint.FILE_NAME).read_bytes()
    if generator.random() < 0.6:
        return damaged(data, generator)
    line, leaves = data.split(b"\n", 1)
    record = json.loads(line)
    part = record["settings"] if generator.random() < 0.7 else record
    text = json_text((part,), generator)
    if part is not record:
        text = json.dumps({**record, "settings": "@"}).encode().replace(b'"@"', text)
    data = text + b"\n" + leaves[:-32]
    return data + hashlib.sha256(data).digest()


def _use_checkpoint(given: bytes, folder: pathlib.Path) -> str | None:
    from braidax._checks import one_line
    from braidax._training import checkpoint

    (folder / checkpoint.FILE_NAME).write_bytes(given)
    try:
        header = checkpoint.read_header(folder)
        state = checkpoint.load_state(folder, {"weights": np.zeros(40, np.float32), "step": 0})
    except checkpoint.CheckpointError as error:
        # As the command line shows it.
        return one_line(str(error))
    assert np.array_equal(state["weights"], _ARRAYS["weights"]) and state["step"] == 7
    assert dataclasses.replace(header.settings) == header.settings and header.step >= 0
    return None


# Target: one layer of a released checkpoint


@functools.cache
def _layer_file() -> bytes:
    """A layer of four experts in FP4, as DeepSeek-V4-Flash is stored."""
    import tempfile

    import checkpoints

    from braidax._checkpoint.safetensors_writer import write_safetensors

    tensors, _ = checkpoints.layer_tensors(checkpoints.Layout(), 2, sizes=(64, 32, 4))
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name, "layer.safetensors")
        write_safetensors(path, tensors)
        # Here, outside of the limits: JAX reserves more memory than a reader may when it starts.
        assert _load(path) is not None
        return path.read_bytes()


def _load(path: pathlib.Path) -> Any:
    import checkpoints

    import braidax as bx

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4}
    return bx.load_moe(path, 2, config=checkpoints.config(bx, **sizes), dtype="packed")


def _safetensors(generator: random.Random) -> bytes:
    """Damaged bytes, an odd header in front of good data, or a length that lies."""
    data = _layer_file()
    length = int.from_bytes(data[:8], "little")
    kind = generator.randrange(5)
    if kind == 0:
        return damaged(data, generator)
    if kind == 1:
        odd = generator.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return odd.to_bytes(8, "little") + data[8:]
    if kind == 2:
        # Only the numbers: whatever they are, they can be loaded.
        payload = bytearray(data)
        for _ in range(20):
            payload[generator.randrange(8 + length, len(data))] ^= 1 << generator.randrange(8)
        return bytes(payload)
    header = json.loads(data[8 : 8 + length])
    name = generator.choice(list(header))
    if kind == 3:
        text = json_text((header,), generator)
    else:
        entry = json_text((header.pop(name),), generator)
        text = json.dumps({**header, name: "@"}).encode().replace(b'"@"', entry)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _use_safetensors(given: bytes, folder: pathlib.Path) -> str | None:
    path = folder / "layer.safetensors"
    path.write_bytes(given)
    try:
        moe = _load(path)
    except ValueError as error:
        return str(error)
    assert moe.routed.router.gate.weight.shape == (4, 64)
    return None


TARGETS = (
    Target("config", _config, _use_config),
    Target("arguments", _arguments, _use_arguments),
    Target("checkpoint", _checkpoint, _use_checkpoint),
    Target("safetensors", _safetensors, _use_safetensors),
)

"""Damaged files and odd arguments: each works or gives one clear error.

A few hundred of each here; `BRAIDAX_FUZZ=10000 pytest tests/test_fuzz.py` is the long run. A target
is a strategy that makes inputs, and a function that hands one to a reader in an empty folder. The
function returns None for an input that works, the message for one that is refused, and raises for
anything else.
"""

import collections
import contextlib
import dataclasses
import datetime
import functools
import io
import json
import os
import pathlib
import resource
import tempfile
from unittest import mock

import checkpoints
import equinox as eqx
import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import braidax as bx
from braidax import __main__ as program
from braidax._checkpoint.safetensors_writer import write_safetensors
from braidax.training import loop

COUNT = int(os.environ.get("BRAIDAX_FUZZ", "300"))
LONGEST_MESSAGE = 800
MOST_BYTES = 500 * 2**20
SLOWEST = datetime.timedelta(seconds=5)

# What stands in JSON where a number or a name should.
ODD_JSON = (
    *("null", "true", "false", "0", "-1", "1", "2", "7", "0.0", "-0.0", "1.5", "1e400", "-1e400"),
    *("NaN", "Infinity", "-Infinity", "1e308", "5e-324", "2147483647", "2147483648", "1e99999"),
    *("9223372036854775808", "9" * 400, "9" * 4300, "9" * 5000, "-" + "9" * 400, "[" * 2000),
    *('""', '"8"', '"nan"', '"silu"', '"softmax"', '"\\ud800"', '"\\u0000"', '"\\n"', "[]", "{}"),
    *("[1, 2]", '{"a": 1}', '["hash_moe"]', '["moe", "hash_moe"]', "[null]", "[" * 900 + "]" * 900),
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"text_config":' * 500 + "{}" + "}" * 500),
    *('"' + "x" * 100_000 + '"', "[" + "1," * 50_000 + "1]", "1 2", "", ",", '"'),
)
CONFIGS = (
    {
        **{"model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 7168},
        **{"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
        **{"vocab_size": 129280, "swiglu_limit": None, "gate_temp": 1.0},
    },
    {
        **{"model_type": "deepseek_v4", "hidden_size": 32, "moe_intermediate_size": 16},
        **{"num_local_experts": 8},
        **{"num_experts_per_tok": 2, "scoring_func": "sqrtsoftplus", "vocab_size": 256},
        **{"mlp_layer_types": ["hash_moe", "moe"], "num_hash_layers": 1, "swiglu_limit": 10.0},
        **{"routed_scaling_factor": 1.5},
    },
)
ODD_PATHS = ("missing", "x" * 5000, "a\0b", "\udcff", "", ".", "/dev/null")
COMMANDS = (
    *("train", "train --out run", "train --resume run", "train --help", "summary ."),
    "train --text text.txt --length 8 --steps 10 --batch 2 --seed 3",
    "train --hidden 32 --layers 2 --heads 4 --experts 8 --experts-per-token 2 --intermediate 16",
    "train --shared-experts 1 --hash-layers 0 --learning-rate 0.01 --balance-rate 0.001 --dense",
    "train --log-every 5 --checkpoint-every 50 --eval-windows 64 --text . --length 4",
    *("summary text.txt --layer 0", "report run --out pictures"),
)
ODD_WORDS = (
    *("", " ", "-", "--", "---", "-h", "--help", "train", "--resume", "--out", "--text", "--dense"),
    *("0", "-1", "1", "3", "nan", "inf", "-inf", "1e400", "1e39", "1e-400", "-0.0", "1_000"),
    *("0x10", "2147483647", "2147483648", "4294967296", "9" * 400, "9" * 5000, "٣", "１"),
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
        "%(p)s",
    ),
    *(".", "..", "text.txt", "empty", "binary", "short", "missing", "run", "{}", "@text.txt", "*"),
)


@st.composite
def damaged(draw, data):
    """`data` with pieces removed, doubled, repeated or overwritten, or other bytes in front."""
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        kind = draw(st.integers(0, 5))
        if kind < 2:
            data = data[:start] + data[end:] if kind else data[:start]
        elif kind == 2:
            data = data[:end] + data[start:end] * draw(st.sampled_from((1, 50))) + data[end:]
        elif kind == 3:
            data = draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe", b"\0"))) + data
        else:  # as many bytes, or more
            new = draw(st.binary(min_size=1, max_size=20))
            data = data[:start] + new + data[start + (kind - 4) * len(new) :]
    return data


@st.composite
def json_texts(draw, seeds):
    """One of `seeds` as JSON, with values replaced, keys dropped or renamed, or bytes damaged."""
    items = [(key, json.dumps(value)) for key, value in draw(st.sampled_from(seeds)).items()]
    keys = sorted({key for seed in seeds for key in seed})
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(items) - 1))
        key, value = items[position]
        entries = [(key, draw(st.sampled_from(ODD_JSON)))], [(draw(st.sampled_from(keys)), value)]
        # In the place of another, or beside it: a key may be there twice.
        end = position + draw(st.integers(0, 1))
        items[position:end] = draw(st.sampled_from((*entries, [])))
        items = items or [(key, value)]
    data = ("{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in items) + "}").encode()
    return draw(damaged(data)) if draw(st.integers(0, 4)) == 0 else data


def use_config(given, folder):
    """Bytes of a file, or a path that is none."""
    source = given
    if isinstance(given, bytes):
        source = folder / "config.json"
        source.write_bytes(given)
    try:
        config = bx.MoEConfig.from_hf(source)
        # A configuration is a record: what builds a layer says what is wrong. A table takes long.
        config = dataclasses.replace(config, num_hash_layers=0)
        layer = eqx.filter_eval_shape(bx.RoutedMoE.from_config, config, 0, key=jax.random.key(0))
    except (ValueError, TypeError, FileNotFoundError) as error:
        return str(error)
    assert layer.experts.down.shape[1:] == (config.intermediate_size, config.hidden_size)
    return None


@st.composite
def arguments(draw):
    words = draw(st.sampled_from(COMMANDS)).split()
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(words)))
        kind, odd = draw(st.integers(0, 4)), draw(st.sampled_from(ODD_WORDS))
        if kind < 3:  # insert, replace, remove
            words[position : position + (kind > 0)] = [odd][: 2 - kind]
        elif kind == 3:
            words += draw(st.sampled_from(COMMANDS)).split()[1:]
        else:
            words[position : position + 2] = ["=".join(words[position : position + 2])]
    # Nothing outside the folder may be named: these inputs are read, and written to.
    return [word.replace("/", "|") for word in words]


def use_arguments(given, folder):
    """Everything runs but the model and the steps."""
    home = folder / "outer" / "inner"
    if not home.exists():
        home.mkdir(parents=True)
        (home / "text.txt").write_text("routers choose, experts compute. " * 90)
        (home / "short").write_text("short")
        (home / "binary").write_bytes(b"\0" * 200)
        (home / "empty").touch()
    read = loop.read_corpus
    quick = {
        "initial_state": lambda settings: None,
        "_run": lambda folder, header, *others: print(folder, header.settings) or 0,
        # The standard library is read in full otherwise.
        "read_corpus": lambda text, **options: read(text or str(home / "text.txt"), **options),
    }
    # As strict as a terminal's.
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(home))
        stack.enter_context(mock.patch.multiple(loop, **quick))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            code = program.main(list(given))
        except SystemExit as request:
            code = request.code
    for stream in (output, errors):
        stream.seek(0)
    error = errors.read()
    if code == 0 and not error:
        return None
    assert (code, error[-1:], output.read()) == (2, "\n", ""), (code, error)
    assert error.startswith("python -m braidax") and ": error: " in error, error
    return error[:-1]


@functools.cache
def layer_file():
    """A layer of four experts in FP4, as DeepSeek-V4-Flash is stored."""
    tensors, _ = checkpoints.layer_tensors(checkpoints.Layout(), 2, sizes=(64, 32, 4))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "layer.safetensors")
        write_safetensors(path, tensors)
        assert load_layer(path) is not None
        return path.read_bytes()


def load_layer(path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4}
    return bx.load_moe(path, 2, config=checkpoints.config(bx, **sizes), dtype="packed")


@st.composite
def layers(draw):
    """Damaged bytes, a length that lies, other numbers, or an odd header before good data."""
    data = layer_file()
    length, kind = int.from_bytes(data[:8], "little"), draw(st.integers(0, 4))
    header, payload = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if kind == 0:
        return draw(damaged(data))
    if kind == 1:
        odd = draw(st.sampled_from((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)))
        return odd.to_bytes(8, "little") + data[8:]
    if kind == 2:  # whatever the numbers are, they can be loaded
        for position in draw(st.lists(st.integers(0, len(payload) - 1), max_size=20)):
            payload[position] ^= 1 << position % 8
        return data[: 8 + length] + payload
    text = draw(json_texts((header,)))
    if kind == 3:
        name = draw(st.sampled_from(sorted(header)))
        entry = draw(json_texts((header.pop(name),)))
        text = json.dumps({**header, name: "@"}).encode().replace(b'"@"', entry)
    return len(text).to_bytes(8, "little") + text + payload


def use_layer(given, folder):
    path = folder / "layer.safetensors"
    path.write_bytes(given)
    try:
        moe = load_layer(path)
    except ValueError as error:
        return str(error)
    assert moe.routed.router.gate.weight.shape == (4, 64)
    return None


@contextlib.contextmanager
def little_memory():
    """A file whose header lies must not make a reader allocate what it says."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def check(use, given, folder):
    """Whether the input worked; an assertion if the answer is not one clear error either."""
    with little_memory():
        message = use(given, folder)
    if message is not None:
        assert message.strip() and message.isprintable(), f"not one printable line: {message!r}"
        assert len(message) <= LONGEST_MESSAGE
    return message is None


TARGETS = {
    "config": (json_texts(CONFIGS) | st.sampled_from(ODD_PATHS), use_config),
    "arguments": (arguments(), use_arguments),
    "layer": (layers(), use_layer),
}


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # a long input
@pytest.mark.parametrize("target", TARGETS)
def test_every_input_works_or_gives_one_clear_error(target, tmp_path, unchecked):
    layer_file()  # outside of the limits: JAX takes more memory than a reader may when it starts
    inputs, use = TARGETS[target]
    outcomes = collections.Counter()

    @settings(max_examples=COUNT, deadline=SLOWEST, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(given):
        outcomes[check(use, given, tmp_path)] += 1

    run()
    # Neither all refused nor all fine: the inputs reach both ends of the reader.
    assert outcomes[True] >= COUNT // 50 and outcomes[False] >= COUNT // 10, outcomes


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (lambda given, folder: [][1], IndexError),
        (lambda given, folder: "two\nlines", AssertionError),
        (lambda given, folder: "", AssertionError),
        (lambda given, folder: "x" * 10_000, AssertionError),
        (lambda given, folder: str(len(bytearray(2**31))), MemoryError),
    ],
)
def test_anything_else_is_found(use, error, tmp_path):
    with pytest.raises(error):
        check(use, b"", tmp_path)

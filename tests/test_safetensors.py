"""The safetensors reader and writer: every dtype, and every way a file can lie."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from braidax._checkpoint.dtypes import DTYPES
from braidax._checkpoint.index import StoredTensors
from braidax._checkpoint.safetensors_reader import LARGEST_HEADER, read_header
from braidax._checkpoint.safetensors_writer import Lazy, write_safetensors


def file_of(path, header, data=b"", length=None):
    """A file by hand: `header` is JSON-able or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_layout_of_a_file_written_by_hand(tmp_path):
    """The bytes of the format description, not of our writer."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("I16", (2, 1), (0, 4)),
        "b": entry("F8_E8M0", (1,), (4, 5)),
        "c": entry("F4", (2, 2), (5, 7)),
        "scalar": entry("BF16", (), (7, 9)),
    }
    data = bytes([1, 0, 255, 255, 126, 0x21, 0xF7, 0x80, 0xBF])
    file = read_header(file_of(tmp_path / "x", header, data))
    assert file["a"].read().tolist() == [[1], [-1]]
    assert file["b"].read().astype(np.float32).tolist() == [0.5]
    # 0x21: the low half, 1, is 0.5 and comes first; then 2 is 1.0. 7 is 6.0 and 15 is -6.0.
    assert file["c"].read().astype(np.float32).tolist() == [[0.5, 1.0], [6.0, -6.0]]
    assert file["c"].raw().tolist() == [0x21, 0xF7]
    assert file["scalar"].read().shape == () and file["scalar"].read().astype(np.float32) == -1.0


@pytest.mark.parametrize("name", DTYPES)
def test_round_trip_of_all_bytes(tmp_path, name):
    array = np.arange(256, dtype=np.uint8)
    if name == "BOOL":
        array = array > 127
    elif name == "F4":
        array = (array & 15).view(DTYPES[name])
    else:
        array = array.view(DTYPES[name])
    tensors = {"x": array.reshape(2, -1), "none": array[:0].reshape(0, 2), "y": array[:2]}
    write_safetensors(tmp_path / "x", tensors)
    file = read_header(tmp_path / "x")
    assert file["x"].dtype == name
    for key, wanted in tensors.items():
        found = file[key].read()
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()


def test_tensors_are_aligned_mapped_and_read_only(tmp_path):
    tensors = {"a": np.ones(3, np.int8), "b": np.ones(3, np.float64), "c": np.ones((), np.float32)}
    write_safetensors(tmp_path / "x", tensors)
    file = read_header(tmp_path / "x")
    for name, tensor in tensors.items():
        assert file[name].start % tensor.dtype.itemsize == 0
        found = file[name].read()
        assert found.flags.aligned and not found.flags.writeable and not found.flags.owndata


def test_misaligned_tensors_are_read(tmp_path):
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    data = b"\x00" + np.array([1.5, -2.0], np.float32).tobytes()
    assert read_header(file_of(tmp_path / "x", header, data))["b"].read().tolist() == [1.5, -2.0]


def test_lazy_tensors_are_made_one_at_a_time_and_checked(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.array([1, 2], np.uint8)

    write_safetensors(tmp_path / "x", {"a": Lazy("F8_E8M0", (2,), make)})
    assert made == [1]
    assert read_header(tmp_path / "x")["a"].raw().tolist() == [1, 2]
    with pytest.raises(ValueError, match="x: `a` must be made of 3 bytes, F8_E8M0 .* Got 2 bytes"):
        write_safetensors(tmp_path / "x", {"a": Lazy("F8_E8M0", (3,), make)})
    # The failed write has left the old file, and nothing else, behind.
    assert read_header(tmp_path / "x")["a"].raw().tolist() == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="`a` must have a dtype among .* Got complex64"):
        write_safetensors(tmp_path / "x", {"a": np.zeros(2, np.complex64)})
    with pytest.raises(ValueError, match="`a` must have an even last axis"):
        write_safetensors(tmp_path / "x", {"a": np.zeros((2, 3), jnp.float4_e2m1fn)})


def test_unknown_dtype_is_refused_when_read(tmp_path):
    header = {"a": entry("C64", (1,), (0, 8)), "b": entry("U8", (1,), (8, 9))}
    file = read_header(file_of(tmp_path / "x", header, bytes(9)))
    assert file["b"].read().tolist() == [0]
    with pytest.raises(ValueError, match="x: `a` must have a dtype among .* Got C64"):
        file["a"].read()


HEADERS = {
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, "`b` must start .*, and not overlap"),
    "gap": ({"a": entry(), "b": entry(offsets=(6, 10))}, "`b` must start .*, and not leave a gap"),
    "same place": ({"a": entry(), "b": entry()}, "`b` must start .*not overlap"),
    "bytes before the first": ({"a": entry(offsets=(2, 6))}, "`a` must start .* gap"),
    "bytes after the last": ({"a": entry()}, "`data` must end with the last tensor"),
    "past the end": ({"a": entry(shape=(11,), offsets=(0, 11))}, "`a` must lie within the 10 byte"),
    "backwards": ({"a": entry(offsets=(4, 0))}, "`a` must lie within"),
    "negative": ({"a": entry(offsets=(-4, 0))}, "`a` must have a dtype"),
    "wrong size": ({"a": entry("F32", (2,), (0, 4))}, "`a` must have the 2 elements of F32"),
    "product that overflows 64 bits": (
        {"a": entry("U8", (2**32, 2**32), (0, 0))},
        "`a` must have .* their product from 0 to",
    ),
    "product with a size of 0": (
        {"a": entry("U8", (2**62, 2**62, 0), (0, 0))},
        "`a` must have .* their product from 0 to",
    ),
    "thousands of axes": (
        {"a": entry("U8", (2**62,) * 20_000, (0, 4))},
        "`a` must have .* at most 32 axes",
    ),
    "size that overflows 64 bits": ({"a": entry(shape=(2**64,))}, "`a` must have .* all sizes"),
    "size as a float": ({"a": entry(shape=(4.0,))}, "`a` must have .* all sizes"),
    "size as a bool": ({"a": entry(shape=(True,), offsets=(0, 1))}, "`a` must have .* all sizes"),
    "negative size": ({"a": entry(shape=(-4,))}, "`a` must have .* all sizes"),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, "`a` must have a dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, "`a` must have a dtype"),
    "shape as text": ({"a": {**entry(), "shape": "4"}}, "`a` must have a dtype"),
    "another key": ({"a": entry(stride=1)}, "`a` must have a dtype"),
    "entry as a list": ({"a": [1, 2, 3]}, "`a` must have a dtype"),
    "odd FP4": ({"a": entry("F4", (3, 2, 1), (0, 3))}, "`a` must have an even last axis"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "`__metadata__` must map strings"),
    "metadata as a list": ({"__metadata__": []}, "`__metadata__` must map strings"),
    "a list": ([], "`header` must be a JSON object. Got list"),
    "not JSON": (b"{", "`header` must be JSON"),
    "not text": (b"\xff\xfe", "`header` must be JSON"),
    "too deep": (b"[" * 100_000, "`header` must be JSON"),
    "repeated key": (b'{"a": 1, "a": 2}', "`header` must be JSON.*'a' is repeated"),
}


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie(tmp_path, header, message):
    with pytest.raises(ValueError, match=f"x.safetensors: {message}"):
        read_header(file_of(tmp_path / "x.safetensors", header, bytes(10)))


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_a_value_error_or_harmless(tmp_path, seed):
    """Bytes changed or the end cut off: never another exception, never data from elsewhere."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "x"
    tensors = {"a": np.arange(3, dtype=np.int16), "b": np.ones((2, 2), np.float32)}
    write_safetensors(path, tensors)
    content, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = rng.integers(0, len(content), rng.integers(1, 4))
        damaged[places] = rng.choice(np.frombuffer(b'0123456789{}[]":,-.abIF\x00\xff', np.uint8))
        path.write_bytes(damaged[: len(content) - rng.choice([0, 0, 0, 1, 50])].tobytes())
        try:
            file = read_header(path)
            arrays = [file[name].read() for name in file]
        except ValueError as error:
            assert str(error).startswith(f"{path}: `")
            refused += 1
        else:
            assert sum(array.nbytes for array in arrays) == 22
    assert 50 < refused < 200


def test_files_that_are_too_short_and_headers_that_are_too_long(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"1234567")
    with pytest.raises(ValueError, match="x: `header` must begin with 8 bytes.* 7 bytes"):
        read_header(path)
    with pytest.raises(ValueError, match=f"`header` must have at most 2 bytes. Got {2**63}"):
        read_header(file_of(path, b"{}", length=2**63))
    with path.open("wb") as file:
        file.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(2 * LARGEST_HEADER)  # sparse: no disk is used
    with pytest.raises(ValueError, match=f"at most {LARGEST_HEADER} bytes"):
        read_header(path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_header(tmp_path / "y")


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/elsewhere/a.safetensors",
        "b/a.safetensors",
        "..\\a.safetensors",
        "c:a.safetensors",
        "a.safetensors\0.safetensors",
        "a.bin",
        "",
        "..",
        3,
        None,
    ],
)
def test_an_index_names_plain_files_beside_it(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match="index.json: `x` must lie in a plain .safetensors file"):
        StoredTensors(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "`index` must be JSON"),
        ('{"weight_map": {"x": "a", "x": "b"}}', "'x' is repeated"),
        ("[]", "`index` must be a JSON object. Got list"),
        ('{"weight_map": []}', "`weight_map` must map tensors to files. Got list"),
    ],
)
def test_malformed_indices(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"index.json: .*{message}"):
        StoredTensors(tmp_path)


def test_index_and_shard_must_agree(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.int8)})
    index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = StoredTensors(tmp_path)
    assert checkpoint["x"].read().tolist() == [0, 0]
    with pytest.raises(ValueError, match="a.safetensors: `y` must be in the file"):
        checkpoint["y"].read()
    with pytest.raises(ValueError, match="index.json: `z` must be listed. Got 2 other"):
        checkpoint["z"].read()


def test_two_indices_are_ambiguous(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="at most one file"):
        StoredTensors(tmp_path)
    assert StoredTensors(tmp_path / "a.safetensors.index.json").files == {}


def test_a_repeated_key_among_many_is_found_at_once(tmp_path):
    """One pass: quadratic time would be minutes."""
    names = [f"layers.{i}.ffn.gate.weight" for i in range(70_000)]
    text = "{" + ", ".join(f'"{name}": "a.safetensors"' for name in (*names, names[-1])) + "}"
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(f'{{"weight_map": {text}}}')
    with pytest.raises(ValueError, match="the key 'layers.69999.ffn.gate.weight' is repeated"):
        StoredTensors(path)


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(2)})
    (tmp_path / "b").write_bytes(b"")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1

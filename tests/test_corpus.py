import errno
import hashlib
import inspect
import os
import pathlib

import numpy as np
import pytest

from braidax.training import (
    Settings,
    UserError,
    held_out_windows,
    read_corpus,
    reports,
    training_windows,
)
from braidax.training.devices import Devices


def write_files(folder, contents):
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def file_bytes(contents, names):
    return b"".join(contents[name] for name in names)


MANY = {f"sub{i % 3}/file{i}.txt": f"text number {i}\n".encode() * (i + 1) for i in range(60)}


def test_split_is_by_file_and_by_the_md5_of_the_relative_path(tmp_path):
    write_files(tmp_path, MANY)
    corpus = read_corpus(str(tmp_path))
    digests = {name: hashlib.md5(name.encode()).digest() for name in MANY}
    expected = [n for n in sorted(MANY) if int.from_bytes(digests[n], "little") % 10 == 0]
    assert 0 < len(expected) < 15
    assert list(corpus.held_out_files) == expected
    assert list(corpus.training_files) == sorted(set(MANY) - set(expected))
    assert corpus.held_out.tobytes() == file_bytes(MANY, corpus.held_out_files)
    assert corpus.training.tobytes() == file_bytes(MANY, corpus.training_files)
    assert corpus.identity()["files"] == 60


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("stem", ["a", "b", "c", "d"])
def test_each_part_gets_at_least_one_file(tmp_path, count, stem):
    write_files(tmp_path, {f"{stem}{i}": b"some text" for i in range(count)})
    corpus = read_corpus(str(tmp_path))
    assert corpus.training_files and corpus.held_out_files
    assert len(corpus.training_files) + len(corpus.held_out_files) == count


def test_hash_names_the_corpus_and_not_its_place(tmp_path):
    write_files(tmp_path / "one", MANY)
    write_files(tmp_path / "two", MANY)
    first, second = (read_corpus(str(tmp_path / name)) for name in ("one", "two"))
    assert first.sha256 == second.sha256
    os.rename(tmp_path / "two/sub0/file0.txt", tmp_path / "two/sub0/renamed.txt")
    assert read_corpus(str(tmp_path / "two")).sha256 != first.sha256
    write_files(tmp_path / "one", {"sub0/file0.txt": b"other"})
    assert read_corpus(str(tmp_path / "one")).sha256 != first.sha256


def test_hash_does_not_confuse_a_name_with_contents(tmp_path):
    write_files(tmp_path / "one", {"a": b"bc", "d": b"x"})
    write_files(tmp_path / "two", {"ab": b"c", "d": b"x"})
    assert read_corpus(str(tmp_path / "one")).sha256 != read_corpus(str(tmp_path / "two")).sha256


def test_binary_empty_and_hidden_files_are_left_out_and_counted(tmp_path):
    write_files(tmp_path, {"a": b"text", "b": b"more", "c": b"\x00\x01", "d": b"", ".git/e": b"no"})
    corpus = read_corpus(str(tmp_path))
    assert sorted(corpus.training_files + corpus.held_out_files) == ["a", "b"]
    assert corpus.skipped_files == 2 and "files 2, skipped files 2" in corpus.describe()
    assert corpus.sha256 in corpus.describe()


def test_a_single_file_is_split_by_position(tmp_path):
    (tmp_path / "only.txt").write_bytes(bytes(range(1, 201)))
    for text in (tmp_path / "only.txt", tmp_path):
        corpus = read_corpus(str(text))
        assert corpus.training.tolist() == list(range(1, 181))
        assert corpus.held_out.tolist() == list(range(181, 201))
        assert corpus.identity()["files"] == 1


def test_standard_library_without_tests_and_installed_packages():
    corpus = read_corpus()
    names = set(corpus.training_files + corpus.held_out_files)
    assert {"argparse.py", "json/decoder.py"} <= names
    left_out = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any(left_out.intersection(name.split("/")) for name in names)
    assert all(name.endswith(".py") for name in names)
    assert 0.05 < len(corpus.held_out_files) / len(names) < 0.15
    assert corpus.training.size > 1_000_000


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such file"),
        ({}, "no text to train on"),
        ({"a": b""}, "no text to train on"),
        ({"a": b"\0"}, "1 files, empty or binary"),
        ({"a": b"short", "b": b"short"}, "too short"),
    ],
)
def test_unusable_text_is_one_clear_line(tmp_path, contents, message):
    folder = tmp_path / "text"
    if contents is not None:
        folder.mkdir()
        write_files(folder, contents)
    with pytest.raises(UserError, match=message) as error:
        read_corpus(str(folder), length=128)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "text").write_bytes(b"a" * 100)
    scandir = os.scandir

    def refuse(path):
        if pathlib.Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read .*locked: Permission denied"):
        read_corpus(str(tmp_path))


def test_training_windows_are_a_function_of_seed_and_step():
    data = np.arange(251, dtype=np.uint8)

    def windows(seed, step):
        return training_windows(data, batch=7, length=9, seed=seed, step=step)

    first = windows(3, 5)
    assert first.shape == (7, 10) and first.dtype == np.int32
    assert np.array_equal(first, windows(3, 5))
    assert not np.array_equal(first, windows(3, 6))
    assert not np.array_equal(first, windows(4, 5))
    assert np.all(np.diff(first, axis=1) == 1)  # consecutive bytes of the text


def test_training_windows_reach_both_ends():
    data = np.arange(12, dtype=np.uint8)
    windows = training_windows(data, batch=200, length=9, seed=0, step=1)
    assert set(windows[:, 0].tolist()) == {0, 1, 2}
    whole = training_windows(data, batch=4, length=11, seed=0, step=1)
    assert whole.tolist() == [list(range(12))] * 4


def test_held_out_windows_are_fixed_disjoint_and_spread():
    data = np.arange(100, dtype=np.uint8)
    assert held_out_windows(data, count=4, length=9)[:, 0].tolist() == [0, 20, 50, 70]
    every = held_out_windows(data, count=1000, length=9)
    assert every.shape == (10, 10) and every.ravel().tolist() == list(range(100))


def test_the_held_out_pass_is_over_whole_batches_and_its_loss_is_their_mean(tmp_path, monkeypatch):
    """200 bytes are 20 held out, 5 windows of 4: two batches of 2, and one window left out."""
    (tmp_path / "text").write_bytes(bytes(range(1, 201)))
    settings = Settings(batch=2, length=3, eval_windows=100)
    batches = reports.held_out_batches(settings, read_corpus(str(tmp_path / "text")))
    assert batches.shape == (2, 2, 4) and batches[:, :, 0].tolist() == [[181, 185], [189, 193]]
    losses = {181: np.log(2), 189: 4 * np.log(2)}

    def evaluate(model, windows):
        first = int(windows[0, 0])
        return np.float64(losses[first]), (np.array([first, 1]),), f"routings of {first}"

    monkeypatch.setattr(reports, "evaluate", evaluate)
    bits, loads, routings = inspect.unwrap(reports.held_out_pass)(
        batches, Devices(None), None, keep=True
    )
    assert bits == pytest.approx(2.5, rel=1e-7) and loads.tolist() == [[370, 2]]
    assert routings == ["routings of 181", "routings of 189"]

"""A byte corpus: which files it is made of, how they are split, which windows a step sees."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from jaxtyping import UInt8

from .settings import UserError

_LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}
# Written when Python is built: they differ between two builds of one version.
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
_HELD_OUT_ONE_IN = 10
_MOST_BYTES = 2**30


class CorpusError(UserError):
    """The text is missing, unreadable, empty or too short."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, with what is needed to name the corpus in a report.

    `sha256` covers the relative names and the contents of all files, in order.
    """

    source: str
    sha256: str
    training: UInt8[np.ndarray, " _"]
    held_out: UInt8[np.ndarray, " _"]
    training_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    binary_files: int
    empty_files: int
    split: str

    @property
    def num_files(self) -> int:
        """Files used; a file split by position counts once."""
        return len(set(self.training_files) | set(self.held_out_files))

    def identity(self) -> dict:
        """What a checkpoint or report says about its corpus."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "files": self.num_files,
            "bytes": self.training.size + self.held_out.size,
            "training_bytes": self.training.size,
            "held_out_bytes": self.held_out.size,
            "split": self.split,
            "python": platform.python_version(),
        }

    def describe(self) -> str:
        """Two lines for the terminal."""
        left_out = f"{self.binary_files} binary and {self.empty_files} empty files skipped"
        return (
            f"corpus: {self.source}: {self.num_files} files,"
            f" {self.training.size + self.held_out.size:,} bytes ({left_out}),"
            f" Python {platform.python_version()}, sha256 {self.sha256}\n"
            f"split {self.split}: {len(self.training_files)} files,"
            f" {self.training.size:,} bytes to train on; {len(self.held_out_files)} files,"
            f" {self.held_out.size:,} bytes held out"
        )


def read_corpus(text: str | None = None) -> Corpus:
    """Read `text` (a file or a folder), or the standard library's own source when it is None.

    About one file in ten is held out, chosen by the MD5 of its relative path. A single file is
    split by position instead. Files that contain a zero byte count as binary and are skipped.

    Raises [`braidax._training.corpus.CorpusError`][] when there is nothing to read.
    """
    if text is None:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        source = "the Python standard library's source"
        names = filter(_is_library_source, _walk(root))
    else:
        root, source = pathlib.Path(text), text
        # `os.path` answers False where `pathlib` raises, as for a name that is too long. A device
        # or a pipe is neither of the two and might never end.
        if not (os.path.isfile(text) or os.path.isdir(text)):
            known = os.path.exists(text)
            reason = "neither a file nor a folder" if known else "no such file or folder"
            raise CorpusError(f"--text {text}: {reason}")
        names = _walk(root) if os.path.isdir(text) else iter([root.name])
        root = root if os.path.isdir(text) else root.parent
    contents = {name: _read(root / name) for name in sorted(_small_enough(source, root, names))}
    kept = {name: data for name, data in contents.items() if data and b"\0" not in data}
    empty = sum(not data for data in contents.values())
    binary = len(contents) - len(kept) - empty
    if not kept:
        found = f"{len(contents)} files, {empty} of them empty and {binary} binary"
        raise CorpusError(f"{source}: no text to train on ({found})")
    training, held_out, split = _split(kept)
    return Corpus(
        source=source,
        sha256=_sha256(kept),
        training=np.frombuffer(b"".join(training.values()), np.uint8),
        held_out=np.frombuffer(b"".join(held_out.values()), np.uint8),
        training_files=tuple(training),
        held_out_files=tuple(held_out),
        binary_files=binary,
        empty_files=empty,
        split=split,
    )


def check_length(corpus: Corpus, length: int) -> None:
    """Raise unless both parts hold at least one window of `length + 1` bytes."""
    for part, data in (("training", corpus.training), ("held-out", corpus.held_out)):
        if data.size <= length:
            raise CorpusError(
                f"{corpus.source}: too short: the {part} part has {data.size} bytes,"
                f" --length {length} needs at least {length + 1}"
            )


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Relative names, with forward slashes, of the files below `root`; hidden ones left out."""
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = pathlib.Path(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path.relative_to(root).as_posix()


def _refuse(error: OSError) -> NoReturn:
    """A folder that is passed over would change the corpus without a word."""
    raise CorpusError(f"cannot read {error.filename}: {error.strerror}") from error


def _is_library_source(name: str) -> bool:
    parts = name.split("/")
    return (
        name.endswith(".py")
        and not _LEFT_OUT_FOLDERS.intersection(parts)
        and not any(part.startswith(_LEFT_OUT_PREFIXES) for part in parts)
    )


def _small_enough(source: str, root: pathlib.Path, names: Iterator[str]) -> Iterator[str]:
    """All of `names`, or an error: a whole disk, named by mistake, must not be read."""
    size = 0
    for name in names:
        try:
            size += os.path.getsize(root / name)
        except OSError as error:
            _refuse(error)
        if size > _MOST_BYTES:
            raise CorpusError(f"{source}: too long: at most {_MOST_BYTES:,} bytes are read")
        yield name


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(error)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.md5(os.fsencode(name), usedforsecurity=False).digest(), "little")


def _split(contents: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes], str]:
    """`(training, held_out, how)`."""
    if len(contents) == 1:
        ((name, data),) = contents.items()
        cut = len(data) - max(1, len(data) // _HELD_OUT_ONE_IN)
        return {name: data[:cut]}, {name: data[cut:]}, "by position (a single file: its last tenth)"
    ranked = sorted(contents, key=_digest)
    chosen = {name for name in contents if _digest(name) % _HELD_OUT_ONE_IN == 0}
    # At least one file on either side, however few there are.
    chosen = (chosen or {ranked[0]}) - ({ranked[-1]} if len(chosen) == len(contents) else set())
    training = {name: data for name, data in contents.items() if name not in chosen}
    held_out = {name: data for name, data in contents.items() if name in chosen}
    return training, held_out, "by file (MD5 of the relative path)"


def _sha256(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in contents.items():
        encoded = os.fsencode(name)
        for piece in (encoded, data):
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
    return digest.hexdigest()

"""A byte corpus of real text: its files, how they are split, and which windows a step sees."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from .settings import UserError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when Python is built: they differ between two builds of one version.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_HELD_OUT_ONE_IN = 10
_MOST_BYTES = 2**30  # a whole disk, named by mistake, must not be read


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out.

    `sha256` covers the relative names and the contents of all files, in order. `skipped_files` is
    the number of files that were binary or empty.
    """

    source: str
    sha256: str
    training: UInt8[np.ndarray, " _"]
    held_out: UInt8[np.ndarray, " _"]
    training_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    skipped_files: int

    def identity(self) -> dict:
        """What report.json says about the corpus. A file that is split counts once."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "python": platform.python_version(),
            "files": len({*self.training_files, *self.held_out_files}),
            "skipped_files": self.skipped_files,
            "training_bytes": self.training.size,
            "held_out_bytes": self.held_out.size,
        }

    def describe(self) -> str:
        """The same as one line for the terminal."""
        items = self.identity().items()
        return "corpus: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in items)


def read_corpus(text: str | None = None, *, length: int = 0) -> Corpus:
    """Read `text` (a file or a folder), or the standard library's own source if it is None.

    About one file in ten is held out, chosen by the MD5 of its relative path. Of a single file, the
    last tenth is held out. Files that contain a zero byte count as binary and are skipped.

    Raises `UserError` unless both parts hold a window of `length + 1` bytes.
    """
    source = "the Python standard library's source" if text is None else text
    try:
        files = _read_files(text, source)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror}") from error
    kept = {name: data for name, data in sorted(files.items()) if data and b"\0" not in data}
    if not kept:
        raise UserError(f"{source}: no text to train on ({len(files)} files, empty or binary)")
    digest = hashlib.sha256()
    for name, data in kept.items():
        for piece in (os.fsencode(name), data):
            digest.update(len(piece).to_bytes(8, "little") + piece)
    parts = _split(kept)
    training, held_out = (np.frombuffer(b"".join(part.values()), np.uint8) for part in parts)
    for name, data in (("training", training), ("held-out", held_out)):
        if data.size <= length:
            raise UserError(
                f"{source}: too short: the {name} part has {data.size} bytes,"
                f" --length {length} needs at least {length + 1}"
            )
    names, skipped = map(tuple, parts), len(files) - len(kept)
    return Corpus(source, digest.hexdigest(), training, held_out, *names, skipped)


def _read_files(text: str | None, source: str) -> dict[str, bytes]:
    """`{relative name: contents}`. Raises `OSError` and `UserError`."""
    root = pathlib.Path(sysconfig.get_path("stdlib") if text is None else text)
    if os.path.isfile(root):
        root, names = root.parent, iter([root.name])
    elif os.path.isdir(root):
        names = _walk(root, library=text is None)
    else:  # A device or a pipe is neither, and might never end.
        found = "neither a file nor a folder" if os.path.exists(root) else "no such file or folder"
        raise UserError(f"--text {text}: {found}")
    contents, size = {}, 0
    for name in names:
        size += os.path.getsize(root / name)
        if size > _MOST_BYTES:
            raise UserError(f"{source}: too long: at most {_MOST_BYTES:,} bytes are read")
        contents[name] = (root / name).read_bytes()
    return contents


def _walk(root: pathlib.Path, *, library: bool) -> Iterator[str]:
    """Relative names, with forward slashes, of the files below `root`; hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise error  # a folder that is passed over would change the corpus without a word

    def wanted(name: str) -> bool:
        skipped = name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES)
        return not (name.startswith(".") or (library and skipped))

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = filter(wanted, folders)
        for path in (pathlib.Path(folder, name) for name in files if wanted(name)):
            if os.path.isfile(path) and (path.suffix == ".py" or not library):
                yield path.relative_to(root).as_posix()


def _split(files: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """`(training, held_out)`, each with at least one file, or a part of the only one."""
    if len(files) == 1:
        ((name, data),) = files.items()
        cut = len(data) - max(1, len(data) // _HELD_OUT_ONE_IN)
        return {name: data[:cut]}, {name: data[cut:]}
    md5 = {name: hashlib.md5(os.fsencode(name), usedforsecurity=False).digest() for name in files}
    numbers = {name: int.from_bytes(digest, "little") for name, digest in md5.items()}
    ranked = sorted(files, key=numbers.__getitem__)
    chosen = {name for name in files if numbers[name] % _HELD_OUT_ONE_IN == 0} or {ranked[0]}
    chosen -= {ranked[-1]} if len(chosen) == len(files) else set()
    training = {name: data for name, data in files.items() if name not in chosen}
    return training, {name: data for name, data in files.items() if name in chosen}


def training_windows(
    data: UInt8[np.ndarray, " _"], *, batch: int, length: int, seed: int, step: int
) -> Int[np.ndarray, "batch {length}+1"]:
    """Random windows of `length + 1` bytes: a pure function of `(seed, step)`.

    A counter-based generator (Philox, Salmon et al. 2011) needs no state, so a resumed run sees
    the windows that the uninterrupted run would have seen. `random_raw` is used because NumPy
    keeps the raw stream the same for ever, and `Generator.integers` not.
    """
    generator = np.random.Philox(key=seed, counter=[0, 0, 0, step])
    starts = generator.random_raw(batch) % np.uint64(data.size - length)
    return sliding_window_view(data, length + 1)[starts].astype(np.int32)


def held_out_windows(
    data: UInt8[np.ndarray, " _"], *, count: int, length: int
) -> Int[np.ndarray, "batch {length}+1"]:
    """At most `count` fixed windows of `length + 1` bytes, disjoint and spread evenly."""
    available = data.size // (length + 1)
    count = min(count, available)
    starts = np.arange(count, dtype=np.int64) * available // count * (length + 1)
    return sliding_window_view(data, length + 1)[starts].astype(np.int32)

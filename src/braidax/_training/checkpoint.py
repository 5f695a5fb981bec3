"""One file: a JSON header line, the leaves of the training state, a SHA-256 of all before it.

Replaced atomically.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Generator
from typing import Any, BinaryIO

import equinox as eqx

from .corpus import Corpus, check_length, read_corpus
from .settings import Settings, UserError

FILE_NAME = "checkpoint.eqx"
_FORMAT = 2
_LONGEST_HEADER = 2**16
_DIGEST_SIZE = hashlib.sha256().digest_size


class CheckpointError(UserError):
    """The checkpoint is missing, damaged or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known before the arrays are read."""

    settings: Settings
    step: int
    corpus_sha256: str


class _HashingWriter:
    """Passes bytes on and hashes them.

    No file to NumPy, which would write to one past Python and lose the error's number.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


@contextlib.contextmanager
def _system_errors() -> Generator[None, None, None]:
    """Equinox wraps an error in one that names the leaf: a full disk is not about a leaf."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__
        raise cause or error from None


def save(folder: pathlib.Path, header: Header, state: Any) -> None:
    """Write `folder/checkpoint.eqx`. A kill at any moment leaves the old file or the new one.

    Raises `OSError` (full disk, read-only folder); the old file stays and no other is left.
    """
    temporary = folder / (FILE_NAME + ".tmp")
    line = json.dumps({"format": _FORMAT, **dataclasses.asdict(header)}, sort_keys=True)
    try:
        with open(temporary, "wb") as file:
            writer = _HashingWriter(file)
            writer.write(line.encode() + b"\n")
            with _system_errors():
                eqx.tree_serialise_leaves(writer, state)
            file.write(writer.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / FILE_NAME)
    except BaseException:
        # Half a file would keep a full disk full.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(folder)


def read_header(folder: pathlib.Path) -> Header:
    """Read the first line. Raises [`braidax._training.checkpoint.CheckpointError`][]."""
    path = folder / FILE_NAME
    try:
        with open(path, "rb") as file:
            record = json.loads(file.readline(_LONGEST_HEADER))
        if record.pop("format") != _FORMAT:
            raise ValueError("another format")
        settings, step, sha256 = record["settings"], record["step"], record["corpus_sha256"]
        if type(step) is not int or step < 0 or not isinstance(sha256, str):
            raise ValueError("no step number or no corpus")
        return Header(Settings(**settings), step, sha256)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this version: {error}") from error


def read_same_corpus(header: Header) -> Corpus:
    """The text of the run. Raises `CorpusError`, and `CheckpointError` if it has changed."""
    corpus = read_corpus(header.settings.text)
    check_length(corpus, header.settings.length)
    if corpus.sha256 != header.corpus_sha256:
        raise CheckpointError(
            f"{corpus.source} has changed: sha256 {corpus.sha256}, the checkpoint was trained on"
            f" {header.corpus_sha256}"
        )
    return corpus


def load_state(folder: pathlib.Path, like: Any) -> Any:
    """The state saved in `folder`; `like` has its structure, shapes and dtypes.

    Raises `CheckpointError`, also where a single bit differs from what was saved.
    """
    path = folder / FILE_NAME
    try:
        with open(path, "rb") as file:
            end = _checked_end(file)
            file.seek(0)
            file.readline()
            state = eqx.tree_deserialise_leaves(file, like)
            if file.tell() != end:
                raise ValueError("more bytes than expected")
    except (RuntimeError, ValueError, EOFError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged: {reason}") from error
    return state


def _checked_end(file: BinaryIO) -> int:
    """Where the leaves end; `ValueError` unless the checksum behind them is theirs."""
    end = os.fstat(file.fileno()).st_size - _DIGEST_SIZE
    digest, left = hashlib.sha256(), end
    while left > 0 and (piece := file.read(min(left, 2**20))):
        digest.update(piece)
        left -= len(piece)
    if end < 0 or file.read() != digest.digest():
        raise ValueError("its checksum does not match")
    return end


def _sync_folder(folder: pathlib.Path) -> None:
    """Make the new name survive a power cut too, where the system can sync a folder."""
    # The file is safe already; Windows and some network drives refuse to open or sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

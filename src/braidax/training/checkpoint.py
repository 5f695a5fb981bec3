"""One file: a JSON header line, the leaves of the training state, a SHA-256 of all before it."""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._atomic_file import replacing
from .corpus import Corpus, read_corpus
from .settings import Settings, UserError

FILE_NAME = "checkpoint.eqx"
_FORMAT = 3
_DIGEST_SIZE = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class Header:
    """A run beside its arrays: settings, steps done, SHA-256 of its text, rows of metrics.csv."""

    settings: Settings
    step: int
    corpus_sha256: str
    rows: list[list[Any]] = dataclasses.field(default_factory=list)


def save(folder: pathlib.Path, header: Header, state: PyTree) -> None:
    """Write `folder/checkpoint.eqx`, whole or not at all. Raises `OSError`, as on a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    record = {"format": _FORMAT, **dataclasses.asdict(header)}
    buffer.write(json.dumps(record, sort_keys=True).encode() + b"\n")
    eqx.tree_serialise_leaves(buffer, state)
    buffer.write(hashlib.sha256(buffer.getvalue()).digest())
    with replacing(folder / FILE_NAME) as file:
        file.write(buffer.getbuffer())


def load(folder: pathlib.Path, like: Callable[[Settings], PyTree]) -> tuple[Header, PyTree]:
    """Read `folder/checkpoint.eqx`. `like(settings)` has the structure of the state.

    Raises `UserError`, also where a single bit differs from what was saved.
    """
    path = folder / FILE_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    content, digest = data[:-_DIGEST_SIZE], data[-_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise UserError(f"{path} is damaged or no checkpoint: its checksum does not match")
    line, _, leaves = content.partition(b"\n")
    try:
        record = json.loads(line)
        if record.pop("format") != _FORMAT:
            raise ValueError("another format")
        header = Header(Settings(**record.pop("settings")), **record)
        shapes = eqx.filter_eval_shape(like, header.settings)
        return header, eqx.tree_deserialise_leaves(io.BytesIO(leaves), shapes)
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a checkpoint of this version: {reason}") from error


def read_same_corpus(header: Header) -> Corpus:
    """The text of a run. Raises `UserError` if it has changed."""
    corpus = read_corpus(header.settings.text, length=header.settings.length)
    if corpus.sha256 != header.corpus_sha256:
        raise UserError(
            f"{corpus.source} has changed: sha256 {corpus.sha256}, the checkpoint was trained on"
            f" {header.corpus_sha256}"
        )
    return corpus

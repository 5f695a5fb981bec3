"""One file: a JSON header line, then the leaves of the training state. Replaced atomically."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import equinox as eqx

from .settings import Settings, UserError

FILE_NAME = "checkpoint.eqx"
_FORMAT = 1


class CheckpointError(UserError):
    """The checkpoint is missing, damaged or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known before the arrays are read."""

    settings: Settings
    step: int
    corpus_sha256: str


def save(folder: pathlib.Path, header: Header, state: Any) -> None:
    """Write `folder/checkpoint.eqx`. A kill at any moment leaves the old file or the new one."""
    temporary = folder / (FILE_NAME + ".tmp")
    with open(temporary, "wb") as file:
        line = json.dumps({"format": _FORMAT, **dataclasses.asdict(header)}, sort_keys=True)
        file.write(line.encode() + b"\n")
        eqx.tree_serialise_leaves(file, state)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE_NAME)


def read_header(folder: pathlib.Path) -> Header:
    """Read the first line. Raises [`braidax._training.checkpoint.CheckpointError`][]."""
    path = folder / FILE_NAME
    try:
        with open(path, "rb") as file:
            record = json.loads(file.readline())
        if record.pop("format") != _FORMAT:
            raise ValueError("another format")
        settings = Settings(**record["settings"])
        return Header(settings, record["step"], record["corpus_sha256"])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this version: {error}") from error


def load_state(folder: pathlib.Path, like: Any) -> Any:
    """The state saved in `folder`; `like` has its structure, shapes and dtypes."""
    path = folder / FILE_NAME
    with open(path, "rb") as file:
        file.readline()
        try:
            state = eqx.tree_deserialise_leaves(file, like)
        except (RuntimeError, ValueError, EOFError, OSError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is damaged: {reason}") from error
        if file.read(1):
            raise CheckpointError(f"{path} is damaged: more bytes than expected")
    return state

"""The tensors of one file, or of a folder of shards, by name."""

import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from .errors import mistake
from .safetensors_reader import Entry, SafetensorsFile, unique_keys

_INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_SPECIAL = set("/\\:\0")


class StoredTensors:
    """The tensors of a checkpoint by name. A shard is opened when one of its tensors is asked for.

    `source` lists the tensors: an index, a folder or a file. `folder` is where it lies, `files`
    the file of each tensor.
    """

    source: pathlib.Path
    folder: pathlib.Path
    files: dict[str, pathlib.Path]

    def __init__(self, path: str | os.PathLike[str]):
        """**Arguments:** `path`: a `.safetensors` file, an index, or a folder. The index of a
        folder decides; without an index, all its `.safetensors` files are the checkpoint.

        **Raises:** `FileNotFoundError` if there is nothing to read. `ValueError` for an index
        that is malformed or names anything but plain files beside it. `ValueError` for a tensor
        that two files without an index both hold.
        """
        path = pathlib.Path(path)
        self.folder = path if path.is_dir() else path.parent
        self._shards: dict[pathlib.Path, SafetensorsFile] = {}
        index = _find_index(path)
        self.source = path if index is None else index
        if index is None:
            self.files = self._names_of(_find_files(path))
        else:
            self.files = _read_index(index)

    @classmethod
    def of_file(cls, file: SafetensorsFile) -> "StoredTensors":
        """The tensors of one file that is open."""
        tensors = cls.__new__(cls)
        tensors.source = tensors.folder = file.path
        tensors._shards = {file.path: file}
        tensors.files = dict.fromkeys(file.entries, file.path)
        return tensors

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor, from its shard's header."""
        return self._shard(name).entry(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor, memory-mapped: see `SafetensorsFile.read`."""
        return self._shard(name).read(name)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: see `SafetensorsFile.raw`."""
        return self._shard(name).raw(name)

    def where(self, name: str) -> pathlib.Path:
        """The file of a tensor, or what should have listed it."""
        return self.files.get(name, self.source)

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self.files:
            raise mistake(self.source, name, "be listed", f"{len(self.files)} other tensors")
        path = self.files[name]
        if path not in self._shards:
            if not path.is_file():
                raise mistake(self.source, name, f"lie in the shard {path.name}", "no file")
            self._shards[path] = SafetensorsFile(path)
        return self._shards[path]

    def _names_of(self, paths: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
        files: dict[str, pathlib.Path] = {}
        for path in paths:
            self._shards[path] = SafetensorsFile(path)
            for name in self._shards[path].entries:
                if name in files:
                    must = f"lie in one file only, for lack of an index, not in {files[name].name}"
                    raise mistake(path, name, must, "it here too")
                files[name] = path
        return files


def _find_index(path: pathlib.Path) -> pathlib.Path | None:
    if not path.is_dir():
        return path if path.name.endswith(_INDEX_SUFFIX) else None
    found = sorted(path.glob(f"*{_INDEX_SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(index.name for index in found)
        raise mistake(path, _INDEX_SUFFIX, "end the name of at most one file: give its path", names)
    return found[0] if found else None


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path]
    if not found:
        raise FileNotFoundError(f"There is no {_SUFFIX} file in {path}.")
    return found


def _read_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file at {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise mistake(path, "index", "be JSON with unique keys", error) from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise mistake(path, "weight_map", "map tensors to files", type(shards).__name__)
    # Thousands of tensors share a shard: each path is made once.
    paths: dict[str, pathlib.Path] = {}
    files = {}
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            must = f"lie in a plain {_SUFFIX} file beside the index"
            raise mistake(path, name, must, repr(shard))
        if shard not in paths:
            paths[shard] = path.parent / shard
        files[name] = paths[shard]
    return files


def _is_plain(shard: str) -> bool:
    """No separators of any system, no drive, no parent folder."""
    return shard.endswith(_SUFFIX) and len(os.fsencode(shard)) < 256 and not set(shard) & _SPECIAL

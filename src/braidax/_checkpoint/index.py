"""The tensors of one file, or of a folder of shards, by name."""

import os
import pathlib
from collections.abc import Mapping

from .safetensors_reader import StoredTensor, mistake, parsed_json, read_header

_INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_SPECIAL = set("/\\:\0")


class StoredTensors:
    """The tensors of a checkpoint by name. A shard is opened when a tensor in it is asked for."""

    source: pathlib.Path  # what lists the tensors: an index, a folder or a file
    folder: pathlib.Path  # where the source lies
    files: dict[str, pathlib.Path]  # the file of each tensor

    def __init__(self, path: str | os.PathLike[str]):
        """`path` is a `.safetensors` file, an index, or a folder. The index of a folder decides;
        without an index, all its `.safetensors` files are the checkpoint."""
        path = pathlib.Path(path)
        self.source, self.folder = path, path if path.is_dir() else path.parent
        self._shards: dict[pathlib.Path, Mapping[str, StoredTensor]] = {}
        indices = sorted(path.glob(f"*{_INDEX_SUFFIX}")) if path.is_dir() else []
        if len(indices) > 1:
            must = "end the name of at most one file: give its path"
            found = ", ".join(index.name for index in indices)
            raise mistake(path, _INDEX_SUFFIX, must, found)
        if indices or path.name.endswith(_INDEX_SUFFIX):
            self.source = indices[0] if indices else path
            self.files = _read_index(self.source)
            return
        shards = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path]
        if not shards:
            raise FileNotFoundError(f"There is no {_SUFFIX} file in {path}.")
        self.files = {}
        for shard in shards:
            self._shards[shard] = read_header(shard)
            for name, tensor in self._shards[shard].items():
                if name in self.files:
                    other = self.files[name].name
                    must = f"lie in one file only, for lack of an index, not in {other}"
                    raise tensor.mistake(must, "it here too")
                self.files[name] = shard

    @classmethod
    def in_memory(cls, name: str, tensors: Mapping[str, StoredTensor]) -> "StoredTensors":
        """Tensors that are no file; errors call them `name`."""
        self = cls.__new__(cls)
        self.source = self.folder = pathlib.Path(name)
        self.files, self._shards = dict.fromkeys(tensors, self.source), {self.source: tensors}
        return self

    def __getitem__(self, name: str) -> StoredTensor:
        """A tensor, by what its shard's header says.

        **Raises:** `ValueError` if it or its shard is not there, or if the shard is damaged."""
        if name not in self.files:
            raise self.mistake(name, "be listed", f"{len(self.files)} other tensors")
        path = self.files[name]
        if path not in self._shards:
            if not path.is_file():
                raise mistake(self.source, name, f"lie in the shard {path.name}", "no file")
            self._shards[path] = read_header(path)
        shard = self._shards[path]
        if name not in shard:
            raise self.mistake(name, "be in the file", f"{len(shard)} other tensors")
        return shard[name]

    def mistake(self, name: str, must: str, got: object) -> ValueError:
        """The error to raise about a tensor: it names its file, or what should have listed it."""
        return mistake(self.files.get(name, self.source), name, must, got)


def _read_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file at {path}.")
    shards = parsed_json(path, "index", path.read_bytes()).get("weight_map")
    if not isinstance(shards, dict):
        raise mistake(path, "weight_map", "map tensors to files", type(shards).__name__)
    # Thousands of tensors share a shard: each path is made once.
    paths: dict[str, pathlib.Path] = {}
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            must = f"lie in a plain {_SUFFIX} file beside the index"
            raise mistake(path, name, must, repr(shard))
        if shard not in paths:
            paths[shard] = path.parent / shard
    return {name: paths[shard] for name, shard in shards.items()}


def _is_plain(shard: str) -> bool:
    """No separators of any system, no drive, no parent folder."""
    return shard.endswith(_SUFFIX) and len(os.fsencode(shard)) < 256 and not set(shard) & _SPECIAL

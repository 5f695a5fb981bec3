"""What a checkpoint holds, read from the headers of its files."""

import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .._config import MoEConfig
from .errors import mistake
from .index import Checkpoint
from .layer import check_tensor, read_table
from .safetensors_reader import Entry
from .stored_matrix import FP4_TYPES

_LAYER = re.compile(r"(?:model\.)?((?:layers|mtp)\.\d+)\.(?:ffn|mlp)\.(.*)")
_WEIGHT_OF = {".weight_scale_inv": ".weight", ".scale": ".weight", "_scale_inv": ""}
_HASH_TABLE = "gate.tid2eid"


class TableStatistics(NamedTuple):
    """How a hash table spreads its token ids: `fewest` and `most` ids of an expert, `unused`
    experts without any, `repeated` rows that name an expert twice."""

    vocab_size: int
    fewest: int
    most: int
    unused: int
    repeated: int


class LayerSummary(NamedTuple):
    """The feed-forward part of one layer.

    `router` is `"hash"`, `"top-k"` or `"dense"`. `num_bytes` counts what is stored by dtype,
    scales included; 4-bit weights are `"FP4"`, whatever dtype holds them. `active` counts the
    parameters that one token uses, None where the experts per token are not known.
    """

    name: str
    router: str
    num_experts: int
    num_experts_per_token: int | None
    num_bytes: dict[str, int]
    parameters: int
    active: int | None
    table: TableStatistics | None


class Summary(NamedTuple):
    """A checkpoint, or the one layer of it that was asked for.

    Parameters are floating-point numbers and quantised ones; neither scales nor hash tables.
    `active` leaves layers of multi-token prediction (`mtp`) out. `note` says what could not be
    found out, and why.
    """

    path: pathlib.Path
    num_files: int
    num_tensors: int
    num_bytes: dict[str, int]
    parameters: int
    active: int | None
    layers: tuple[LayerSummary, ...]
    note: str | None


class _Count(NamedTuple):
    dtype: str
    num_bytes: int
    parameters: int


def summarise(path: str | os.PathLike[str], layer_idx: int | None = None) -> Summary:
    """Sizes, dtypes and routers of a checkpoint, or of one of its layers.

    Headers are read, and hash tables; no weights. The experts per token are the columns of a
    layer's hash table or what the `config.json` beside the files says.

    **Raises:** `FileNotFoundError` without a checkpoint; `ValueError` naming file and tensor for
    files that are damaged or absent, and for a layer that does not exist.
    """
    checkpoint = Checkpoint(path)
    names = checkpoint.files.keys()
    if layer_idx is not None:
        start = re.compile(rf"(?:model\.)?layers\.{layer_idx}\.")
        names = [name for name in names if start.match(name)]
        if not names:
            found = f"{len(checkpoint.files)} other tensors"
            raise mistake(checkpoint.source, f"layers.{layer_idx}", "be in the checkpoint", found)
    entries = {name: checkpoint.entry(name) for name in names}
    counts = {name: _count(name, entry, entries) for name, entry in entries.items()}
    per_token, note = _experts_per_token(checkpoint.folder)
    groups: dict[str, dict[str, str]] = {}
    for name in entries:
        match = _LAYER.fullmatch(name)
        if match is not None:
            groups.setdefault(match[1], {})[match[2]] = name
    layers = tuple(
        _layer(checkpoint, layer, groups[layer], counts, per_token)
        for layer in sorted(groups, key=_position)
    )
    parameters = sum(count.parameters for count in counts.values())
    return Summary(
        path=pathlib.Path(path),
        num_files=len({checkpoint.files[name] for name in names}),
        num_tensors=len(entries),
        num_bytes=_bytes(counts.values()),
        parameters=parameters,
        active=_active(parameters, layers, counts),
        layers=layers,
        note=note,
    )


def _position(layer: str) -> tuple[str, int]:
    kind, number = layer.split(".")
    return kind, int(number)


def _count(name: str, entry: Entry, entries: Mapping[str, Entry]) -> _Count:
    """What a tensor stores; its parameters are counted in numbers, of which FP4 packs two."""
    num_bytes, numbers = entry.stop - entry.start, math.prod(entry.shape)
    for ending, weight in _WEIGHT_OF.items():
        if name.endswith(ending) and name.removesuffix(ending) + weight in entries:
            return _Count(entry.dtype, num_bytes, 0)
    if entry.dtype in FP4_TYPES:
        stem = name.removesuffix(".weight")
        if any(stem + ending in entries for ending in _WEIGHT_OF):
            return _Count("FP4", num_bytes, 2 * num_bytes)
    is_number = "F" in entry.dtype
    return _Count(entry.dtype, num_bytes, numbers if is_number else 0)


def _bytes(counts: Iterable[_Count]) -> dict[str, int]:
    """Bytes by dtype, most first."""
    total: Counter[str] = Counter()
    for count in counts:
        total[count.dtype] += count.num_bytes
    return dict(total.most_common())


def _experts_per_token(folder: pathlib.Path) -> tuple[int | None, str | None]:
    try:
        return MoEConfig.from_hf(folder).num_experts_per_token, None
    except (FileNotFoundError, ValueError) as error:
        return None, f"experts per token only known for hash layers: {error}"


def _layer(
    checkpoint: Checkpoint,
    layer: str,
    names: Mapping[str, str],
    counts: Mapping[str, _Count],
    per_token: int | None,
) -> LayerSummary:
    own = {rest: counts[name] for rest, name in names.items()}
    parameters = sum(count.parameters for count in own.values())
    num_bytes = _bytes(own.values())
    if "gate.weight" not in names:
        return LayerSummary(layer, "dense", 0, None, num_bytes, parameters, parameters, None)
    num_experts, _ = check_tensor(checkpoint, names["gate.weight"], (None, None))
    table = None
    if _HASH_TABLE in names:
        array = read_table(checkpoint, names[_HASH_TABLE], num_experts)
        table, per_token = _table_statistics(array, num_experts), array.shape[1]
    elif layer.startswith("mtp"):
        per_token = None  # may differ from the model's
    active = None
    if per_token is not None and num_experts:
        in_experts = sum(n.parameters for rest, n in own.items() if rest.startswith("experts."))
        active = parameters - in_experts + in_experts * per_token // num_experts
    router = "top-k" if table is None else "hash"
    return LayerSummary(layer, router, num_experts, per_token, num_bytes, parameters, active, table)


def _table_statistics(table: np.ndarray, num_experts: int) -> TableStatistics:
    ids = np.bincount(table.ravel(), minlength=num_experts)
    ordered = np.sort(table, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1).sum()
    unused = (ids == 0).sum()
    return TableStatistics(len(table), int(ids.min()), int(ids.max()), int(unused), int(repeated))


def _active(
    parameters: int, layers: tuple[LayerSummary, ...], counts: Mapping[str, _Count]
) -> int | None:
    active = parameters - sum(n.parameters for name, n in counts.items() if "mtp." in name)
    for layer in layers:
        if not layer.name.startswith("mtp"):
            if layer.active is None:
                return None
            active += layer.active - layer.parameters
    return active

"""Counting what a checkpoint holds, from the headers of its files."""

import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .._checks import positive_integer
from .._config import MoEConfig
from .._families import Family
from .errors import mistake
from .index import StoredTensors
from .layer import read_table
from .safetensors_reader import Entry
from .stored_matrix import FP4_TYPES
from .summary import CheckpointSummary, LayerSummary, TableStatistics


class _Count(NamedTuple):
    dtype: str
    num_bytes: int
    parameters: int


def count_checkpoint(
    path: str | os.PathLike[str], tensors: StoredTensors, family: Family, layer_idx: int | None
) -> CheckpointSummary:
    """The summary of `tensors`, which lie at `path`: see `Checkpoint.summary`."""
    names = list(tensors.files)
    if layer_idx is not None:
        what = f"{family.layers}.{layer_idx}"
        starts = tuple(f"{prefix}{what}." for prefix in family.prefixes)
        names = [name for name in names if name.startswith(starts)]
        if not names:
            found = f"{len(tensors.files)} other tensors"
            raise mistake(tensors.source, what, "be in the checkpoint", found)
    entries = {name: tensors.entry(name) for name in names}
    counts = {name: _count(name, entry, entries, family) for name, entry in entries.items()}
    per_token, note = None, None
    try:
        per_token = MoEConfig.from_hf(tensors.folder).num_experts_per_token
        per_token = positive_integer("num_experts_per_token", per_token)
    except (FileNotFoundError, TypeError, ValueError) as error:
        note = f"experts per token only known for hash layers: {error}"
    groups: dict[tuple[str, int], dict[str, str]] = {}
    for name in entries:
        place = family.place(name)
        if place is not None:
            groups.setdefault((place.layers, place.layer_idx), {})[name] = place.rest
    layers = {
        layer: _layer(tensors, family, layer, groups[layer], counts, per_token)
        for layer in sorted(groups)
    }
    prediction = f"{family.prediction_layers}."
    active = sum(n.parameters for name, n in counts.items() if prediction not in name)
    for (kind, _), layer in layers.items():
        if kind == family.layers and active is not None:
            active = None if layer.active is None else active + layer.active - layer.parameters
    return CheckpointSummary(
        path=pathlib.Path(path),
        num_files=len({tensors.files[name] for name in names}),
        num_tensors=len(entries),
        num_bytes=_bytes(counts.values()),
        parameters=sum(count.parameters for count in counts.values()),
        active=active,
        layers=tuple(layers.values()),
        note=note,
    )


def _count(name: str, entry: Entry, entries: Mapping[str, Entry], family: Family) -> _Count:
    """What a tensor stores. Parameters are counted in numbers, of which FP4 packs two a byte."""
    num_bytes, names = entry.stop - entry.start, entries.keys()
    if not names.isdisjoint(family.scaled(name)):
        return _Count(entry.dtype, num_bytes, 0)
    if entry.dtype in FP4_TYPES:
        stem = name.removesuffix(".weight")
        if not names.isdisjoint([stem + ending for ending in family.scale_endings]):
            return _Count("FP4", num_bytes, 2 * num_bytes)
    return _Count(entry.dtype, num_bytes, math.prod(entry.shape) if "F" in entry.dtype else 0)


def _bytes(counts: Iterable[_Count]) -> dict[str, int]:
    """Bytes by dtype, most first."""
    total: Counter[str] = Counter()
    for count in counts:
        total[count.dtype] += count.num_bytes
    return dict(total.most_common())


def _layer(
    tensors: StoredTensors,
    family: Family,
    layer: tuple[str, int],
    names: Mapping[str, str],
    counts: Mapping[str, _Count],
    per_token: int | None,
) -> LayerSummary:
    """The tensors `names` of a layer, each with its own part of the name."""
    title = "{}.{}".format(*layer)
    parameters = sum(counts[name].parameters for name in names)
    num_bytes = _bytes(counts[name] for name in names)
    meanings = {name: family.meaning(rest) for name, rest in names.items()}
    known = {meaning: name for name, meaning in meanings.items()}
    if ("gate.weight", "weight") not in known:
        return LayerSummary(title, "dense", 0, None, num_bytes, parameters, parameters, None)
    gate = known["gate.weight", "weight"]
    shape = tensors.entry(gate).shape
    if len(shape) != 2:
        raise mistake(tensors.where(gate), gate, "have shape (experts, hidden)", shape)
    num_experts, table = shape[0], None
    if ("table", "weight") in known:
        array = read_table(tensors, known["table", "weight"], num_experts)
        table, per_token = _table_statistics(array, num_experts), array.shape[1]
    elif layer[0] == family.prediction_layers:
        per_token = None  # may differ from the model's
    active = None
    if per_token is not None and num_experts:
        in_experts = sum(
            counts[name].parameters
            for name, meaning in meanings.items()
            if meaning is not None and meaning[0].startswith("experts.")
        )
        active = parameters - in_experts + in_experts * per_token // num_experts
    router = "top-k" if table is None else "hash"
    return LayerSummary(title, router, num_experts, per_token, num_bytes, parameters, active, table)


def _table_statistics(table: np.ndarray, num_experts: int) -> TableStatistics:
    ids = np.bincount(table.ravel(), minlength=num_experts)
    ordered = np.sort(table, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1).sum()
    unused = (ids == 0).sum()
    return TableStatistics(len(table), int(ids.min()), int(ids.max()), int(unused), int(repeated))

"""Counting what a checkpoint holds, from the headers of its files."""

import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .._checks import positive_integer
from .._config import MoEConfig
from .._families import FAMILIES, Family, family_of
from .index import StoredTensors
from .layer import read_table
from .safetensors_reader import StoredTensor
from .stored_matrix import FP4_TYPES
from .summary import CheckpointSummary, LayerSummary, TableStatistics

# What only mixtures of experts have in the names of their tensors, of any family.
_MIXTURE = re.compile("expert|moe|router")


class _Count(NamedTuple):
    dtype: str
    num_bytes: int
    parameters: int


def count_checkpoint(
    path: str | os.PathLike[str], tensors: StoredTensors, layer_idx: int | None
) -> CheckpointSummary:
    """The summary of `tensors`, which lie at `path`: see `Checkpoint.summary`."""
    names, family, per_token, note = list(tensors.files), None, None, None
    try:
        config = MoEConfig.from_hf(tensors.folder)
        family = family_of(config.model_type)
        per_token = positive_integer("num_experts_per_token", config.num_experts_per_token)
    except (FileNotFoundError, TypeError, ValueError) as error:
        note = f"experts per token only known for hash layers: {error}"
    family = family or _recognized(names)
    if layer_idx is not None:
        what = f"{family.layers}.{layer_idx}"
        names = [name for name in names if f".{what}." in f".{name}"]
        if not names:
            found = f"{len(tensors.files)} other tensors"
            raise tensors.mistake(what, "be in the checkpoint", found)
    stored = {name: tensors[name] for name in names}
    counts = _counts(stored, family)
    layers, unknown = [], {name for name in names if _MIXTURE.search(name)}
    prediction = f"{family.prediction_layers}."
    active: int | None = sum(n.parameters for name, n in counts.items() if prediction not in name)
    for (word, number), prefixes in sorted(family.layers_of(names).items()):
        meanings = {
            prefix + rest: family.meaning(rest)
            for prefix, rests in prefixes.items()
            for rest in rests
            if rest not in family.ignored
        }
        predicts = word == family.prediction_layers  # with experts per token of its own
        layer = _layer(
            f"{word}.{number}", stored, counts, meanings, None if predicts else per_token
        )
        layers.append(layer)
        unknown -= {name for name, meaning in meanings.items() if meaning is not None}
        if not predicts and active is not None:
            active = None if layer.active is None else active + layer.active - layer.parameters
    if unknown:
        active, why = None, f"active parameters not known: no table has `{min(unknown)}`"
        note = why if note is None else f"{note}; {why}"
    return CheckpointSummary(
        path=pathlib.Path(path),
        num_files=len({tensors.files[name] for name in names}),
        num_tensors=len(names),
        num_bytes=_bytes(counts.values()),
        parameters=sum(count.parameters for count in counts.values()),
        active=active,
        layers=tuple(layers),
        note=note,
    )


def _recognized(names: list[str]) -> Family:
    """The family that knows most of these names; the first of equals."""

    def known(family: Family) -> int:
        layers = family.layers_of(names).values()
        rests = (rest for prefixes in layers for rests in prefixes.values() for rest in rests)
        return sum(family.meaning(rest) is not None for rest in rests)

    return max(FAMILIES, key=known)


def _counts(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, _Count]:
    """What each tensor stores. Parameters are counted in numbers, of which FP4 packs two a byte."""
    counts, scales = {}, set()
    for name, tensor in stored.items():
        num_bytes = tensor.stop - tensor.start
        own = [scale for scale in family.scales_of(name) if scale in stored]
        scales.update(own)
        if own and tensor.dtype in FP4_TYPES:
            counts[name] = _Count("FP4", num_bytes, 2 * num_bytes)
        else:
            parameters = math.prod(tensor.shape) if "F" in tensor.dtype else 0
            counts[name] = _Count(tensor.dtype, num_bytes, parameters)
    return counts | {name: counts[name]._replace(parameters=0) for name in scales}


def _bytes(counts: Iterable[_Count]) -> dict[str, int]:
    """Bytes by dtype, most first."""
    total: Counter[str] = Counter()
    for count in counts:
        total[count.dtype] += count.num_bytes
    return dict(total.most_common())


def _layer(
    title: str,
    stored: Mapping[str, StoredTensor],
    counts: Mapping[str, _Count],
    meanings: Mapping[str, tuple[str, str] | None],
    per_token: int | None,
) -> LayerSummary:
    """The layer whose tensors have `meanings`."""
    parameters = sum(counts[name].parameters for name in meanings)
    num_bytes = _bytes(counts[name] for name in meanings)
    known = {meaning: stored[name] for name, meaning in meanings.items() if meaning is not None}
    gate, table = known.get(("gate.weight", "weight")), known.get(("table", "weight"))
    if gate is None:
        is_dense = not any(map(_MIXTURE.search, meanings))
        router, active = ("dense", parameters) if is_dense else ("?", None)
        return LayerSummary(title, router, 0, None, num_bytes, parameters, active, None)
    if len(gate.shape) != 2:
        raise gate.mistake("have shape (experts, hidden)", gate.shape)
    num_experts, router, statistics, active = gate.shape[0], "top-k", None, None
    if table is not None:
        array = read_table(table, num_experts)
        router, per_token = "hash", array.shape[1]
        statistics = _table_statistics(array, num_experts)
    if per_token is not None and num_experts:
        in_experts = sum(
            counts[name].parameters
            for name, meaning in meanings.items()
            if meaning is not None and meaning[0].startswith("experts.")
        )
        active = parameters - in_experts + in_experts * per_token // num_experts
    return LayerSummary(
        title, router, num_experts, per_token, num_bytes, parameters, active, statistics
    )


def _table_statistics(table: np.ndarray, num_experts: int) -> TableStatistics:
    ids = np.bincount(table.ravel(), minlength=num_experts)
    ordered = np.sort(table, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1).sum()
    unused = (ids == 0).sum()
    return TableStatistics(len(table), int(ids.min()), int(ids.max()), int(unused), int(repeated))

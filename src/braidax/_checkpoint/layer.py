"""The tensors of one layer: which they are, and that the configuration asks for them."""

from typing import NamedTuple

import numpy as np

from .. import hash_tables
from .._config import MoEConfig
from .._families import Family
from .._families.family import Layers
from .index import StoredTensors
from .safetensors_reader import StoredTensor, mistake
from .stored_matrix import FLOATS


class NamedLayer(NamedTuple):
    """The tensors of one layer, each called `prefix` and one of `names`."""

    tensors: StoredTensors
    family: Family
    prefix: str
    names: list[str]


def find_layer(
    tensors: StoredTensors, family: Family, layers: Layers, layer_idx: int
) -> NamedLayer:
    """Layer `layer_idx` of those in `layers`."""
    what, prefixes = f"{family.layers}.{layer_idx}", layers.get((family.layers, layer_idx))
    if prefixes is None:
        numbers = [number for word, number in layers if word == family.layers]
        found = f"the layers {min(numbers)} to {max(numbers)}" if numbers else "no layer at all"
        must = f"be in the checkpoint, with an {' or '.join(family.blocks)}"
        raise tensors.mistake(what, must, found)
    (prefix, names), *others = prefixes.items()
    if others:
        path, found = tensors.files[prefix + names[0]], " and ".join(sorted(prefixes))
        raise mistake(path, what, "have one prefix", found)
    return NamedLayer(tensors, family, prefix, names)


def known_tensors(
    layer: NamedLayer, config: MoEConfig, layer_idx: int
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str]]:
    """The `"weight"` of each of `Family.spellings`, with its `"scale"`, if it has one.

    The second answer says why the layer does not compute with a tensor.

    **Raises:** `ValueError` naming file and tensor, unless the layer has every tensor that the
    configuration asks for, in one spelling, and no other.
    """
    tensors, family, prefix, names = layer
    meanings = {name: family.meaning(name) for name in names if name not in family.ignored}
    ignored = {prefix + name: why for name, why in family.ignored.items() if name in names}
    if ("gate.weight", "weight") not in meanings.values():
        found = f"a dense layer: {', '.join(sorted(names)[:4])}" if names else "nothing"
        gate = prefix + family.released("gate.weight")
        path = tensors.files[prefix + names[0]] if names else tensors.source
        raise mistake(path, gate, "be there, in a layer of experts", found)
    known: dict[str, dict[str, StoredTensor]] = {}
    for rest, meaning in meanings.items():
        tensor = tensors[prefix + rest]
        if meaning is None:
            raise tensor.mistake("have a known meaning", "a name in no table")
        other = known.setdefault(meaning[0], {}).setdefault(meaning[1], tensor)
        if other is not tensor:
            raise tensor.mistake(f"be the only one of its kind, next to {other.name}", "both")
    for parts in known.values():
        if "weight" not in parts:
            raise parts["scale"].mistake("scale a weight that is there", "no such weight")
    if config.is_hash_layer(layer_idx) and {"table", "selection_bias"} <= known.keys():
        ignored[known.pop("selection_bias")["weight"].name] = "the hash table selects alone"
    _check_presence(layer, known, config, layer_idx)
    return known, ignored


def _check_presence(
    layer: NamedLayer,
    known: dict[str, dict[str, StoredTensor]],
    config: MoEConfig,
    layer_idx: int,
) -> None:
    gate = known["gate.weight"]["weight"]
    check_shape(gate, (config.num_experts, config.hidden_size))
    stacked = {"experts.gate_up", "experts.down"}
    is_stacked = not stacked.isdisjoint(known)
    experts = range(config.num_experts)
    wanted = {"gate.weight", "table" if config.is_hash_layer(layer_idx) else "selection_bias"}
    wanted |= (
        stacked
        if is_stacked
        else {f"experts.{i}.{matrix}" for i in experts for matrix in ("gate", "up", "down")}
    )
    if config.num_shared_experts:
        wanted |= {"shared.gate", "shared.up", "shared.down"}
    fields = {"experts": "num_experts", "shared": "num_shared_experts"}
    for key in sorted(known.keys() ^ wanted):
        field = fields.get(key.split(".")[0], "num_hash_layers")
        why = f"as the configuration has {field}={getattr(config, field)}"
        if key in known:
            why = "beside stacked experts" if is_stacked and field == "num_experts" else why
            raise known[key]["weight"].mistake(f"not be there, {why}", "it")
        missing = gate._replace(name=layer.prefix + layer.family.released(key))
        must = f"be there, in one of its spellings, {why}"
        raise missing.mistake(must, f"{len(known)} other tensors")


def read_floats(tensor: StoredTensor, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A tensor of the router in `dtype`, which must hold its numbers."""
    check_shape(tensor, shape)
    if tensor.dtype not in FLOATS:
        raise tensor.mistake(f"have a dtype among {', '.join(FLOATS)}", tensor.dtype)
    array = tensor.read()
    # A signalling NaN is as good as any other, and no reason to warn.
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype, copy=False)
        if (np.isinf(result) & np.isfinite(array)).any():
            raise tensor.mistake(f"fit {dtype}", np.abs(array).max())
    return result


def read_table(tensor: StoredTensor, num_experts: int) -> np.ndarray:
    """A hash table, int32 (vocab, experts_per_token), of experts that there are."""
    table = tensor.read()
    try:
        return hash_tables.from_array(table, num_experts)
    except (TypeError, ValueError) as error:
        raise tensor.mistake(f"be integers in [0, {num_experts})", error) from error


def check_shape(tensor: StoredTensor, shape: tuple[int | None, ...]) -> None:
    """The tensor has `shape`, or is a mistake."""
    if tensor.shape != shape:
        raise tensor.mistake(f"have the configuration's shape {shape}", tensor.shape)

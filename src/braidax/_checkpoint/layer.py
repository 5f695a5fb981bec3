"""The tensors of one layer: which they are, and that the configuration asks for them."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .. import hash_tables
from .._config import MoEConfig
from .._families import Family
from .._families.family import STACKED_EXPERTS, Layers
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
        must = f"be in the checkpoint, with {family.released('gate.weight')} or another part"
        raise tensors.mistake(what, must, found)
    mixtures = [prefix for prefix, names in prefixes.items() if _has_gate(family, names)]
    if len(mixtures) > 1:
        path = tensors.files[mixtures[0] + prefixes[mixtures[0]][0]]
        raise mistake(path, what, "have one prefix", " and ".join(sorted(mixtures)))
    prefix = mixtures[0] if mixtures else next(iter(prefixes))
    if not mixtures:
        others = [
            number
            for (word, number), named in layers.items()
            if word == family.layers and any(_has_gate(family, names) for names in named.values())
        ]
        rest = ", ".join(sorted(prefixes[prefix])[:4])
        found = f"a dense layer: {rest}; mixtures are the layers {sorted(others)}"
        path = tensors.files[prefix + prefixes[prefix][0]]
        must = "be there, in a layer of experts"
        raise mistake(path, prefix + family.released("gate.weight"), must, found)
    return NamedLayer(tensors, family, prefix, prefixes[prefix])


def _has_gate(family: Family, names: list[str]) -> bool:
    return any(family.meaning(name) == ("gate.weight", "weight") for name in names)


def known_tensors(
    layer: NamedLayer, config: MoEConfig, layer_idx: int, wanted: Iterable[str]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str]]:
    """The `"weight"` of each of `Family.spellings`, with its `"scale"`, if it has one.

    The second answer says why the layer does not compute with a tensor.

    **Raises:** `ValueError` naming file and tensor, unless the layer has every tensor of the
    arrays `wanted`, in one spelling, and no other.
    """
    tensors, family, prefix, names = layer
    meanings = {name: family.meaning(name) for name in names if name not in family.ignored}
    ignored = {prefix + name: why for name, why in family.ignored.items() if name in names}
    if not _has_gate(family, list(meanings)):
        gate = prefix + family.released("gate.weight")
        found = ", ".join(sorted(names)[:4]) or "nothing"
        raise tensors.mistake(gate, "be there, in a layer of experts", found)
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
    for number in range(config.num_experts, config.num_experts + config.num_identity_experts):
        for part in ("gate", "up", "down"):
            known.pop(f"experts.{number}.{part}", None)  # transformers writes them, for nobody
    _check_presence(layer, known, config, wanted)
    return known, ignored


_FIELDS = {
    "experts": "num_experts",
    "shared": "num_shared_experts",
    "shared_gate": "use_shared_gate",
    "latent": "latent_size",
    "gate": "use_gate_bias",
}


def _check_presence(
    layer: NamedLayer,
    known: dict[str, dict[str, StoredTensor]],
    config: MoEConfig,
    arrays: Iterable[str],
) -> None:
    gate, family = known["gate.weight"]["weight"], layer.family
    num_experts = config.num_experts + config.num_identity_experts
    check_shape(gate, (num_experts, config.hidden_size))
    is_stacked = not STACKED_EXPERTS.keys().isdisjoint(known)
    is_stacked |= not family.parts("experts.down")
    wanted = {part for name in arrays for part in _tensors_of(family, name, config, is_stacked)}
    for key in sorted(known.keys() ^ wanted):
        field = _FIELDS.get(key.split(".")[0], "num_hash_layers")
        why = f"as the configuration has {field}={getattr(config, field)}"
        if key in known:
            beside = is_stacked and key not in STACKED_EXPERTS and field == "num_experts"
            raise known[key]["weight"].mistake(
                f"not be there, {'beside stacked experts' if beside else why}", "it"
            )
        missing = gate._replace(name=layer.prefix + family.released(key))
        must = f"be there, in one of its spellings, {why}"
        raise missing.mistake(must, f"{len(known)} other tensors")


def _tensors_of(family: Family, name: str, config: MoEConfig, is_stacked: bool) -> list[str]:
    """The tensors that an array of the block is made of."""
    parts = family.parts(name)
    if name in STACKED_EXPERTS and not is_stacked:
        return [part.replace("{}", str(i)) for i in range(config.num_experts) for part in parts]
    return [name] if family.has(name) else list(parts)


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

"""Which tensors make up one layer, in any spelling of its family."""

from collections.abc import Iterable
from typing import NamedTuple

from .._families import Family
from .errors import mistake
from .index import StoredTensors
from .stored_matrix import MatrixNames


class LayerNames(NamedTuple):
    """The tensors of one layer by the library's names (`Family.spellings`).

    `prefix` stands before each of them. `ignored` says why the layer does not compute with a
    tensor.
    """

    family: Family
    prefix: str
    tensors: dict[str, MatrixNames]
    ignored: dict[str, str]


def names_by_layer(names: Iterable[str], family: Family) -> dict[int, dict[str, list[str]]]:
    """Names of feed-forward tensors, by layer and by the prefix that is taken off them."""
    layers: dict[int, dict[str, list[str]]] = {}
    for name in names:
        place = family.place(name)
        if place is not None and place.layers == family.layers:
            prefixes = layers.setdefault(place.layer_idx, {})
            prefixes.setdefault(place.prefix, []).append(place.rest)
    return layers


def find_layer(
    tensors: StoredTensors,
    layers: dict[int, dict[str, list[str]]],
    layer_idx: int,
    family: Family,
) -> LayerNames:
    """The names that make up layer `layer_idx`, of those in `layers`.

    **Raises:** as `layer_names`, and for a layer that is not there or has two prefixes.
    """
    what = f"{family.layers}.{layer_idx}"
    if layer_idx not in layers:
        found = f"the layers {min(layers)} to {max(layers)}" if layers else "no layer at all"
        must = f"be in the checkpoint, with an {' or '.join(family.blocks)}"
        raise mistake(tensors.source, what, must, found)
    prefixes = layers[layer_idx]
    prefix, rests = next(iter(prefixes.items()))
    if len(prefixes) > 1:
        found = " and ".join(sorted(prefixes))
        raise mistake(tensors.where(prefix + rests[0]), what, "have one prefix", found)
    return layer_names(tensors, prefix, rests, family)


def layer_names(
    tensors: StoredTensors, prefix: str, rests: list[str], family: Family
) -> LayerNames:
    """What the tensors of a layer mean, whose names are `prefix` and each of `rests`.

    **Raises:** `ValueError` naming file and tensor, for a layer without a router, two spellings of
    one tensor, a scale of nothing, and a tensor of unknown meaning.
    """
    known: dict[str, dict[str, str]] = {}
    ignored, unknown = {}, []
    for rest in rests:
        name, meaning = prefix + rest, family.meaning(rest)
        if rest in family.ignored:
            ignored[name] = family.ignored[rest]
        elif meaning is None:
            unknown.append(name)
        else:
            key, kind = meaning
            other = known.setdefault(key, {}).setdefault(kind, name)
            if other != name:
                must = f"be the only one of its kind, next to {other}"
                raise mistake(tensors.where(name), name, must, "both")
    if "gate.weight" not in known:
        name = prefix + family.released("gate.weight")
        found = f"a dense layer: {', '.join(sorted(rests)[:4])}" if rests else "nothing"
        path = tensors.where(prefix + rests[0] if rests else name)
        raise mistake(path, name, "be there, in a layer of experts", found)
    for name in unknown:
        raise mistake(tensors.where(name), name, "have a known meaning", "a name in no table")
    for kinds in known.values():
        if "weight" not in kinds:
            name, must = kinds["scale"], "scale a weight that is there"
            raise mistake(tensors.where(name), name, must, "no such weight")
    names = {key: MatrixNames(kinds["weight"], kinds.get("scale")) for key, kinds in known.items()}
    return LayerNames(family, prefix, names, ignored)

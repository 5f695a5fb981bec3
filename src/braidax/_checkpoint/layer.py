"""The tensors of one layer, checked against the configuration; their data are not yet read."""

import warnings

import numpy as np

from .. import hash_tables
from .._config import MoEConfig
from .dtypes import narrowed
from .errors import mistake
from .index import StoredTensors
from .leaves import MATRICES
from .names import LayerNames
from .stored_matrix import FLOATS, StoredMatrix, stored_matrix

# For each expert the matrices whose rows, one after the other, are its own.
Stack = tuple[tuple[StoredMatrix, ...], ...]


def check_layer(
    tensors: StoredTensors, names: LayerNames, config: MoEConfig, layer_idx: int
) -> None:
    """The layer has every tensor that the configuration asks for, and no other.

    A tensor that the layer does not compute with is taken out of `names`, with a warning.

    **Raises:** `ValueError` naming file and tensor.
    """
    known, ignored = names.tensors, dict(names.ignored)
    router = "table" if config.is_hash_layer(layer_idx) else "selection_bias"
    if router == "table" and {"table", "selection_bias"} <= known.keys():
        ignored[known.pop("selection_bias").weight] = "the hash table selects alone"
    for name, why in ignored.items():
        warnings.warn(f"`{name}` is ignored: {why}.", stacklevel=4)
    check_shape(tensors, known["gate.weight"].weight, (config.num_experts, config.hidden_size))
    wanted = {"gate.weight", router}
    is_stacked = not known.keys().isdisjoint({"experts.gate_up", "experts.down"})
    if is_stacked:
        wanted |= {"experts.gate_up", "experts.down"}
    else:
        experts = range(config.num_experts)
        wanted |= {f"experts.{i}.{matrix}" for i in experts for matrix in ("gate", "up", "down")}
    if config.num_shared_experts:
        wanted |= {"shared.gate", "shared.up", "shared.down"}
    fields = {"experts": "num_experts", "shared": "num_shared_experts"}
    for key in sorted(known.keys() ^ wanted):
        field = fields.get(key.split(".")[0], "num_hash_layers")
        why = f"as the configuration has {field}={getattr(config, field)}"
        if key in known:
            name = known[key].weight
            why = "beside stacked experts" if is_stacked and field == "num_experts" else why
            raise mistake(tensors.where(name), name, f"not be there, {why}", "it")
        path = tensors.where(known["gate.weight"].weight)
        must = f"be there, in one of its spellings, {why}"
        name = names.prefix + names.family.released(key)
        raise mistake(path, name, must, f"{len(known)} other tensors")


def find_stack(
    tensors: StoredTensors, names: LayerNames, name: str, shape: tuple[int, ...]
) -> Stack:
    """The stored matrices of a block's array, which is called `name` and has `shape`.

    **Raises:** `ValueError` naming file and tensor: see `stored_matrix`."""
    owner, kind = name.split(".")
    *_, rows, columns = shape
    size = (rows, columns) if kind == "gate_up" else (columns, rows)
    if owner == "experts" and name in names.tensors:
        size = (shape[0], len(MATRICES[kind]) * size[0], size[1])
        matrix = stored_matrix(tensors, names.tensors[name], size)
        return tuple((matrix.of_stack(index),) for index in range(shape[0]))
    owners = ["shared"] if owner == "shared" else [f"experts.{i}" for i in range(shape[0])]
    return tuple(
        tuple(
            stored_matrix(tensors, names.tensors[f"{owner}.{matrix}"], size)
            for matrix in MATRICES[kind]
        )
        for owner in owners
    )


def read_floats(
    tensors: StoredTensors, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """A tensor of the router in `dtype`.

    **Raises:** `ValueError` naming file and tensor, for another shape, integers and overflow."""
    check_shape(tensors, name, shape)
    stored = tensors.entry(name).dtype
    if stored not in FLOATS:
        raise mistake(tensors.where(name), name, f"have a dtype among {', '.join(FLOATS)}", stored)
    array = tensors.read(name)
    result = narrowed(array, dtype)
    if result is None:
        raise mistake(tensors.where(name), name, f"fit {dtype}", np.abs(array).max())
    return result


def read_table(tensors: StoredTensors, name: str, num_experts: int) -> np.ndarray:
    """A hash table, int32 (vocab, experts_per_token).

    **Raises:** `ValueError` naming file and tensor, for an expert out of range."""
    try:
        return hash_tables.from_array(tensors.read(name), num_experts)
    except (TypeError, ValueError) as error:
        must = f"be integers in [0, {num_experts})"
        raise mistake(tensors.where(name), name, must, error) from error


def check_shape(tensors: StoredTensors, name: str, shape: tuple[int | None, ...]) -> None:
    """Raise `ValueError`, naming file and tensor, unless a tensor has `shape`."""
    found = tensors.entry(name).shape
    if found != shape:
        must = f"have the configuration's shape {shape}"
        raise mistake(tensors.where(name), name, must, found)

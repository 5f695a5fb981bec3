"""One layer of a checkpoint, checked against the configuration. Its data are still in the files."""

import warnings
from typing import NamedTuple

import numpy as np

from .. import hash_tables
from .._config import MoEConfig
from .dtypes import narrowed
from .errors import mistake
from .index import AbstractTensors
from .names import LayerNames
from .stored_matrix import FLOATS, StoredMatrix, stored_matrix

# For each expert the matrices whose rows, one after the other, are its own.
Stack = tuple[tuple[StoredMatrix, ...], ...]


class StoredLayer(NamedTuple):
    """A layer whose names and shapes fit the configuration.

    `stacks` holds the feed-forward weights: `experts.gate_up`, `experts.down`, and with a shared
    expert `shared.gate_up` and `shared.down`, each a stack of one.
    """

    tensors: AbstractTensors
    names: LayerNames
    stacks: dict[str, Stack]
    num_experts: int

    def floats(self, key: str, dtype: np.dtype) -> np.ndarray:
        """A tensor of the router in `dtype`; the selection bias must be finite.

        **Raises:** `ValueError` naming file and tensor, for numbers that are not such."""
        name = self.names.tensors[key].weight
        path, stored = self.tensors.where(name), self.tensors.entry(name).dtype
        if stored not in FLOATS:
            raise mistake(path, name, f"have a dtype among {', '.join(FLOATS)}", stored)
        array = self.tensors.read(name)
        result = narrowed(array, dtype)
        if result is None:
            raise mistake(path, name, f"fit {dtype}", np.abs(array).max())
        if key == "selection_bias" and not np.isfinite(result).all():
            raise mistake(path, name, "be finite", "NaN or infinity")
        return result

    def table(self) -> np.ndarray:
        """The hash table: see `read_table`."""
        return read_table(self.tensors, self.names.tensors["table"].weight, self.num_experts)


def open_layer(
    tensors: AbstractTensors, names: LayerNames, config: MoEConfig, layer_idx: int
) -> StoredLayer:
    """The layer called `names`, all of whose shapes must be those of `config`.

    A tensor that the layer does not compute with is left out with a warning.

    **Raises:** `ValueError` naming file, tensor, what was expected and found.
    """
    router = "table" if config.is_hash_layer(layer_idx) else "selection_bias"
    ignored, known = dict(names.ignored), names.tensors
    if router == "table" and {"table", "selection_bias"} <= known.keys():
        ignored[known.pop("selection_bias").weight] = "the hash table selects alone"
    for name, why in ignored.items():
        warnings.warn(f"`{name}` is ignored: {why}.", stacklevel=3)
    experts, hidden, intermediate = config.num_experts, config.hidden_size, config.intermediate_size
    _check_shape(tensors, known["gate.weight"].weight, (experts, hidden))
    _check_names(tensors, names, config, router)
    columns = (config.vocab_size, config.num_experts_per_token)
    shape = columns if router == "table" else (experts,)
    _check_shape(tensors, known[router].weight, shape)

    def matrices(owner: str, intermediate: int) -> tuple[tuple[StoredMatrix, ...], ...]:
        gate, up, down = (
            stored_matrix(tensors, known[f"{owner}.{matrix}"], shape)
            for matrix, shape in (
                ("gate", (intermediate, hidden)),
                ("up", (intermediate, hidden)),
                ("down", (hidden, intermediate)),
            )
        )
        return (gate, up), (down,)

    if "experts.down" in known:
        shape = (experts, 2 * intermediate, hidden)
        gate_up = stored_matrix(tensors, known["experts.gate_up"], shape)
        down = stored_matrix(tensors, known["experts.down"], (experts, hidden, intermediate))
        pairs = [((gate_up.of_stack(index),), (down.of_stack(index),)) for index in range(experts)]
    else:
        pairs = [matrices(f"experts.{index}", intermediate) for index in range(experts)]
    gate_up, down = zip(*pairs, strict=True)
    stacks = {"experts.gate_up": gate_up, "experts.down": down}
    if config.num_shared_experts:
        gate_up, down = matrices("shared", config.num_shared_experts * intermediate)
        stacks |= {"shared.gate_up": (gate_up,), "shared.down": (down,)}
    return StoredLayer(tensors, names, stacks, experts)


def read_table(tensors: AbstractTensors, name: str, num_experts: int) -> np.ndarray:
    """A hash table, int32 (vocab, experts_per_token).

    **Raises:** `ValueError` naming file and tensor, for an expert out of range."""
    try:
        return hash_tables.from_array(tensors.read(name), num_experts)
    except (TypeError, ValueError) as error:
        must = f"be integers in [0, {num_experts})"
        raise mistake(tensors.where(name), name, must, error) from error


def _check_names(
    tensors: AbstractTensors, names: LayerNames, config: MoEConfig, router: str
) -> None:
    """The layer has every tensor that the configuration asks for, and no other."""
    found = set(names.tensors)
    wanted = {"gate.weight", router}
    if stacked := {"experts.gate_up", "experts.down"} & found:
        wanted |= {"experts.gate_up", "experts.down"}
    else:
        experts = range(config.num_experts)
        wanted |= {f"experts.{i}.{matrix}" for i in experts for matrix in ("gate", "up", "down")}
    if config.num_shared_experts:
        wanted |= {"shared.gate", "shared.up", "shared.down"}
    fields = {"experts": "num_experts", "shared": "num_shared_experts"}
    for key in sorted(found ^ wanted):
        field = fields.get(key.split(".")[0], "num_hash_layers")
        why = f"as the configuration has {field}={getattr(config, field)}"
        if key in found:
            name = names.tensors[key].weight
            why = "beside stacked experts" if stacked and field == "num_experts" else why
            raise mistake(tensors.where(name), name, f"not be there, {why}", "it")
        name = names.prefix + names.family.released(key)
        path = tensors.where(names.tensors["gate.weight"].weight)
        must = f"be there, in one of its spellings, {why}"
        raise mistake(path, name, must, f"{len(found)} other tensors")


def _check_shape(tensors: AbstractTensors, name: str, shape: tuple[int | None, ...]) -> None:
    found = tensors.entry(name).shape
    if found != shape:
        must = f"have the configuration's shape {shape}"
        raise mistake(tensors.where(name), name, must, found)

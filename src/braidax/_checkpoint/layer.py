"""One layer of a checkpoint: its tensors found, and their shapes checked against each other."""

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import numpy as np

from .. import hash_tables
from .dtypes import narrowed
from .errors import mistake
from .index import Checkpoint
from .names import FUSED, SEPARATE, LayerNames, MatrixNames, find_layer
from .stored_matrix import FLOATS, StoredMatrix, stored_matrix


class ExpertMatrices(NamedTuple):
    """Where one expert lies: `gate_up` is one matrix or two to be stacked, gate first. `index` is
    its place in them, None where they hold no other expert."""

    gate_up: tuple[StoredMatrix, ...]
    down: StoredMatrix
    index: int | None


class StoredLayer(NamedTuple):
    """A layer whose shapes have been checked; its data are still in the files."""

    checkpoint: Checkpoint
    names: LayerNames
    experts: tuple[ExpertMatrices, ...]
    shared: ExpertMatrices
    hidden_size: int
    intermediate_size: int
    num_experts: int

    def gate_weight(self, dtype: np.dtype) -> np.ndarray:
        """The router's weight, (experts, hidden). **Raises:** `ValueError` if it does not fit."""
        weight = self._floats("weight")
        result = narrowed(weight, dtype)
        if result is None:
            name = self.names.gate["weight"]
            raise mistake(self.checkpoint.where(name), name, f"fit {dtype}", np.abs(weight).max())
        return result

    def bias(self) -> np.ndarray:
        """The router's selection bias, float32 (experts,). **Raises:** `ValueError` for NaN."""
        bias = self._floats("bias").astype(np.float32)
        if not np.isfinite(bias).all():
            name = self.names.gate["bias"]
            raise mistake(self.checkpoint.where(name), name, "be finite", "NaN or infinity")
        return bias

    def table(self) -> np.ndarray:
        """The hash table, int32 (vocab, experts_per_token).

        **Raises:** `ValueError` for an expert out of range."""
        return read_table(self.checkpoint, self.names.gate["table"], self.num_experts)

    def _floats(self, kind: str) -> np.ndarray:
        name = self.names.gate[kind]
        dtype = self.checkpoint.entry(name).dtype
        if dtype not in FLOATS:
            must = f"have a dtype among {', '.join(FLOATS)}"
            raise mistake(self.checkpoint.where(name), name, must, dtype)
        return self.checkpoint.read(name)


def open_layer(checkpoint: Checkpoint, layer_idx: int) -> StoredLayer:
    """Find layer `layer_idx` and check that its tensors make up a whole.

    **Raises:** `ValueError` naming file, tensor, what was expected and found.
    """
    names = find_layer(checkpoint, layer_idx)
    gate = names.gate["weight"]
    num_experts, hidden = check_tensor(checkpoint, gate, (None, None))
    if "bias" in names.gate:
        check_tensor(checkpoint, names.gate["bias"], (num_experts,))
    experts, intermediate = _experts(checkpoint, names, num_experts, hidden)
    missing = [matrix for matrix in SEPARATE if matrix not in names.shared]
    if missing:
        _raise_missing(names, checkpoint, f"{names.prefix}shared_experts", missing[0], names.shared)
    shared, _ = _one_expert(checkpoint, names.shared, hidden)
    return StoredLayer(checkpoint, names, experts, shared, hidden, intermediate, num_experts)


def read_table(checkpoint: Checkpoint, name: str, num_experts: int) -> np.ndarray:
    """A hash table, int32 (vocab, experts_per_token). **Raises:** `ValueError` for an expert out
    of range, naming file and tensor."""
    try:
        return hash_tables.from_array(checkpoint.read(name), num_experts)
    except (TypeError, ValueError) as error:
        must = f"be integers in [0, {num_experts})"
        raise mistake(checkpoint.where(name), name, must, error) from error


def check_tensor(
    checkpoint: Checkpoint, name: str, shape: tuple[int | None, ...]
) -> tuple[int, ...]:
    """The shape of a tensor, which must match `shape` (None: any size)."""
    path, entry = checkpoint.where(name), checkpoint.entry(name)
    fits = len(shape) == len(entry.shape)
    if not fits or any(want not in (None, n) for want, n in zip(shape, entry.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise mistake(path, name, f"have shape ({wanted})", entry.shape)
    return entry.shape


def _experts(
    checkpoint: Checkpoint, names: LayerNames, num_experts: int, hidden: int
) -> tuple[tuple[ExpertMatrices, ...], int]:
    stacked = any(expert is None for expert, _ in names.experts)
    ids, matrices = ((None,), FUSED) if stacked else (range(num_experts), SEPARATE)
    wanted = {(expert, matrix) for expert in ids for matrix in matrices}
    for expert, matrix in sorted(wanted - names.experts.keys(), key=str):
        stem = f"{names.prefix}experts" + ("" if expert is None else f".{expert}")
        _raise_missing(names, checkpoint, stem, matrix, names.experts)
    for key in sorted(names.experts.keys() - wanted, key=str):
        name = names.experts[key].weight
        must = f"belong to one of {num_experts} experts, the rows of {names.gate['weight']}"
        raise mistake(checkpoint.where(name), name, must, f"expert {key[0]}")
    if stacked:
        return _stacked_experts(checkpoint, names, num_experts, hidden)
    experts, intermediate = [], None
    for expert in range(num_experts):
        own = {matrix: names.experts[expert, matrix] for matrix in SEPARATE}
        found, intermediate = _one_expert(checkpoint, own, hidden, intermediate)
        experts.append(found)
    if intermediate is None:
        name = names.gate["weight"]
        raise mistake(checkpoint.where(name), name, "have a row for each expert", "no row")
    return tuple(experts), intermediate


def _stacked_experts(
    checkpoint: Checkpoint, names: LayerNames, num_experts: int, hidden: int
) -> tuple[tuple[ExpertMatrices, ...], int]:
    down_names, gate_up_names = names.experts[None, "down"], names.experts[None, "gate_up"]
    down = stored_matrix(checkpoint, down_names, (num_experts, hidden, None))
    intermediate = down.shape[-1]
    shape = (num_experts, 2 * intermediate, hidden)
    gate_up = stored_matrix(checkpoint, gate_up_names, shape)
    experts = tuple(ExpertMatrices((gate_up,), down, index) for index in range(num_experts))
    return experts, intermediate


def _one_expert(
    checkpoint: Checkpoint,
    names: dict[str, MatrixNames],
    hidden: int,
    intermediate: int | None = None,
) -> tuple[ExpertMatrices, int]:
    down = stored_matrix(checkpoint, names["down"], (hidden, intermediate))
    gate, up = (
        stored_matrix(checkpoint, names[matrix], (down.shape[1], hidden))
        for matrix in ("gate", "up")
    )
    return ExpertMatrices((gate, up), down, None), down.shape[1]


def _raise_missing(
    names: LayerNames, checkpoint: Checkpoint, stem: str, matrix: str, present: Mapping
) -> NoReturn:
    must = f"have the matrix {matrix!r}, in one of its spellings"
    found = f"{len(present)} other matrices" if present else "no matrix"
    raise mistake(checkpoint.where(names.gate["weight"]), stem, must, found)

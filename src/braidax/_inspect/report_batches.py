"""Reading what `report` is given: batches of layers, their token ids, the routers behind them."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from .._router import AbstractRouter
from .._routing import Routing
from .report_counts import LayerCounts
from .summary_count import layer_axes, router_kind

_MISSING: Any = object()
# The layers of a scan cannot be told from the examples of a vmap, so they are not guessed.
STACKED = " Layers stacked in one Routing are told apart by `model`."


class _Layer(NamedTuple):
    """One layer's tokens of one batch, without the masked ones."""

    indices: Int[np.ndarray, "tokens experts_per_token"]
    weights: Float[np.ndarray, "tokens experts_per_token"]
    scores: Float[np.ndarray, "tokens experts"]
    ids: Int[np.ndarray, " tokens"] | None
    dropped: int


def find_routers(model: PyTree) -> list[AbstractRouter] | None:
    """The routers of `model` in model order; None without a model."""
    if model is None:
        return None
    routers = [node for node in jax.tree.leaves(model, is_leaf=_is_router) if _is_router(node)]
    if not routers:
        raise ValueError(f"`model` must hold a router. Got a {type(model).__name__} without one.")
    return routers


def router_kinds(routers: list[AbstractRouter] | None) -> tuple[str, ...] | None:
    """`"hash"`, `"top-k"` or the name of another class, for each layer; None without routers."""
    if routers is None:
        return None
    kinds = ([router_kind(router)] * math.prod(layer_axes(router)) for router in routers)
    return tuple(itertools.chain.from_iterable(kinds))


def count_all(
    routings: Routing | Iterable[Any], input_ids: Any, routers: list[AbstractRouter] | None
) -> list[LayerCounts]:
    """The counts of every layer, over all batches."""
    counts: list[LayerCounts] = []
    for batch, ids in _with_ids(routings, input_ids):
        layers = _layers_of_batch(batch, ids, routers)
        sizes = [layer.scores.shape[-1] for layer in layers]
        if not counts:
            counts = [LayerCounts(size) for size in sizes]
            if len(set(sizes)) != 1:
                raise ValueError(
                    "`routings` must hold at least one Routing, all of the same number of experts."
                    f" Got {sizes}."
                )
        if sizes != [count.num_experts for count in counts]:
            raise ValueError(
                "`routings` must have the same layers in every batch. "
                f"Got {len(sizes)} of {sizes} experts after {len(counts)} of "
                f"{counts[0].num_experts}."
            )
        for count, layer in zip(counts, layers, strict=True):
            count.add(*layer)
    return counts


def _is_router(node: Any) -> bool:
    return isinstance(node, AbstractRouter)


def _batches(routings: Routing | Iterable[Any]) -> tuple[bool, Iterator[list[Routing]]]:
    """Whether a single batch was given, and the batches."""
    if isinstance(routings, Routing):
        return True, iter([[routings]])
    if not isinstance(routings, Iterable):
        raise TypeError(
            "`routings` must be a Routing, one for each layer, or an iterable of batches of them. "
            f"Got a {type(routings).__name__}."
        )
    iterator = iter(routings)
    first = next(iterator, _MISSING)
    if first is _MISSING:
        raise ValueError("`routings` must hold at least one Routing. Got none.")
    if isinstance(first, Routing):
        return True, iter([_checked([first, *iterator])])
    return False, (_checked(batch) for batch in itertools.chain([first], iterator))


def _checked(batch: Any) -> list[Routing]:
    items = list(batch) if isinstance(batch, list | tuple) else [batch]
    for item in items:
        if not isinstance(item, Routing):
            raise TypeError(
                "`routings` must hold one Routing per layer, or sequences of them, one per batch. "
                f"Got a {type(item).__name__}."
            )
    if not items:
        raise ValueError("`routings` must hold at least one Routing a batch. Got none.")
    return items


def _with_ids(
    routings: Routing | Iterable[Any], input_ids: Any
) -> Iterator[tuple[list[Routing], Any]]:
    """Each batch with its ids, None without."""
    single, batches = _batches(routings)
    if input_ids is None:
        yield from ((batch, None) for batch in batches)
        return
    if isinstance(input_ids, Iterator):
        # It may be the one that makes the routings, and each would get every second batch.
        raise TypeError(
            "`input_ids` must be an array, or a list or loader of arrays, not an iterator. "
            f"Got a {type(input_ids).__name__}."
        )
    each = [input_ids] if single else input_ids
    for batch, ids in itertools.zip_longest(batches, each, fillvalue=_MISSING):
        if batch is _MISSING or ids is _MISSING:
            few = "fewer" if ids is _MISSING else "more"
            raise ValueError(f"`input_ids` must hold one array per batch. Got {few}.")
        yield batch, ids


def _layers_of_batch(
    batch: list[Routing], ids: Any, routers: list[AbstractRouter] | None
) -> list[_Layer]:
    if routers is None:
        axes: list[tuple[int, ...]] = [()] * len(batch)
    elif len(routers) != len(batch):
        raise ValueError(
            "`routings` must hold one Routing per router of `model`. "
            f"Got {len(batch)} for {len(routers)} routers."
        )
    else:
        axes = [layer_axes(router) for router in routers]
    layers: list[_Layer] = []
    for position, routing in enumerate(batch):
        wanted = None if routers is None else routers[position].gate.weight.shape[-2]
        if wanted not in (None, routing.scores.shape[-1]):
            raise ValueError(
                f"`routings[{position}]` must come from a router of {wanted} experts. "
                f"Got {routing.scores.shape[-1]} experts."
            )
        layers += _unstacked(routing, axes[position], ids, f"routings[{position}]")
    return layers


def _unstacked(routing: Routing, axes: tuple[int, ...], ids: Any, name: str) -> list[_Layer]:
    """The layers of one Routing, `axes` in front, on the host."""
    try:
        indices = np.asarray(routing.indices).astype(np.int64)  # narrow ones would overflow
        weights = np.asarray(routing.weights)
        scores, dropped = np.asarray(routing.scores), np.asarray(routing.dropped)
        mask = np.asarray(True if routing.mask is None else routing.mask)
    except jax.errors.TracerArrayConversionError:
        raise TypeError(
            f"`{name}` must hold concrete arrays, because they are counted on the host. Got traced "
            "ones: return the Routing from the compiled function and report on it outside."
        ) from None
    batch_shape, front = indices.shape[:-1], len(axes)
    if batch_shape[:front] != axes or dropped.shape[:front] != axes:
        raise ValueError(
            f"`{name}` must start with the layer axes {axes} of its router. Got `indices` of shape "
            f"{indices.shape} and `dropped` of shape {dropped.shape}."
        )
    num_experts = scores.shape[-1]
    flat_ids = None
    if ids is not None:
        flat_ids = _flat_ids(ids, batch_shape[front:], name)
    num_layers = math.prod(axes)
    keep = np.broadcast_to(mask, batch_shape).reshape(num_layers, -1)
    rows = [array.reshape(num_layers, -1, array.shape[-1]) for array in (indices, weights, scores)]
    dropped = dropped.reshape(num_layers, -1).sum(axis=1, dtype=np.int64)
    layers = []
    for layer in range(num_layers):
        tokens = [array[layer][keep[layer]] for array in rows]
        if tokens[0].size and not 0 <= tokens[0].min() <= tokens[0].max() < num_experts:
            raise ValueError(
                f"`{name}.indices` must be in [0, experts={num_experts}). "
                f"Got {tokens[0].min()} to {tokens[0].max()}."
            )
        kept_ids = None if flat_ids is None else flat_ids[keep[layer]]
        layers.append(_Layer(*tokens, kept_ids, int(dropped[layer])))
    return layers


def _flat_ids(ids: Any, batch_shape: tuple[int, ...], name: str) -> Int[np.ndarray, " tokens"]:
    ids = np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"`input_ids` must have an integer dtype. Got {ids.dtype}.")
    if ids.shape != batch_shape:
        hint = STACKED if batch_shape[-ids.ndim :] == ids.shape else ""
        raise ValueError(
            f"`input_ids` must have the batch axes of `{name}`, {batch_shape}. "
            f"Got {ids.shape}.{hint}"
        )
    if ids.size and int(ids.max()) >= 2**63:
        raise ValueError(f"`input_ids` must be below 2**63. Got {ids.max()}.")
    return ids.reshape(-1).astype(np.int64)

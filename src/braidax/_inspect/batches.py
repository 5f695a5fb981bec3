"""What `report` is given: batches of layers, and the token ids of each batch."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from .._router import AbstractRouter
from .._routing import Routing
from .assignments import Assignments, on_host, read_layers
from .routers import router_shape

_MISSING: Any = object()


def read_batches(
    routings: Routing | Iterable[Any], input_ids: Any, routers: list[AbstractRouter] | None
) -> Iterator[list[tuple[Assignments, Any]]]:
    """The layers of each batch, each with the ids of its tokens or with None."""
    wanted: list[int] = []
    for batch, ids in _with_ids(routings, input_ids):
        layers = _layers(batch, ids, routers)
        sizes = [layer.num_experts for layer, _ in layers]
        wanted = wanted or sizes
        if len(set(wanted)) != 1:
            raise ValueError(f"`routings` must all have the same number of experts. Got {sizes}.")
        if sizes != wanted:
            raise ValueError(
                "`routings` must have the same layers in every batch. "
                f"Got {len(sizes)} of {sizes} experts after {len(wanted)} of {wanted[0]}."
            )
        yield layers


def _with_ids(routings: Any, input_ids: Any) -> Iterator[tuple[list[Any], Any]]:
    """Each batch as a list of its routings, with its ids or with None."""
    if not isinstance(routings, Routing | Iterable):
        raise TypeError(
            "`routings` must be a Routing, one for each layer, or an iterable of batches of them. "
            f"Got a {type(routings).__name__}."
        )
    if isinstance(input_ids, Iterator):
        # It may be the iterator that makes the routings: each would get every second batch.
        raise TypeError(
            "`input_ids` must be an array, or a list or loader of arrays, not an iterator. "
            f"Got a {type(input_ids).__name__}."
        )
    batches = iter([routings] if isinstance(routings, Routing) else routings)
    first = next(batches, None)
    if first is None or isinstance(first, Routing):  # a single batch
        first, batches = [first, *batches] if first is not None else [], iter(())
        input_ids = None if input_ids is None else [input_ids]
    batches = itertools.chain([first], batches)
    if input_ids is None:
        pairs: Iterable[Any] = zip(batches, itertools.repeat(None), strict=False)
    else:
        pairs = itertools.zip_longest(batches, input_ids, fillvalue=_MISSING)
    for batch, ids in pairs:
        if batch is _MISSING or ids is _MISSING:
            found = "fewer" if ids is _MISSING else "more"
            raise ValueError(f"`input_ids` must hold one array per batch. Got {found}.")
        yield list(batch) if isinstance(batch, list | tuple) else [batch], ids


def _layers(
    batch: list[Any], ids: Any, routers: list[AbstractRouter] | None
) -> list[tuple[Assignments, Any]]:
    if not batch:
        raise ValueError("`routings` must hold at least one Routing, in every batch. Got none.")
    for routing in batch:
        if not isinstance(routing, Routing):
            raise TypeError(
                "`routings` must hold one Routing per layer, or sequences of them, one per batch. "
                f"Got a {type(routing).__name__}."
            )
    if routers is not None and len(routers) != len(batch):
        raise ValueError(
            "`routings` must hold one Routing per router of `model`. "
            f"Got {len(batch)} for {len(routers)} routers."
        )
    layers = []
    for position, routing in enumerate(batch):
        name, given = f"routings[{position}]", routing.scores.shape[-1]
        # Without a model, nobody knows what stacked calls are, so each of them is a layer.
        axes, num_experts = routing.dropped.shape, given
        if routers is not None:
            axes, num_experts = router_shape(routers[position])
        if given != num_experts:
            raise ValueError(
                f"`{name}` must come from a router of {num_experts} experts. Got {given} experts."
            )
        found = read_layers(name, routing, axes)
        shape = routing.indices.shape[len(axes) : -1]
        hint = " Without `model`, each call stacked in a Routing is a layer." if axes else ""
        flat_ids = _flat_ids(ids, shape, name, "" if routers else hint)
        layers += [(layer, flat_ids) for layer in found]
    return layers


def _flat_ids(
    ids: Any, shape: tuple[int, ...], name: str, hint: str
) -> Int64[np.ndarray, " _"] | None:
    if ids is None:
        return None
    ids = np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else on_host("input_ids", ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"`input_ids` must have an integer dtype. Got {ids.dtype}.")
    if ids.shape != shape:
        raise ValueError(
            f"`input_ids` must have the batch axes of `{name}`, {shape}. Got {ids.shape}.{hint}"
        )
    if ids.size and int(ids.max()) >= 2**63:
        raise ValueError(f"`input_ids` must be below 2**63. Got {ids.max()}.")
    return ids.reshape(-1).astype(np.int64)

"""What `report` is given: batches of layers, and the token ids of each batch."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from .._checks import check
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
        wanted = wanted or sizes[:1] * len(sizes)
        must = "hold the same layers in every batch, all with the same number of experts"
        check(sizes == wanted, "routings", must, f"{sizes} experts instead of {wanted}")
        yield layers


def _with_ids(routings: Any, input_ids: Any) -> Iterator[tuple[list[Any], Any]]:
    """Each batch as a list of its routings, with its ids or with None."""
    if isinstance(input_ids, Iterator):
        # It may be the iterator that makes the routings: each would get every second batch.
        raise TypeError(
            "`input_ids` must be an array, or a list or loader of arrays, not an iterator. "
            f"Got a {type(input_ids).__name__}."
        )
    one = isinstance(routings, Routing) or not isinstance(routings, Iterable)
    batches = iter([routings] if one else routings)
    first = next(batches, [])
    if isinstance(first, Routing):  # a single batch
        first, batches = [first, *batches], iter(())
        input_ids = None if input_ids is None else [input_ids]
    batches = itertools.chain([first], batches)
    pairs: Iterable[Any] = ((batch, None) for batch in batches)
    if input_ids is not None:
        pairs = itertools.zip_longest(batches, input_ids, fillvalue=_MISSING)
    for batch, ids in pairs:
        check(ids is not _MISSING, "input_ids", "hold one array per batch", "fewer")
        check(batch is not _MISSING, "input_ids", "hold one array per batch", "more")
        yield list(batch) if isinstance(batch, list | tuple) else [batch], ids


def _layers(
    batch: list[Any], ids: Any, routers: list[AbstractRouter] | None
) -> list[tuple[Assignments, Any]]:
    check(batch, "routings", "hold at least one Routing, in every batch", "none")
    if routers is not None:
        given = f"{len(batch)} for {len(routers)} routers"
        fits = len(routers) == len(batch)
        check(fits, "routings", "hold one Routing per router of `model`", given)
    layers = []
    for position, routing in enumerate(batch):
        if not isinstance(routing, Routing):
            raise TypeError(
                "`routings` must hold one Routing per layer, or sequences of them, one per batch. "
                f"Got a {type(routing).__name__}."
            )
        name, given = f"routings[{position}]", routing.scores.shape[-1]
        # Without a model, nobody knows what stacked calls are, so each of them is a layer.
        axes, num_experts, hint = routing.stacked, given, ""
        if routers is not None:
            axes, num_experts = router_shape(routers[position])
        elif axes:
            hint = ": without `model`, each call stacked in a Routing is a layer"
        must = f"come from a router of {num_experts} experts"
        check(given == num_experts, name, must, f"{given} experts")
        found = read_layers(name, routing, axes)
        flat_ids = _flat_ids(ids, routing.indices.shape[len(axes) : -1], name, hint)
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
    must = f"have the batch axes of `{name}`, {shape}{hint}"
    check(ids.shape == shape, "input_ids", must, ids.shape)
    largest = int(ids.max(initial=0))
    check(largest < 2**63, "input_ids", "be below 2**63", largest)
    return ids.reshape(-1).astype(np.int64)

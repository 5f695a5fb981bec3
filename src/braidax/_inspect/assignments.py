"""The tokens and experts of a `Routing`, as NumPy arrays on the host."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int64

from .._checks import check
from .._routing import Routing


def on_host(name: str, array: Any) -> np.ndarray:
    """The array in NumPy. Raises `TypeError` for a traced array."""
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError:
        raise TypeError(
            f"`{name}` must be concrete, because it is read on the host. Got a traced array: "
            "return it from the compiled function and look at it outside."
        ) from None


class Assignments(NamedTuple):
    """The tokens of one layer in reading order: the batch axes are flattened into one.

    An index equal to `num_experts` is nobody.
    """

    indices: Int64[np.ndarray, "tokens experts_per_token"]
    weights: Float[np.ndarray, "tokens experts_per_token"]
    scores: Float[np.ndarray, "tokens experts"]
    mask: Bool[np.ndarray, " tokens"]
    dropped: int

    @property
    def num_experts(self) -> int:
        """The number of experts of the layer."""
        return self.scores.shape[-1]

    def unmasked(self) -> "Assignments":
        """The same without padding."""
        kept = (array[self.mask] for array in (self.indices, self.weights, self.scores, self.mask))
        return Assignments(*kept, self.dropped)


def read_layers(name: str, routing: Routing, axes: tuple[int, ...]) -> list[Assignments]:
    """The layers of one Routing, which is stacked over the layer axes `axes`, or one layer.

    Raises `ValueError` for other axes and for experts that do not exist, `TypeError` for traced
    arrays. Padding may hold any expert.
    """
    indices, weights, scores, dropped = (
        on_host(name, array)
        for array in (routing.indices, routing.weights, routing.scores, routing.dropped)
    )
    mask = True if routing.mask is None else on_host(name, routing.mask)
    batch_shape = indices.shape[:-1]
    # An axis of micro-batches could be taken for an axis of layers. Beside layers there is none.
    must = f"be stacked over the layers {axes} of its router and over nothing else"
    check(axes in ((), dropped.shape), name, must, dropped.shape)
    flat = (math.prod(axes), math.prod(batch_shape[len(axes) :]))
    mask = np.broadcast_to(mask, batch_shape).reshape(flat)
    # Indices may be int8, which is too narrow for what is computed with them.
    arrays = (indices.astype(np.int64), weights, scores)
    arrays = [array.reshape(*flat, array.shape[-1]) for array in arrays]
    dropped = dropped.reshape(flat[0], -1).sum(axis=1, dtype=np.int64).tolist()
    layers = [Assignments(*layer) for layer in zip(*arrays, mask, dropped, strict=True)]
    for layer in layers:
        low, high = (find(layer.indices[layer.mask], initial=0) for find in (np.min, np.max))
        must = f"be in [0, experts={layer.num_experts}], of which {layer.num_experts} is nobody"
        check(0 <= low <= high <= layer.num_experts, f"{name}.indices", must, f"{low} to {high}")
    return layers


def checked_names(names: Iterable[str] | None, num_layers: int) -> list[str]:
    """The names of the layers, by default 0, 1 and so on. Raises `ValueError` for a wrong number
    of names."""
    found = list(map(str, range(num_layers) if names is None else names))
    given = f"{len(found)} for {num_layers} layers"
    check(len(found) == num_layers, "layer_names", "hold one name per layer", given)
    return found

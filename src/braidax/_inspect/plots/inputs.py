"""Reads and checks what the plots are given, as NumPy arrays on the host."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Real

from ..._routing import Routing


def on_host(name: str, array: Any) -> np.ndarray:
    """The array in NumPy; `TypeError` for a traced one."""
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError:
        raise TypeError(
            f"`{name}` must be concrete, because it is drawn on the host. Got a traced array: "
            "return it from the compiled function and plot it outside."
        ) from None


class Assignments(NamedTuple):
    """A routing's tokens in reading order, its leading axes flattened."""

    indices: Int[np.ndarray, "tokens experts_per_token"]
    weights: Float[np.ndarray, "tokens experts_per_token"]
    mask: Bool[np.ndarray, " tokens"]
    num_experts: int


def assignments(routing: Any) -> Assignments:
    """Raises `TypeError` unless given a concrete `Routing`, `ValueError` for an expert that does
    not exist."""
    if not isinstance(routing, Routing):
        raise TypeError(f"`routing` must be a Routing. Got {type(routing).__name__}.")
    shape, num_experts = routing.indices.shape, routing.scores.shape[-1]
    mask = np.ones(shape[:-1], bool) if routing.mask is None else on_host("routing", routing.mask)
    mask = mask.reshape(-1)
    indices = on_host("routing", routing.indices).astype(np.int64).reshape(mask.size, shape[-1])
    weights = on_host("routing", routing.weights).astype(np.float64).reshape(mask.size, shape[-1])
    counted = indices[mask]
    if np.any((counted < 0) | (counted >= num_experts)):
        raise ValueError(
            f"`routing.indices` must lie in [0, {num_experts}). "
            f"Got {counted.min()} to {counted.max()}."
        )
    return Assignments(indices, weights, mask, num_experts)


def one_layer(routing: Any) -> Assignments:
    """The unmasked tokens of one layer, of all its routings together.

    Raises `TypeError` for anything but `Routing`, `ValueError` without a token to count and for
    routings that differ in their number of experts or of experts per token.
    """
    several = isinstance(routing, Sequence) and not isinstance(routing, str | bytes)
    parts = [assignments(item) for item in (routing if several else [routing])]
    sizes = sorted({(part.num_experts, part.indices.shape[1]) for part in parts})
    if len(sizes) > 1:
        raise ValueError(
            "`routing` must hold routings of one layer, alike in (experts, experts per token). "
            f"Got {sizes}."
        )
    num_tokens = sum(int(part.mask.sum()) for part in parts)
    if num_tokens == 0:
        padding = sum(part.mask.size for part in parts)
        raise ValueError(
            f"`routing` must hold a token that is not padding. Got {padding} tokens, all padding."
        )
    return Assignments(
        np.concatenate([part.indices[part.mask] for part in parts]),
        np.concatenate([part.weights[part.mask] for part in parts]),
        np.ones(num_tokens, bool),
        parts[0].num_experts,
    )


def curves(
    steps: Any, name: str, values: Any, columns: str
) -> tuple[Real[np.ndarray, " steps"], Float64[np.ndarray, "steps columns"]]:
    """The steps, and the values called `name`, one row a step and one of the `columns` each.

    Raises `ValueError` for shapes that do not fit and where nothing is to be drawn, `TypeError`
    for traced arrays.
    """
    steps, values = on_host("steps", steps), on_host(name, values).astype(np.float64)
    if steps.ndim != 1 or values.ndim != 2 or len(values) != len(steps) or not values.size:
        raise ValueError(
            f"`steps` must be (steps,) and `{name}` (steps, {columns}), not empty. "
            f"Got {steps.shape} and {values.shape}."
        )
    return steps, values


def layer_names(names: Sequence[str] | None, num_layers: int) -> list[str]:
    """The names given, or 0, 1, ...; `ValueError` unless there is one for each layer."""
    names = [str(i) for i in range(num_layers)] if names is None else list(names)
    if len(names) != num_layers:
        raise ValueError(
            f"`layer_names` must hold one name per layer. Got {len(names)} for {num_layers} layers."
        )
    return names

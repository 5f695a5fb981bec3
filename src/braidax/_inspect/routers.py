"""The routers of a model: their kinds, and the layers that are stacked in one router."""

from typing import Any

from jaxtyping import PyTree

from .._filters import routers
from .._router import AbstractRouter, HashRouter, TopKRouter


def find_routers(model: PyTree) -> list[AbstractRouter]:
    """The routers of `model` in model order. Raises `ValueError` if it has none."""
    found = routers(model)
    if not found:
        raise ValueError(f"`model` must hold a router. Got a {type(model).__name__} without one.")
    return found


def router_kind(router: AbstractRouter) -> str:
    """`"hash"`, `"top-k"`, or the name of another class."""
    kinds = {HashRouter: "hash", TopKRouter: "top-k"}
    return kinds.get(type(router), type(router).__name__)


def router_shape(router: AbstractRouter) -> tuple[tuple[int, ...], int]:
    """The axes over which layers are stacked, `()` for a single layer, and the number of experts.

    Raises `ValueError` for a router without a weight.
    """
    weight: Any = getattr(getattr(router, "gate", None), "weight", None)
    if not is_array(weight):
        raise ValueError(
            f"`model` must hold routers with a weight. Got a {type(router).__name__} whose "
            f"`gate.weight` is {weight!r:.60}: give the whole model, not a half of `eqx.partition`."
        )
    return tuple(weight.shape[:-2]), weight.shape[-2]


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype, as arrays and `jax.ShapeDtypeStruct` have."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")

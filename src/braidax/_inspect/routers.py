"""The routers of a model: their kinds, and the layers that are stacked in one router."""

from typing import Any

from .._checks import check
from .._router import AbstractRouter, ExpertChoiceRouter, HashRouter, TopKRouter

_KINDS = {HashRouter: "hash", TopKRouter: "top-k", ExpertChoiceRouter: "expert choice"}


def router_kind(router: AbstractRouter) -> str:
    """`"hash"`, `"top-k"`, `"expert choice"`, or the name of another class."""
    return _KINDS.get(type(router), type(router).__name__)


def router_shape(router: AbstractRouter) -> tuple[tuple[int, ...], int]:
    """The axes over which layers are stacked, `()` for a single layer, and the number of experts.

    Raises `ValueError` for a router without a weight.
    """
    weight: Any = getattr(getattr(router, "gate", None), "weight", None)
    given = f"a {type(router).__name__} whose `gate.weight` is {weight!r:.60}"
    hint = "give the whole model, not a half of `eqx.partition`"
    check(is_array(weight), "model", "hold routers with a weight", f"{given}: {hint}")
    return tuple(weight.shape[:-2]), weight.shape[-2]


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype, as arrays and `jax.ShapeDtypeStruct` have."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")

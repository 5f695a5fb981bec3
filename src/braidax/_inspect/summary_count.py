"""Counting one block, part by part: exact integers from shapes, no array is read."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._experts.packed import PackedMatrices
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .._router import AbstractRouter, HashRouter, TopKRouter

TOTALS = ("parameters", "active", "num_bytes", "forward_flops", "backward_flops")


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """A router, a block's routed experts, a shared expert, or the rest of a model.

    `shapes` holds dtype and shape of each array by its name, `"f32[256,4096]"`; for the rest of a
    model it is empty. FLOPs are per token, and 0 for the rest of a model.
    """

    name: str
    module: str
    shapes: dict[str, str]
    parameters: int
    active: int
    num_bytes: int
    forward_flops: int
    backward_flops: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class BlockSummary:
    """One `RoutedMoE` or `RoutedAndSharedMoE` of a model.

    `path` leads to it from the model's root, where it is empty. `router` is `"hash"`, `"top-k"` or
    the name of another class. `layers` is above 1 for a stacked block, of which all numbers are
    sums.
    """

    path: str
    module: str
    router: str
    layers: int
    num_experts: int
    num_experts_per_token: int
    parts: tuple[PartSummary, ...]

    @property
    def parameters(self) -> int:
        """Parameters of router, experts and shared expert."""
        return sum(part.parameters for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return sum(part.active for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def forward_flops(self) -> int:
        """FLOPs for one token, forward."""
        return sum(part.forward_flops for part in self.parts)

    @property
    def backward_flops(self) -> int:
        """FLOPs for one token, backward."""
        return sum(part.backward_flops for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["parts"] = [part.to_dict() for part in self.parts]
        return record | {name: getattr(self, name) for name in TOTALS}


def router_kind(router: AbstractRouter) -> str:
    """`"hash"`, `"top-k"`, or the name of another class."""
    kinds = {HashRouter: "hash", TopKRouter: "top-k"}
    return kinds.get(type(router), type(router).__name__)


def layer_axes(router: AbstractRouter) -> tuple[int, ...]:
    """The axes over which layers are stacked, `()` for a single one.

    Raises `ValueError` for a router without a weight.
    """
    weight: Any = getattr(router.gate, "weight", None)
    if not is_array(weight):
        raise ValueError(
            f"`model` must hold routers with a weight. Got a {type(router).__name__} whose weight"
            f" is {weight!r:.60}: give the whole model, not a half of `eqx.partition`."
        )
    return tuple(weight.shape[:-2])


def count_block(path: str, block: RoutedMoE | RoutedAndSharedMoE) -> BlockSummary:
    """The block at `path`."""
    routed = block if isinstance(block, RoutedMoE) else block.routed
    router, layers = routed.router, math.prod(layer_axes(routed.router))
    num_experts, chosen = router.gate.weight.shape[-2], router.num_experts_per_token
    stacked = len(layer_axes(router))
    parts = [
        _count_part("router", router, stacked),
        _count_part("experts", routed.experts, stacked + 1, (chosen, num_experts)),
    ]
    if isinstance(block, RoutedAndSharedMoE):
        parts.append(_count_part("shared", block.shared, stacked))
    kind = router_kind(router)
    name = type(block).__name__
    return BlockSummary(path, name, kind, layers, num_experts, chosen, tuple(parts))


def count_rest(leaves: Sequence[Any]) -> PartSummary | None:
    """Parameters and bytes of what lies outside of the blocks; None for no array."""
    arrays = [leaf for leaf in leaves if is_array(leaf) or is_packed(leaf)]
    if not arrays:
        return None
    parameters = sum(map(_num_parameters, arrays))
    return PartSummary("other", "", {}, parameters, parameters, sum(map(_num_bytes, arrays)), 0, 0)


def _count_part(
    name: str, module: PyTree, leading: int, share: tuple[int, int] = (1, 1)
) -> PartSummary:
    """`leading` axes stand before those of a matrix; a token uses `share` of all parameters."""
    used, of = share
    parameters = num_bytes = products = backward = 0
    shapes = {}
    leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_packed)
    for path, leaf in leaves:
        if not (is_array(leaf) or is_packed(leaf)):
            continue
        shapes[jax.tree_util.keystr(path).removeprefix(".")] = _shape(leaf)
        count = _num_parameters(leaf)
        parameters += count
        num_bytes += _num_bytes(leaf)
        if len(_full_shape(leaf)) >= leading + 2:
            products += count
            backward += count if is_packed(leaf) else 2 * count
    flops = [2 * count * used // of for count in (products, backward)]
    active = parameters * used // of
    return PartSummary(name, type(module).__name__, shapes, parameters, active, num_bytes, *flops)


def is_packed(leaf: Any) -> bool:
    """Whether it is packed matrices, which count as the numbers they hold."""
    return isinstance(leaf, PackedMatrices)


def is_array(leaf: Any) -> bool:
    """Whether it has a shape and a dtype, as a `jax.ShapeDtypeStruct` has too."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _full_shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape


def _num_parameters(leaf: Any) -> int:
    if is_packed(leaf) or jnp.issubdtype(leaf.dtype, jnp.inexact):
        return math.prod(_full_shape(leaf))
    return 0


def _num_bytes(leaf: Any) -> int:
    arrays = (leaf.payload, leaf.scale) if is_packed(leaf) else (leaf,)
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def _shape(leaf: Any) -> str:
    """As Equinox prints an array: `f32[256,4096]`."""
    number = leaf.number if is_packed(leaf) else str(leaf.dtype)
    short = number.replace("float", "f").replace("uint", "u").replace("int", "i")
    return f"{short}[{','.join(map(str, _full_shape(leaf)))}]"

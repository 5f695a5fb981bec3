"""Where the arrays of a model live on the mesh."""

import math
import warnings
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._moe import RoutedMoE
from .layout import MeshLayout
from .shards import check_leading_axis


def is_block(node: Any) -> bool:
    """Whether `node` is routed experts: what expert parallelism is about."""
    return isinstance(node, RoutedMoE)


def _is_array(node: Any) -> bool:
    return eqx.is_array(node) or isinstance(node, jax.ShapeDtypeStruct)


def _stacked_axes(block: RoutedMoE) -> tuple[int, int] | None:
    """`(axes of stacked layers in front, number of experts)`, or None where no array tells: the
    blocks in an optimizer state have parts missing."""
    weight: Any = getattr(block.router.gate, "weight", None)
    down: Any = getattr(block.experts, "down", None)
    if _is_array(weight) and weight.ndim >= 2:
        return weight.ndim - 2, weight.shape[-2]
    if _is_array(down) and down.ndim >= 3:
        return down.ndim - 3, down.shape[-3]
    return None


def _block_shardings(layout: MeshLayout, block: RoutedMoE) -> PyTree:
    found = _stacked_axes(block)

    def router_sharding(leaf: Any) -> Any:
        return _sharding(layout, leaf, None) if _is_array(leaf) else None

    def expert_sharding(leaf: Any) -> Any:
        if not _is_array(leaf):
            return None
        if found is None:
            return _sharding(layout, leaf, None)
        axis, num_experts = found
        divides = not num_experts % layout.size and leaf.ndim > axis
        stacked = divides and leaf.shape[axis] == num_experts
        return _sharding(layout, leaf, axis if stacked else None)

    placed = jax.tree.map(router_sharding, block)
    experts = jax.tree.map(expert_sharding, block.experts)
    return eqx.tree_at(lambda b: b.experts, placed, experts, is_leaf=lambda leaf: leaf is None)


def _sharding(layout: MeshLayout, leaf: Any, expert_axis: int | None) -> NamedSharding:
    """Experts over `layout.axis`; over mesh axes that `layout` does not name, as `leaf` is."""
    mesh, sharding = layout.mesh, getattr(leaf, "sharding", None)
    spec: list[tuple[str, ...]] = [()] * leaf.ndim
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        for axis, names in enumerate(sharding.spec):
            names = (names,) if isinstance(names, str) else names or ()
            spec[axis] = tuple(name for name in names if name not in layout.tokens)
    if expert_axis is not None:
        names = (layout.axis, *spec[expert_axis])
        parts = math.prod(mesh.shape[name] for name in names)
        divides = not leaf.shape[expert_axis] % parts
        spec[expert_axis] = names if divides else (layout.axis,)
    while spec and not spec[-1]:
        spec.pop()
    entries = (names[0] if len(names) == 1 else names or None for names in spec)
    return NamedSharding(mesh, PartitionSpec(*entries))


def shardings(layout: MeshLayout, model: PyTree) -> PyTree:
    """See `ExpertParallel.shardings`."""

    def place(node: Any) -> Any:
        if is_block(node):
            return _block_shardings(layout, node)
        if not _is_array(node):
            return None
        sharding = getattr(node, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == layout.mesh:
            return sharding
        return NamedSharding(layout.mesh, PartitionSpec())

    return jax.tree.map(place, model, is_leaf=is_block)


def place_block(layout: MeshLayout, block: RoutedMoE) -> RoutedMoE:
    """`block` with its arrays on the mesh; under `jax.jit` or for shapes alone, unplaced."""
    arrays, static = eqx.partition(block, lambda leaf: isinstance(leaf, jax.Array))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        return block
    return eqx.combine(jax.device_put(arrays, _block_shardings(layout, arrays)), static)


def check_experts(layout: MeshLayout, block: RoutedMoE) -> None:
    """The experts of `block` can be spread over the devices of the layout."""
    found = _stacked_axes(block)
    if found is None:
        return
    axis, num_experts = found
    check_leading_axis(eqx.filter(block.experts, _is_array), num_experts, axis)
    if num_experts % layout.size:
        warnings.warn(
            f"{num_experts} experts do not divide over {layout.size} devices: every device "
            "stores them all.",
            stacklevel=3,
        )

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
        return weight.ndim - 2, weight.shape[-2] - block.num_identity_experts
    if _is_array(down) and down.ndim >= 3:
        return down.ndim - 3, down.shape[-3]
    return None


def shardings(layout: MeshLayout, tree: PyTree) -> PyTree:
    """See `ExpertParallel.shardings`."""

    def place(node: Any) -> Any:
        if not is_block(node):
            return _sharding(layout, node, None)
        placed = jax.tree.map(lambda leaf: _sharding(layout, leaf, None), node)
        found = _stacked_axes(node)
        experts = jax.tree.map(lambda leaf: _sharding(layout, leaf, found), node.experts)
        return eqx.tree_at(lambda b: b.experts, placed, experts, is_leaf=lambda leaf: leaf is None)

    return jax.tree.map(place, tree, is_leaf=is_block)


def _sharding(
    layout: MeshLayout, leaf: Any, stacked_axes: tuple[int, int] | None
) -> NamedSharding | None:
    """As `leaf` is on this mesh, but the experts of `(axis, number)` over `layout.axis`."""
    if not _is_array(leaf):
        return None
    mesh, sharding = layout.mesh, getattr(leaf, "sharding", None)
    here = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
    kept = sharding.spec if here else PartitionSpec()
    axis, count = stacked_axes or (0, 0)
    if not count or count % layout.size or leaf.shape[axis : axis + 1] != (count,):
        return NamedSharding(mesh, kept)
    spec = [(names,) if isinstance(names, str) else names or () for names in kept]
    spec = [tuple(name for name in names if name != layout.axis) for names in spec]
    spec += [()] * (axis + 1 - len(spec))
    first = () if layout.axis is None else (layout.axis,)
    names = (*first, *spec[axis])
    spec[axis] = first if count % math.prod(mesh.shape[name] for name in names) else names
    while spec and not spec[-1]:
        spec.pop()
    entries = (names[0] if len(names) == 1 else names or None for names in spec)
    return NamedSharding(mesh, PartitionSpec(*entries))


def placed(layout: MeshLayout, tree: PyTree) -> PyTree:
    """`tree` with its arrays on the mesh; under `jax.jit` or for shapes alone, unplaced."""
    arrays, static = eqx.partition(tree, lambda leaf: isinstance(leaf, jax.Array))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        return tree
    return eqx.combine(jax.device_put(arrays, shardings(layout, arrays)), static)


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

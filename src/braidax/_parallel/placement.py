"""Where the arrays of a model live on the mesh."""

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._backends import check_parallel_backend
from .._moe import RoutedMoE

if TYPE_CHECKING:
    from .expert_parallel import ExpertParallel


def is_block(node: Any) -> bool:
    """Whether `node` is routed experts: what expert parallelism is about."""
    return isinstance(node, RoutedMoE)


def _is_array(node: Any) -> bool:
    return eqx.is_array(node) or isinstance(node, jax.ShapeDtypeStruct)


def _stacked_axes(block: RoutedMoE) -> tuple[int, int] | None:
    """`(axes of stacked layers in front, number of experts)`, or None where no array tells: the
    blocks in an optimizer state have parts missing."""
    weight: Any = block.router.weight
    gate_up: Any = getattr(block.experts, "gate_up", None)
    if _is_array(weight) and weight.ndim >= 2:
        return weight.ndim - 2, weight.shape[-2]
    if _is_array(gate_up) and gate_up.ndim >= 3:
        return gate_up.ndim - 3, gate_up.shape[-3]
    return None


def _block_shardings(parallel: "ExpertParallel", block: RoutedMoE) -> PyTree:
    everywhere = NamedSharding(parallel.mesh, PartitionSpec())
    found = _stacked_axes(block)

    def expert_sharding(leaf: Any) -> Any:
        if not _is_array(leaf):
            return None
        if found is None:
            return everywhere
        axis, num_experts = found
        if num_experts % parallel.size or leaf.shape[axis : axis + 1] != (num_experts,):
            return everywhere
        return NamedSharding(parallel.mesh, PartitionSpec(*[None] * axis, parallel.axis))

    placed = jax.tree.map(lambda leaf: everywhere if _is_array(leaf) else None, block)
    experts = jax.tree.map(expert_sharding, block.experts)
    return eqx.tree_at(lambda b: b.experts, placed, experts, is_leaf=lambda leaf: leaf is None)


def shardings(parallel: "ExpertParallel", model: PyTree) -> PyTree:
    """See `ExpertParallel.shardings`."""

    def place(node: Any) -> Any:
        if is_block(node):
            return _block_shardings(parallel, node)
        if not _is_array(node):
            return None
        sharding = getattr(node, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == parallel.mesh:
            return sharding
        return NamedSharding(parallel.mesh, PartitionSpec())

    return jax.tree.map(place, model, is_leaf=is_block)


def with_parallel(parallel: "ExpertParallel", block: RoutedMoE) -> RoutedMoE:
    """`block` with another static field. Not by its constructor, which checks arrays that the
    blocks of an optimizer state do not have."""
    copy = object.__new__(type(block))
    for field in dataclasses.fields(block):
        object.__setattr__(copy, field.name, getattr(block, field.name))
    object.__setattr__(copy, "parallel", parallel)
    return copy


def place_block(parallel: "ExpertParallel", block: RoutedMoE) -> RoutedMoE:
    """`block` with its arrays on the mesh; under `jax.jit` or for shapes alone, unplaced."""
    arrays, static = eqx.partition(block, lambda leaf: isinstance(leaf, jax.Array))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        return block
    return eqx.combine(jax.device_put(arrays, _block_shardings(parallel, arrays)), static)


def check_experts(parallel: "ExpertParallel", block: RoutedMoE) -> None:
    """The block can be computed by this many devices."""
    check_parallel_backend(block.backend)
    if block.checks:
        raise ValueError(
            "`checks` must be False in a block that is spread over devices: a run-time error "
            "cannot leave one of them. Got True."
        )
    found = _stacked_axes(block)
    if found is None:
        return
    axis, num_experts = found
    for leaf in jax.tree.leaves(eqx.filter(block.experts, _is_array)):
        if leaf.shape[axis : axis + 1] != (num_experts,):
            raise ValueError(
                f"`experts` must hold arrays that all start with the {num_experts} experts, after "
                f"{axis} axes of stacked layers. Got shape {leaf.shape}."
            )
    if num_experts % parallel.size:
        warnings.warn(
            f"{num_experts} experts do not divide over {parallel.size} devices: every device "
            "stores them all.",
            stacklevel=3,
        )

"""What JAX asks about arrays on a mesh: their sharding on an Explicit one, and inside
`jax.shard_map` the axes that they vary over."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

_Result = TypeVar("_Result")


def placed_by_compiler(
    function: Callable[..., _Result], *arrays: PyTree, like: jax.Array | None = None
) -> _Result:
    """`function(*arrays)`, also where an Explicit mesh has the arrays: the compiler places what
    happens inside. The result is sharded as `like` is, by default on every device."""
    for leaf in jax.tree.leaves(arrays):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and AxisType.Explicit in mesh.axis_types:
            everywhere = NamedSharding(mesh, PartitionSpec())
            sharding = everywhere if like is None else jax.typeof(like).sharding
            return jax.sharding.auto_axes(function, out_sharding=sharding)(*arrays)
    return function(*arrays)


def split_axes(tree: PyTree) -> tuple[str, ...]:
    """The axes of an Explicit mesh over which an array of `tree` is in parts."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]
    entries = [(names,) if isinstance(names, str) else names or () for s in specs for names in s]
    return tuple(dict.fromkeys(name for names in entries for name in names))


def varying_alike(tree: PyTree) -> PyTree:
    """`tree` with arrays that all vary over the same axes of a surrounding `jax.shard_map`.

    JAX wants the cotangents of a `custom_vjp` and the carry of a loop to vary as their operands.
    JAX casts the operands of its own operations. The transpose of such a cast is the sum of the
    gradients of all devices.
    """
    around = jax.sharding.get_abstract_mesh().manual_axes
    if not around:
        return tree
    arrays, static = eqx.partition(tree, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    for axis in around:
        varying = [_varies(leaf, axis) for leaf in jax.tree.leaves(arrays)]
        if any(varying):
            varying = jax.tree.unflatten(jax.tree.structure(arrays), varying)
            arrays = jax.tree.map(
                lambda leaf, varies, axis=axis: leaf if varies else _cast(leaf, axis),
                arrays,
                varying,
            )
    return eqx.combine(arrays, static)


def _cast(array: Any, axis: str) -> Array:
    return jax.lax.pcast(array, (axis,), to="varying")


def _varies(array: Any, axis: str) -> bool:
    """JAX has no public question for the axes, but refuses to cast what varies already."""
    try:
        _cast(array, axis)
    except ValueError:
        return True
    return False

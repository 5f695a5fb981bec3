"""Explicit meshes, on which JAX asks for the sharding of what it cannot infer."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

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

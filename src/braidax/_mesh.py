"""Explicit meshes, on which JAX asks for the sharding of what it cannot infer."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_Arrays = ParamSpec("_Arrays")
_Result = TypeVar("_Result")


def reduction_on_any_mesh(function: Callable[_Arrays, _Result]) -> Callable[_Arrays, _Result]:
    """A function that reduces token arrays to one small array, also where an Explicit mesh has
    them: the compiler places what happens inside, and the result is on every device."""

    @functools.wraps(function)
    def wrapper(*args: _Arrays.args, **kwargs: _Arrays.kwargs) -> _Result:
        for leaf in jax.tree.leaves((args, kwargs)):
            mesh = jax.typeof(leaf).sharding.mesh
            if not mesh.empty and AxisType.Explicit in mesh.axis_types:
                call = jax.sharding.auto_axes(
                    lambda args, kwargs: function(*args, **kwargs),
                    out_sharding=NamedSharding(mesh, PartitionSpec()),
                )
                return call(args, kwargs)
        return function(*args, **kwargs)

    return wrapper

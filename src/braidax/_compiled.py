"""Calls that compile once, also outside of `jax.jit`."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def compiled(method: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """`method`, compiled by `eqx.filter_jit`, with ids that keep their meaning.

    Arrays of numpy in the module become arrays of JAX first, also where JAX is told not to compile.
    JAX cuts a 64-bit integer of numpy to its lower 32 bits, so that the id 2**32 + 5 becomes 5.
    `eqx.filter_jit` compiles anew for every Python number.
    """
    jitted = eqx.filter_jit(method)

    @functools.wraps(method)
    def call(self, /, *arguments, **options):
        arguments, options = jax.tree.map(_within_int32, (arguments, options))
        return jitted(jax.tree.map(_as_jax, self), *arguments, **options)

    return call


def _as_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _within_int32(value: Any) -> Any:
    """A Python or numpy integer as int32; one that does not fit is the lowest, which is no id."""
    lowest = np.iinfo(np.int32).min
    if type(value) is int:
        return np.int32(value if lowest <= value <= ~lowest else lowest)
    if isinstance(value, np.ndarray | np.integer) and value.dtype.kind in "iu":
        narrow = value.astype(np.int32)
        return np.where(narrow == value, narrow, np.int32(lowest))
    return value

"""Reading one matrix of a stack, inside of a loop over groups."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def is_array(stack: Any) -> bool:
    """Whether `stack` is an array, and not an object that stands in for one."""
    return isinstance(stack, jax.Array | np.ndarray)


def is_packed(stack: Any) -> bool:
    """Whether `stack` is no array, but packed numbers that decode themselves group by group."""
    return hasattr(stack, "of_group")


def of_group(stack: Any, group: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, "a b"]:
    """One matrix of `stack`, `(groups, a, b)`, in `dtype`.

    Packed numbers have a method `of_group(group, dtype)` of their own, which decodes them."""
    if is_packed(stack):
        return stack.of_group(group, dtype)
    return part_of_group(stack, group, (0, 0), (stack.shape[1], stack.shape[2]), dtype)


def part_of_group(
    stack: Float[Array, "groups _a _b"],
    group: Int[Array, ""],
    begin: tuple[int | Int[Array, ""], int | Int[Array, ""]],
    shape: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "a b"]:
    """The part of one matrix of `stack` that starts at `begin` and has `shape`, in `dtype`."""
    narrow = stack.dtype
    row, column = (jnp.asarray(index, group.dtype) for index in begin)
    if narrow.itemsize >= 4:
        return jax.lax.dynamic_slice(stack, (group, row, column), (1, *shape))[0].astype(dtype)
    # XLA:CPU slices narrow floats by widening the whole stack, once, before the loop. It does not
    # do so for integers. The barrier keeps XLA from moving the conversion out of the loop.
    stack, group = jax.lax.optimization_barrier((stack, group))
    integer = {1: jnp.uint8, 2: jnp.uint16}[narrow.itemsize]
    bits = jax.lax.bitcast_convert_type(stack, integer)
    part = jax.lax.dynamic_slice(bits, (group, row, column), (1, *shape))[0]
    return jax.lax.bitcast_convert_type(part, narrow).astype(dtype)

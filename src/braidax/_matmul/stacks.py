"""Reading one matrix of a stack, and summing one, inside of a loop over groups."""

from typing import Any

import equinox as eqx
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
    row, column = (jnp.asarray(index, group.dtype) for index in begin)
    if stack.dtype.itemsize < 4:
        # The barrier keeps XLA from moving the conversion out of the loop.
        stack, group = jax.lax.optimization_barrier((stack, group))
    part = jax.lax.dynamic_slice(as_bits(stack), (group, row, column), (1, *shape))[0]
    return from_bits(part, stack.dtype).astype(dtype)


def as_bits(array: Float[Array, "..."]) -> Array:
    """`array` if its numbers have 32 bits or more, otherwise its bits as integers.

    XLA:CPU slices and updates narrow floats by widening the whole stack. It does not do so for
    integers."""
    integers = {1: jnp.uint8, 2: jnp.uint16}
    size = array.dtype.itemsize
    return jax.lax.bitcast_convert_type(array, integers[size]) if size in integers else array


def from_bits(bits: Array, dtype: jnp.dtype) -> Float[Array, "..."]:
    """The numbers of `as_bits`, which were of `dtype`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


class GroupSums(eqx.Module):
    """A stack of sums, and the sum of the group in work where the stack is narrower.

    The blocks of a group follow each other, so one wide sum serves all groups in turn."""

    stack: Array
    total: Array | None
    dtype: jnp.dtype = eqx.field(static=True)

    @staticmethod
    def of(stack: Array, dtype: jnp.dtype | None) -> "GroupSums":
        """Sums in `dtype` on top of `stack`, which is 0."""
        total = None
        if stack.dtype != dtype:
            total = jax.lax.full_like(stack, 0, dtype, stack.shape[1:])
        return GroupSums(as_bits(stack), total, stack.dtype)

    def add(self, term: Array, group: Array, first: Array) -> "GroupSums":
        """A group's first block replaces what was there, and the later ones add to it."""
        previous = self.total
        if previous is None:
            previous = jax.lax.dynamic_index_in_dim(self.stack, group, keepdims=False)
        total = jnp.where(first, term, previous + term)
        rounded = as_bits(total.astype(self.dtype))
        stack = jax.lax.dynamic_update_index_in_dim(self.stack, rounded, group, 0)
        return GroupSums(stack, None if self.total is None else total, self.dtype)

    def stacked(self) -> Array:
        """The sums of all groups."""
        return from_bits(self.stack, self.dtype)

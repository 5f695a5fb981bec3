"""Grouped matrix product by `jax.lax.ragged_dot_general`: the default on GPU and TPU.

On a CPU it lowers to dense work over all groups, and a NaN in one group's weights reaches every
row there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .accumulate import Accumulating, composed_into
from .feed_forward import composed
from .grouped_matmul import GroupedMatmul, Kernels, accumulation_dtype, grouped_matmul


def by_ragged_dot(ragged_dot_general: Callable[..., Array]) -> GroupedMatmul:
    """The product by a function with the signature and meaning of `jax.lax.ragged_dot_general`."""

    def multiply(
        rows: Float[Array, "rows size_in"],
        weight: Float[Array, "groups a b"],
        group_sizes: Int[Array, " groups"],
        transposed: bool,
    ) -> Float[Array, "rows size_out"]:
        contraction = (((1,), (2 if transposed else 1,)), ((), ()))
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=contraction, lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
        )
        dtype = accumulation_dtype(rows, weight)
        product = ragged_dot_general(
            rows, weight, group_sizes, dimensions, preferred_element_type=dtype
        )
        # Rows that belong to no group are undefined on some platforms.
        owned = jnp.arange(rows.shape[0]) < group_sizes.sum()
        return jnp.where(owned[:, None], product, 0)

    def outer(
        left: Float[Array, "rows a"],
        right: Float[Array, "rows b"],
        group_sizes: Int[Array, " groups"],
    ) -> Float[Array, "groups a b"]:
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        dtype = accumulation_dtype(left, right)
        product = ragged_dot_general(
            left, right, group_sizes, dimensions, preferred_element_type=dtype
        )
        # Groups without rows are undefined on some platforms.
        return jnp.where((group_sizes > 0)[:, None, None], product, 0)

    wide = grouped_matmul(Kernels(jax.jit(multiply, static_argnums=3), jax.jit(outer)))
    assert wide.into is not None  # For the type checker: only the dense product has none.
    wide_into = wide.into.multiply

    def narrow(
        rows: Float[Array, "rows size_in"],
        weight: Float[Array, "groups a b"],
        group_sizes: Int[Array, " groups"],
        transposed: bool,
        /,
    ) -> Float[Array, "rows size_out"]:
        """Rows wider than the weights are rounded to their dtype first: accelerators multiply
        numbers of one width, and to widen the whole stack of weights would cost more than the
        product."""
        return wide(_narrow(rows, weight), weight, group_sizes, transposed)

    def narrow_into(rows, weight, group_sizes, sums, transposed):
        return wide_into(_narrow(rows, weight), weight, group_sizes, sums, transposed)

    into = Accumulating(narrow_into, composed_into(narrow_into))
    return GroupedMatmul(narrow, composed(narrow), into)


def _narrow(rows: Array, weight: Array) -> Array:
    narrower = jnp.finfo(weight.dtype).bits < jnp.finfo(rows.dtype).bits
    return rows.astype(weight.dtype) if narrower else rows


ragged_matmul = by_ragged_dot(jax.lax.ragged_dot_general)

"""Plain batched products over groups of equal size, for the dense dispatch."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .base import AbstractGroupedMatmul


class Dense(AbstractGroupedMatmul):
    """Batched products of groups of equal size, which no row is outside of.

    Plain JAX code, so every kind of differentiation works, forward mode included.
    """

    plain: ClassVar[bool] = True

    def multiply(
        self,
        rows: Float[Array, "rows size_in"],
        weight: Float[Array, "groups a b"],
        group_sizes: Int[Array, " groups"],
        *,
        transposed: bool,
        out_dtype: jnp.dtype,
    ) -> Float[Array, "rows size_out"]:
        """As `AbstractGroupedMatmul.multiply`."""
        del group_sizes
        grouped = _by_group(rows, weight.shape[0])
        subscripts = "gri,goi->gro" if transposed else "gri,gio->gro"
        product = jnp.einsum(subscripts, grouped, weight, preferred_element_type=out_dtype)
        return product.reshape(rows.shape[0], product.shape[-1])

    def outer(
        self,
        left: Float[Array, "rows a"],
        right: Float[Array, "rows b"],
        group_sizes: Int[Array, " groups"],
        *,
        out_dtype: jnp.dtype,
    ) -> Float[Array, "groups a b"]:
        """As `AbstractGroupedMatmul.outer`."""
        groups = group_sizes.shape[0]
        operands = (_by_group(left, groups), _by_group(right, groups))
        return jnp.einsum("gra,grb->gab", *operands, preferred_element_type=out_dtype)


def _by_group(rows: Float[Array, "rows size"], groups: int) -> Float[Array, "groups _rows size"]:
    return rows.reshape(groups, rows.shape[0] // groups, rows.shape[-1])

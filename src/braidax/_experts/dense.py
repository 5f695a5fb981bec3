"""The plain einsum over groups of equal size that goes with the dense dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .feed_forward import composed
from .grouped_matmul import GroupedMatmul, accumulation_dtype


def _multiply(
    rows: Float[Array, "rows size_in"],
    weight: Float[Array, "groups a b"],
    group_sizes: Int[Array, " groups"],
    transposed: bool,
    /,
) -> Float[Array, "rows size_out"]:
    """Rows in groups of equal size times the weights of their groups. Supports every kind of
    differentiation, forward mode included."""
    del group_sizes
    groups = weight.shape[0]
    grouped = rows.reshape(groups, rows.shape[0] // groups, rows.shape[-1])
    product = jnp.einsum(
        "gri,goi->gro" if transposed else "gri,gio->gro",
        grouped,
        weight,
        preferred_element_type=accumulation_dtype(rows, weight),
    )
    return product.reshape(rows.shape[0], product.shape[-1])


dense_matmul = GroupedMatmul(_multiply, composed(_multiply))

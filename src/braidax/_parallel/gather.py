"""All-gather and reduce-scatter: every device of the expert axis sees all of that axis's tokens."""

import jax
from jaxtyping import Array, Float, Int

from .exchange import Shard


def gather(
    shard: Shard,
    tokens: Float[Array, "tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
) -> tuple[Float[Array, "tokens hidden"], None]:
    """Dropless, static shapes, runs everywhere. Traffic grows with the number of devices."""
    tokens, indices, weights = (
        jax.lax.all_gather(array, shard.axis, tiled=True) for array in (tokens, indices, weights)
    )
    output = shard.compute(tokens, shard.local(indices, shard.me()), weights)
    return jax.lax.psum_scatter(output, shard.axis, scatter_dimension=0, tiled=True), None

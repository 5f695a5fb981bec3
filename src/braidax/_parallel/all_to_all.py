"""All-to-all with a fixed number of slots for each pair of devices."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .exchange import Shard


def slots(num_tokens: int, experts_per_token: int, size: int, capacity: float | None) -> int:
    """Rows that one device can send to another: `capacity` times the even share of one row for
    each assignment, at most one row for each token. `None`: room for every token."""
    if capacity is None:
        return num_tokens
    share = num_tokens * min(1.0, experts_per_token / size)
    return min(num_tokens, math.ceil(capacity * share))


def all_to_all(
    shard: Shard,
    tokens: Float[Array, "tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
) -> tuple[Float[Array, "tokens hidden"], Int[Array, ""]]:
    """One row for each token and destination device, with the ids and weights of its experts
    there; the destination sums them, so one row comes back. Where a pair's slots run out, the
    later tokens of the sending device lose their experts there."""
    num_tokens, size = tokens.shape[0], shard.size
    per_pair = slots(num_tokens, indices.shape[1], size, shard.capacity)
    hit = shard.destinations(indices)
    position = jnp.cumsum(hit, axis=0, dtype=jnp.int32) - 1
    kept = hit & (position < per_pair)
    devices = jnp.arange(size, dtype=jnp.int32)[None]
    slot = jnp.where(kept, devices * per_pair + position, size * per_pair)
    # The token of every slot; an empty one points past the end.
    empty = jnp.full((size * per_pair,), num_tokens, jnp.int32)
    token = empty.at[slot].set(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], mode="drop")
    nobody = size * shard.num_experts

    def send(array, fill):
        rows = array.at[token].get(mode="fill", fill_value=fill)
        return jax.lax.all_to_all(rows, shard.axis, 0, 0, tiled=True)

    local = shard.local(send(indices, nobody), shard.me())
    sums = shard.compute(send(tokens, 0), local, send(weights, 0))
    # The slots are symmetric: the same operation returns each row to its sender.
    sums = jax.lax.all_to_all(sums, shard.axis, 0, 0, tiled=True)
    output = jnp.zeros_like(tokens, sums.dtype).at[token].add(sums, mode="drop")
    # An id that names nobody has no destination, and is not lost.
    device = jnp.minimum(indices // shard.num_experts, size - 1)
    reached = jnp.take_along_axis(kept, device, axis=1, mode="promise_in_bounds")
    return output, jnp.sum((indices < nobody) & ~reached, dtype=jnp.int32)

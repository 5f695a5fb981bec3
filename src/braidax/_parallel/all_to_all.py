"""All-to-all with a fixed number of slots for each pair of devices."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import positive_number
from .exchange import AbstractExchange, Sizes


class AllToAll(AbstractExchange):
    """One row for each token and destination device, in a fixed number of slots.

    A row carries the ids and weights of its experts there. The destination sums them, so one row
    comes back. Where a pair's slots run out, the later tokens of the sending device lose their
    experts there, which `Routing.dropped` counts. **Source:** GShard (arXiv:2006.16668).

    - `capacity`: slots for each pair of devices, as a multiple of the even share of assignments.
      `None` drops nothing and moves as many bytes as `Gather()`.

    **Raises:** `ValueError` or `TypeError` unless `capacity` is `None` or a positive number.
    """

    capacity: float | None = eqx.field(static=True)

    def __init__(self, capacity: float | int | None = None):
        self.capacity = None if capacity is None else positive_number("capacity", capacity)

    def slots(self, num_tokens: int, experts_per_token: int, size: int) -> int:
        """Rows that one device can send to another, at most one for each token."""
        if self.capacity is None:
            return num_tokens
        share = num_tokens * min(1.0, experts_per_token / size)
        return min(num_tokens, math.ceil(self.capacity * share))

    def __call__(self, shard, tokens, indices, weights):
        """As `AbstractExchange.__call__`."""
        num_tokens, size = tokens.shape[0], shard.size
        per_pair = self.slots(num_tokens, indices.shape[1], size)
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

    def rows_sent(self, sizes: Sizes, size: int) -> float:
        """As `AbstractExchange.rows_sent`."""
        return (size - 1) * self.slots(sizes.tokens, sizes.experts_per_token, size) / sizes.tokens

    def rows_held(self, sizes: Sizes, size: int) -> tuple[int, int]:
        """As `AbstractExchange.rows_held`."""
        return 0, size * self.slots(sizes.tokens, sizes.experts_per_token, size)

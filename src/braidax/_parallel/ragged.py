"""Ragged all-to-all: only the rows that are needed move. Experimental.

`jax.lax.ragged_all_to_all` has no CPU implementation (jax issue 34755), so there an emulation by
all-gather is chosen when the program is lowered.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .exchange import AbstractExchange, Shard, Sizes


class Ragged(AbstractExchange):
    """The rows of `AllToAll` without slots, dropless. Experimental.

    The receive buffer holds the worst case, every token of the expert axis; the traffic is that of
    the real rows.

    On GPUs set `--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true` in `XLA_FLAGS`.
    Without the flag others saw wrong gradients in the first backward pass (marin issue 8077).
    """

    def __call__(self, shard, tokens, indices, weights):
        """As `AbstractExchange.__call__`."""
        num_tokens, size = tokens.shape[0], shard.size
        hit = shard.destinations(indices)
        most = num_tokens * min(size, indices.shape[1])
        by_device = jnp.where(hit, jnp.arange(size, dtype=jnp.int32)[None], size).T.reshape(-1)
        order = jnp.argsort(by_device, stable=True)[:most]
        token = order % max(num_tokens, 1)
        counts = jax.lax.all_gather(hit.sum(axis=0, dtype=jnp.int32), shard.axis)  # (from, to)
        me = shard.me()
        sizes, received = counts[me], counts[:, me]
        offsets = (_starts(sizes, 0), sizes, _starts(counts, 0)[me], received)
        back = (_starts(received, 0), received, _starts(counts, 1)[:, me], sizes)
        # Rows outside of these are never read: the transport leaves them as they were or worse.
        sent = jnp.arange(most) < sizes.sum()
        arrived = jnp.arange(size * num_tokens) < received.sum()
        nobody = size * shard.num_experts

        def send(array, fill):
            rows = _where(sent, array[token], fill)
            return _where(arrived, _exchange(shard, rows, arrived.size, offsets), fill)

        local = shard.local(send(indices, nobody), me)
        sums = shard.compute(send(tokens, 0), local, send(weights, 0))
        sums = _where(arrived, sums, 0)
        sums = _where(sent, _exchange(shard, sums, most, back), 0)
        return jnp.zeros_like(tokens, sums.dtype).at[token].add(sums), None

    def rows_sent(self, sizes: Sizes, size: int) -> float:
        """As `AbstractExchange.rows_sent`."""
        return sizes.destinations(size) * (size - 1) / size

    def rows_held(self, sizes: Sizes, size: int) -> tuple[int, int]:
        """As `AbstractExchange.rows_held`."""
        sent = min(size, sizes.experts_per_token) if size > 1 else 0  # one device keeps its tokens
        return sizes.tokens * sent, size * sizes.tokens


def _starts(sizes: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    return jnp.cumsum(sizes, axis, dtype=jnp.int32) - sizes


def _where(live: Array, rows: Array, fill: int) -> Array:
    return jnp.where(live[:, None], rows, fill)


def _exchange(shard: Shard, rows: Array, num_rows: int, offsets: tuple[Array, ...]) -> Array:
    """`num_rows` rows, of which those that the offsets name are written."""
    # Like the rows: the result takes its type from the buffer, and would pass for replicated.
    buffer = jax.lax.full_like(rows, 0, shape=(num_rows, *rows.shape[1:]))
    return jax.lax.platform_dependent(
        *(rows, buffer, *offsets),
        cpu=partial(emulated, axis_name=shard.axis),
        default=partial(jax.lax.ragged_all_to_all, axis_name=shard.axis),
    )


def emulated(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: str,
) -> Array:
    """`jax.lax.ragged_all_to_all` by all-gather, for tests on a CPU."""
    del recv_sizes
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        jax.lax.all_gather(array, axis_name)
        for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    starts, sizes, targets = (array[:, me] for array in (starts, sizes, targets))
    row = jnp.arange(output.shape[0], dtype=jnp.int32)
    inside = (row[:, None] >= targets[None]) & (row[:, None] < (targets + sizes)[None])
    source = jnp.argmax(inside, axis=1)
    position = starts[source] + row - targets[source]
    rows = operands.at[source, position].get(mode="clip")
    written = inside.any(axis=1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(written, rows, output)

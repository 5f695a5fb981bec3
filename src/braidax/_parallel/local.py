"""The experts of one device on the tokens that reached it.

Most of those tokens may belong to other devices' experts, so the assignments that are this
device's own are counted first and computed in chunks of an even share: work follows their number,
and memory is that of one chunk whatever the skew. Nothing is kept for the backward pass but the
inputs; each chunk is recomputed there.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._experts import GroupedMatmul
from .._experts.grouped_matmul import accumulation_dtype


class _Own(NamedTuple):
    """The assignments (token * experts_per_token + slot) sorted by local expert, others last, and
    where each expert's begin and end."""

    order: Int[Array, " assignments"]
    edges: Int[Array, " edges"]


def local_experts(
    experts: eqx.Module,
    grouped_matmul: GroupedMatmul,
    tokens: Float[Array, "tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
    *,
    num_experts: int,
    chunk: int,
) -> Float[Array, "tokens hidden"]:
    """Each token's weighted sum over the local experts it names, in float32 or wider.

    An index of `num_experts` names nobody. Differentiable once, in reverse mode. `chunk` is the
    number of assignments computed at a time.
    """
    count = indices.size
    chunk = min(chunk, count)
    if count == 0:
        return jnp.zeros_like(tokens, accumulation_dtype(tokens))
    positions = jnp.arange(count, dtype=jnp.int32)
    ids, order = jax.lax.sort((indices.reshape(-1), positions), num_keys=1, is_stable=True)
    edges = jnp.searchsorted(ids, jnp.arange(num_experts + 1, dtype=ids.dtype))
    # A slice of the last chunk must not be moved back by the end of the array.
    own = _Own(jnp.pad(order, (0, chunk)), edges.astype(jnp.int32))
    trained, rest = eqx.partition(experts, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)
    run = _chunked(static, grouped_matmul, chunk)
    return run(tokens, weights.reshape(-1), trained, arrays, own)


def _chunked(static: PyTree, grouped_matmul: GroupedMatmul, chunk: int):
    """`run(tokens, weights, trained, arrays, own)` with its derivative."""

    @jax.custom_vjp
    def run(tokens, weights, trained, arrays, own):
        output = jnp.zeros_like(tokens, accumulation_dtype(tokens))

        def step(i, output):
            assignment, token, sizes = _at(own, i, chunk, weights.size, tokens.shape[0])
            rows, scales = _take(tokens, token), _take(weights, assignment)
            experts = eqx.combine(trained, arrays, static)
            rows = _weighted(experts(rows, sizes, grouped_matmul), scales)
            return output.at[token].add(rows.astype(output.dtype), mode="drop")

        return jax.lax.fori_loop(0, _num_chunks(own, chunk), step, output)

    def forward(*arguments):
        return run(*arguments), arguments

    def backward(arguments, cotangent):
        tokens, weights, trained, arrays, own = arguments

        def wide(array):
            return jnp.zeros_like(array, accumulation_dtype(array))

        def step(i, sums):
            d_tokens, d_weights, d_trained = sums
            assignment, token, sizes = _at(own, i, chunk, weights.size, tokens.shape[0])
            unused: list[bool] = []

            def compute(rows, scales, trained, sums):
                summing, left = _summing(grouped_matmul, trained, sums)
                rows = eqx.combine(trained, arrays, static)(rows, sizes, summing)
                unused.extend(id(leaf) in left for leaf in jax.tree.leaves(trained))
                return _weighted(rows, scales)

            operands = (_take(tokens, token), _take(weights, assignment), trained, d_trained)
            rows, transpose = jax.vjp(compute, *operands)
            pulled = transpose(_take(cotangent, token).astype(rows.dtype))
            d_rows, d_scales, d_new, summed = pulled
            leaves, tree = jax.tree.flatten(summed)
            before = jax.tree.leaves(d_trained)
            chosen = zip(unused, before, leaves, strict=True)
            summed = tree.unflatten([old if alone else new for alone, old, new in chosen])
            return (
                d_tokens.at[token].add(d_rows.astype(d_tokens.dtype), mode="drop"),
                d_weights.at[assignment].set(d_scales.astype(d_weights.dtype), mode="drop"),
                # Zeros, but for weights that did not go into a product as they are.
                jax.tree.map(jnp.add, summed, d_new),
            )

        differentiated = (tokens, weights, trained)
        sums = jax.lax.fori_loop(
            0, _num_chunks(own, chunk), step, jax.tree.map(wide, differentiated)
        )
        narrow = jax.tree.map(lambda total, array: total.astype(array.dtype), sums, differentiated)
        return *narrow, None, None

    run.defvjp(forward, backward)
    return run


def _summing(
    grouped_matmul: GroupedMatmul, trained: PyTree, sums: PyTree
) -> tuple[GroupedMatmul, dict]:
    """`grouped_matmul` that adds the gradients of `trained` to their running `sums`, each where
    that weight is first used; and the sums by the identity of their weight, less those used."""
    left = dict(zip(map(id, jax.tree.leaves(trained)), jax.tree.leaves(sums), strict=True))

    into = grouped_matmul.into
    if into is None:
        return grouped_matmul, left

    def multiply(rows, weight, group_sizes, transposed):
        if id(weight) not in left:
            return grouped_matmul.multiply(rows, weight, group_sizes, transposed)
        total = left.pop(id(weight))
        return into.multiply(rows, weight, group_sizes, total, transposed)

    def feed_forward(rows, up, down, group_sizes, activation):
        if up is down or not {id(up), id(down)} <= left.keys():
            return grouped_matmul.feed_forward(rows, up, down, group_sizes, activation)
        totals = (left.pop(id(up)), left.pop(id(down)))
        return into.feed_forward(rows, up, down, group_sizes, totals, activation)

    return GroupedMatmul(multiply, feed_forward), left


def _weighted(rows: Array, weights: Array) -> Array:
    """The experts' outputs times the weights; rows past the sizes are 0."""
    return rows * weights[:, None].astype(rows.dtype)


def _num_chunks(own: _Own, chunk: int) -> Int[Array, ""]:
    return -(-own.edges[-1] // chunk)


def _at(own: _Own, i: Array, chunk: int, num_assignments: int, num_tokens: int):
    """`(assignments, tokens, group sizes)` of chunk `i`. Rows that are not this device's point past
    the ends of the arrays: they read 0 and write nothing."""
    start = i * chunk
    live = start + jnp.arange(chunk, dtype=jnp.int32) < own.edges[-1]
    assignment = jax.lax.dynamic_slice_in_dim(own.order, start, chunk)
    token = assignment // (num_assignments // num_tokens)
    edges = jnp.clip(own.edges, start, start + chunk)
    return (
        jnp.where(live, assignment, num_assignments),
        jnp.where(live, token, num_tokens),
        jnp.diff(edges),
    )


def _take(array: Array, index: Int[Array, " rows"]) -> Array:
    return array.at[index].get(mode="fill", fill_value=0)

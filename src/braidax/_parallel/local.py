"""The experts of one device on the tokens that reached it.

Most of those tokens may belong to other devices' experts. So the assignments that are this
device's own are counted first, and computed in chunks of an even share. Work follows their number,
and memory is that of one chunk whatever the skew. Nothing is kept for the backward pass but the
inputs; each chunk is recomputed there. One chunk that holds all assignments is a `SortedDispatch`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._dispatch import plan_rows, weighted_sum
from .._experts import AbstractExperts
from .._matmul import GroupedMatmul, accumulation_dtype


class _Own(NamedTuple):
    """The assignments (token * experts_per_token + slot) sorted by local expert, all others last,
    and where each expert's begin and end."""

    order: Int[Array, " assignments"]
    edges: Int[Array, " edges"]


def local_experts(
    experts: AbstractExperts,
    matmul: GroupedMatmul,
    tokens: Float[Array, "tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
    *,
    num_experts: int,
    chunk: int,
) -> Float[Array, "tokens hidden"]:
    """Each token's weighted sum over the local experts it names, in float32 or wider.

    An index of `num_experts` names nobody. `chunk` is the number of assignments computed at a time.
    If there are more, the sum is differentiable once, in reverse mode.
    """
    count = indices.size
    if count <= chunk:
        options = {"num_experts": num_experts}
        return weighted_sum(experts.call_scaled, matmul, tokens, indices, weights, **options)
    plan = plan_rows(indices.reshape(-1), num_experts)
    edges = jnp.pad(jnp.cumsum(plan.group_sizes, dtype=jnp.int32), (1, 0))
    # A slice of the last chunk must not be moved back by the end of the array.
    own = _Own(jnp.pad(plan.order, (0, chunk)), edges)
    trained, rest = eqx.partition(experts, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)
    run = _chunked(static, matmul, chunk)
    return run(tokens, weights.reshape(-1), trained, arrays, own)


def _chunked(static: PyTree, matmul: GroupedMatmul, chunk: int):
    """`run(tokens, weights, trained, arrays, own)` with its derivative."""

    def compute(rows, scales, trained, arrays, sizes):
        return eqx.combine(trained, arrays, static).call_scaled(rows, scales, sizes, matmul)

    @jax.custom_vjp
    def run(tokens, weights, trained, arrays, own):
        output = jnp.zeros_like(tokens, accumulation_dtype(tokens))

        def step(i, output):
            assignment, token, sizes = _at(own, i, chunk, weights.size, tokens.shape[0])
            rows = compute(_take(tokens, token), _take(weights, assignment), trained, arrays, sizes)
            return output.at[token].add(rows.astype(output.dtype), mode="drop")

        return jax.lax.fori_loop(0, -(-own.edges[-1] // chunk), step, output)

    def forward(*arguments):
        return run(*arguments), arguments

    def backward(arguments, cotangent):
        tokens, weights, trained, arrays, own = arguments

        def step(i, sums):
            d_tokens, d_weights, d_trained = sums
            assignment, token, sizes = _at(own, i, chunk, weights.size, tokens.shape[0])
            operands = (_take(tokens, token), _take(weights, assignment), trained)
            rows, transpose = jax.vjp(lambda *o: compute(*o, arrays, sizes), *operands)
            d_rows, d_scales, d_new = transpose(_take(cotangent, token).astype(rows.dtype))
            return (
                d_tokens.at[token].add(d_rows.astype(d_tokens.dtype), mode="drop"),
                d_weights.at[assignment].set(d_scales.astype(d_weights.dtype), mode="drop"),
                # A chunk's terms are of the weights' dtype: only their sum is wide.
                jax.tree.map(lambda total, new: total + new.astype(total.dtype), d_trained, d_new),
            )

        differentiated = (tokens, weights, trained)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, accumulation_dtype(leaf)), differentiated
        )
        sums = jax.lax.fori_loop(0, -(-own.edges[-1] // chunk), step, zeros)
        narrow = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, differentiated)
        return *narrow, None, None

    run.defvjp(forward, backward)
    return run


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

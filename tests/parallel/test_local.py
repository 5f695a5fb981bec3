"""The experts of one device: work and memory follow the assignments that are its own."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import HIDDEN, assert_trees_close

import braidax as bx
from braidax._backends import find_backend
from braidax._parallel.local import local_experts

LOCAL, TOKENS, SLOTS = 3, 20, 2
MATMUL = find_backend("blocks").grouped_matmul


def assignment(own):
    """Indices of which the first `own`, in a shuffled order, are of local experts."""
    generator = np.random.default_rng(0)
    indices = np.full(TOKENS * SLOTS, LOCAL, np.int32)
    places = generator.permutation(TOKENS * SLOTS)[:own]
    indices[places] = generator.integers(0, LOCAL, own)
    return jnp.asarray(indices.reshape(TOKENS, SLOTS))


class Counted(eqx.Module):
    """Experts that write down how many rows each of their calls was for."""

    scale: jax.Array
    calls: list = eqx.field(static=True)

    def __call__(self, rows, group_sizes, grouped_matmul):
        def note(size, shape=rows.shape):
            self.calls.append((int(size), shape))

        jax.debug.callback(note, group_sizes.sum())
        return rows.astype(jnp.float32) * self.scale


@pytest.mark.parametrize(
    "own, sizes", [(0, []), (3, [3]), (8, [8]), (40, [8] * 5), (19, [8, 8, 3])]
)
def test_one_call_for_each_chunk_of_own_rows(own, sizes):
    experts, tokens = Counted(jnp.ones(()), []), jnp.ones((TOKENS, HIDDEN))
    weights = jnp.ones((TOKENS, SLOTS))
    run = lambda tokens: local_experts(  # noqa: E731
        experts, MATMUL, tokens, assignment(own), weights, num_experts=LOCAL, chunk=8
    )
    output = jax.jit(run)(tokens)
    jax.effects_barrier()
    assert sorted(experts.calls, reverse=True) == [(size, (8, HIDDEN)) for size in sizes]
    np.testing.assert_array_equal(output[:, 0], (np.asarray(assignment(own)) < LOCAL).sum(1))


@functools.partial(jax.jit, static_argnames="chunk")
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def chunked(experts, tokens, weights, indices, target, *, chunk):
    output = local_experts(
        experts, MATMUL, tokens, indices, weights, num_experts=LOCAL, chunk=chunk
    )
    return jnp.sum(output * target), output


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def one_by_one(experts, tokens, weights, indices, target):
    """Every expert on every token, by einsum."""
    gate, up = jnp.split(jnp.einsum("th,eih->tei", tokens, experts.gate_up), 2, axis=-1)
    hidden = jax.nn.silu(jnp.minimum(gate, 0.4)) * jnp.clip(up, -0.4, 0.4)
    every = jnp.einsum("tei,eih->teh", hidden, experts.down)
    chosen = (indices[..., None] == jnp.arange(LOCAL)[None, None]) * weights[..., None]
    output = jnp.einsum("te,teh->th", chosen.sum(axis=1), every)
    return jnp.sum(output * target), output


@pytest.mark.parametrize("own, chunk", [(0, 7), (25, 7), (40, 7), (40, 40)])
def test_chunks_do_not_change_the_answer(own, chunk):
    keys = jax.random.split(jax.random.key(3), 4)
    experts = bx.SwiGLUExperts(LOCAL, HIDDEN, 6, limit=0.4, key=keys[0])
    tokens = jax.random.normal(keys[1], (TOKENS, HIDDEN))
    weights = jax.random.uniform(keys[2], (TOKENS, SLOTS))
    target = jax.random.normal(keys[3], (TOKENS, HIDDEN))
    arguments = (experts, tokens, weights, assignment(own), target)
    actual, desired = chunked(*arguments, chunk=chunk), one_by_one(*arguments)
    assert_trees_close(actual[0][1], desired[0][1])
    assert_trees_close(actual[1], desired[1])

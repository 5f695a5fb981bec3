"""The experts of one device: work and memory follow the assignments that are its own."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import HIDDEN, assert_trees_close, slow_but_one

import braidax as bx
from braidax._parallel.local import local_experts

LOCAL, TOKENS, SLOTS = 3, 20, 2
KERNELS = {"blocks": bx.matmul.Blocks(), "ragged": bx.matmul.Ragged()}
MATMUL = bx.GroupedMatmul(KERNELS["blocks"])


def assignment(own):
    """Indices of which the first `own`, in a shuffled order, are of local experts."""
    generator = np.random.default_rng(0)
    indices = np.full(TOKENS * SLOTS, LOCAL, np.int32)
    places = generator.permutation(TOKENS * SLOTS)[:own]
    indices[places] = generator.integers(0, LOCAL, own)
    return jnp.asarray(indices.reshape(TOKENS, SLOTS))


class Counted(bx.AbstractExperts):
    """Experts that write down how many rows each of their calls was for."""

    scale: jax.Array
    calls: list = eqx.field(static=True)

    def __call__(self, rows, group_sizes, matmul):
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


@functools.partial(jax.jit, static_argnames=("chunk", "kernel"))
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def chunked(experts, tokens, weights, indices, target, *, chunk, kernel="blocks"):
    matmul = bx.GroupedMatmul(KERNELS[kernel])
    output = local_experts(
        experts, matmul, tokens, indices, weights, num_experts=LOCAL, chunk=chunk
    )
    return jnp.sum(output * target), output


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def one_by_one(experts, tokens, weights, indices, target):
    """Every expert on every token, by einsum."""
    gate, up = (
        jnp.einsum("th,eih->tei", tokens, experts.gate_up[:, part], precision="highest")
        for part in range(2)
    )
    hidden = jax.nn.silu(jnp.minimum(gate, 0.4)) * jnp.clip(up, -0.4, 0.4)
    every = jnp.einsum("tei,eih->teh", hidden, experts.down)
    chosen = (indices[..., None] == jnp.arange(LOCAL)[None, None]) * weights[..., None]
    output = jnp.einsum("te,teh->th", chosen.sum(axis=1), every)
    return jnp.sum(output * target), output


def arguments_for(own, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 4)
    clamped = {"activation": bx.activations.swiglu(0.4)}
    experts = bx.Experts(LOCAL, HIDDEN, 6, **clamped, dtype=dtype, key=keys[0])
    tokens = jax.random.normal(keys[1], (TOKENS, HIDDEN), dtype)
    weights = jax.random.uniform(keys[2], (TOKENS, SLOTS))
    target = jax.random.normal(keys[3], (TOKENS, HIDDEN))
    return experts, tokens, weights, assignment(own), target


@pytest.mark.parametrize("own, chunk", [(0, 7), (25, 7), (40, 7), (40, 40)])
def test_chunks_do_not_change_the_answer(own, chunk):
    arguments = arguments_for(own)
    actual, desired = chunked(*arguments, chunk=chunk), one_by_one(*arguments)
    assert_trees_close(actual[0][1], desired[0][1])
    assert_trees_close(actual[1], desired[1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_gradients_are_near_whatever_the_chunks(kernel):
    arguments = arguments_for(40, jnp.bfloat16)
    (_, (actual, _, _)), (_, (whole, _, _)) = (
        chunked(*arguments, chunk=chunk, kernel=kernel) for chunk in (5, 40)
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments[:2])
    _, (desired, _, _) = one_by_one(*wide, *arguments[2:])
    for one, other, exact in zip(*map(jax.tree.leaves, (actual, whole, desired)), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        scale = np.abs(exact).max()
        # A chunk's terms are rounded, then their float32 sum: its neighbour at the most.
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=2**-9 * scale)
        # The cotangent between the products is rounded to bfloat16 as well: a few 2**-9.
        np.testing.assert_allclose(one, exact, rtol=0, atol=2**-7 * scale)


class Linear(bx.AbstractExperts):
    weight: jax.Array

    def __call__(self, rows, group_sizes, matmul):
        return matmul(rows, self.weight, group_sizes)


def test_many_small_terms_are_not_lost_in_bfloat16():
    """600 chunks add 1 each. A sum in bfloat16 would stop at 256, whose next number is 258."""
    experts = Linear(jnp.ones((LOCAL, 2, 2), jnp.bfloat16))
    tokens, scales = jnp.ones((300, 2), jnp.bfloat16), jnp.ones((300, SLOTS))
    indices, target = jnp.zeros((300, SLOTS), jnp.int32), jnp.ones((300, 2))
    _, (gradient, _, _) = chunked(experts, tokens, scales, indices, target, chunk=1)
    np.testing.assert_array_equal(gradient.weight[0], 600)
    assert not gradient.weight[1:].any()


class Tied(bx.AbstractExperts):
    """A weight that goes into two products, and one that goes into none as it is."""

    tied: jax.Array
    scaled: jax.Array

    def __call__(self, rows, group_sizes, matmul):
        inner = matmul(rows, self.tied, group_sizes, transposed=True)
        outer = matmul(jnp.sin(inner), self.tied, group_sizes)
        return outer + matmul(rows, 2 * self.scaled, group_sizes, transposed=True)


def test_gradients_of_weights_that_are_shared_or_changed_first():
    keys = jax.random.split(jax.random.key(4), 2)
    weights = [jax.random.normal(key, (LOCAL, HIDDEN, HIDDEN)) / 4 for key in keys]
    experts, (_, tokens, scales, indices, target) = Tied(*weights), arguments_for(25)

    def loss(experts):
        """Every expert on every token, by einsum."""
        inner = jnp.sin(jnp.einsum("th,eih->tei", tokens, experts.tied))
        every = jnp.einsum("tei,eih->teh", inner, experts.tied)
        every += 2 * jnp.einsum("th,eih->tei", tokens, experts.scaled)
        chosen = (indices[..., None] == jnp.arange(LOCAL)[None, None]) * scales[..., None]
        return jnp.sum(jnp.einsum("te,teh->th", chosen.sum(axis=1), every) * target)

    _, (actual, _, _) = chunked(experts, tokens, scales, indices, target, chunk=7)
    assert_trees_close(actual, jax.grad(loss)(experts))


# In stacks of the experts' weights. With so few rows the forward pass copies four experts at a
# time in float32, 4/3 of this stack of three. The backward pass holds the float32 gradients of one
# chunk; their sum is the output, or a float32 sum that bfloat16 is rounded from.
@pytest.mark.parametrize("dtype, stacks", slow_but_one([(jnp.float32, 2), (jnp.bfloat16, 5)]))
def test_the_backward_pass_holds_one_chunks_gradients_beside_their_sum(dtype, stacks):
    _, _, scales, indices, _ = arguments_for(25)
    experts = bx.Experts(LOCAL, 128, 512, dtype=dtype, key=jax.random.key(5))
    tokens = jnp.ones((TOKENS, 128), dtype)
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    for chunk in (7, 2):  # 6 chunks and 20: as much for any number of them
        lowered = chunked.lower(experts, tokens, scales, indices, tokens, chunk=chunk)
        memory = lowered.compile().memory_analysis()
        assert memory.output_size_in_bytes > stack
        assert memory.temp_size_in_bytes < stacks * stack

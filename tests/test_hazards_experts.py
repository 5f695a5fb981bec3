"""Hazards 30 to 37: who may touch whom between tokens, experts and weights, on every backend."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EXPERTS, ROUTERS, SLOTS, assert_close, make_inputs
from hazard_inputs import (
    BACKEND_NAMES,
    LAYERS,
    TOKENS,
    index_tables,
    layer,
    output_and_gradients,
    random_tokens,
    seeds,
    token_positions,
)
from hypothesis import given
from hypothesis import strategies as st

import braidax as bx

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
every_kind = pytest.mark.parametrize("kind", ROUTERS)
every_layer = pytest.mark.parametrize(("kind", "backend"), LAYERS)
# Every expert of the dense backend computes every token: 0 * NaN reaches their gradients.
every_isolating_backend = pytest.mark.parametrize("backend", ["blocks", "ragged"])
permutations = st.permutations(range(TOKENS)).map(np.array)
LIMIT = 0.4


def changed_experts(block, change):
    where = lambda b: (b.experts.gate_up, b.experts.down)  # noqa: E731
    return eqx.tree_at(where, block, tuple(change(a) for a in where(block)))


@pytest.mark.hazard(30, "any assignment equals the loop over tokens: values and all gradients")
@every_backend
@given(index_tables, seeds)
def test_any_assignment_against_the_oracle(backend, indices, seed):
    """Duplicates in a row included: values and all four gradients."""
    block = layer("top_k", backend).routed
    tokens, weights, cotangent = random_tokens(seed)
    got = output_and_gradients(block, tokens, indices, weights, cotangent)
    matrices = (np.asarray(a, np.float64) for a in (block.experts.gate_up, block.experts.down))
    want = oracle.block_and_gradients(
        tokens.astype(np.float64), indices, weights.astype(np.float64), *matrices, LIMIT, cotangent
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.hazard(31, "an expert named twice counts with both weights: values and gradients")
@every_backend
@given(seeds, st.permutations(range(EXPERTS)))
def test_an_expert_named_twice_is_the_expert_with_both_weights(backend, seed, experts):
    first, second, third = experts[:3]
    tokens, weights, cotangent = random_tokens(seed)
    twice = np.tile(np.array([first, first, second], np.int32), (TOKENS, 1))
    once = np.tile(np.array([first, third, second], np.int32), (TOKENS, 1))
    together = np.stack([weights[:, 0] + weights[:, 1], 0 * weights[:, 1], weights[:, 2]], axis=1)
    block = layer("top_k", backend).routed
    got = output_and_gradients(block, tokens, twice, weights, cotangent)
    want = output_and_gradients(block, tokens, once, together, cotangent)
    for k in (0, 1, 3, 4):
        assert_close(got[k], want[k])
    assert_close(got[2], want[2][:, [0, 0, 2]])


@pytest.mark.hazard(
    32, "the gradient of an empty expert is exactly 0, for every pattern of empty ones"
)
@every_backend
def test_every_pattern_of_empty_experts_has_exactly_zero_gradient(backend):
    rng = np.random.default_rng(0)
    patterns = itertools.product([False, True], repeat=EXPERTS)
    for used in (np.flatnonzero(pattern) for pattern in patterns if any(pattern)):
        indices = rng.choice(used, (TOKENS, SLOTS)).astype(np.int32)
        indices.reshape(-1)[: len(used)] = used
        tokens, weights, cotangent = random_tokens(len(used))
        results = output_and_gradients(
            layer("top_k", backend).routed, tokens, indices, weights, cotangent
        )
        for gradient in results[3:]:
            filled = np.flatnonzero(gradient.reshape(EXPERTS, -1).any(axis=1))
            np.testing.assert_array_equal(filled, used)


@pytest.mark.hazard(
    33,
    "a NaN or infinite token reaches itself and the experts it uses",
    exception="dense, backward",
)
@every_isolating_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@given(index_tables, seeds, token_positions)
def test_a_broken_token_reaches_itself_and_its_experts(backend, bad, indices, seed, position):
    tokens, weights, cotangent = random_tokens(seed)
    block = layer("top_k", backend).routed
    tokens[position] = 0
    clean = output_and_gradients(block, tokens, indices, weights, cotangent)
    tokens[position] = bad
    broken = output_and_gradients(block, tokens, indices, weights, cotangent)
    others = np.arange(TOKENS) != position
    for got, want in zip(broken[:3], clean[:3], strict=True):
        np.testing.assert_array_equal(got[others], want[others])
    unused = np.setdiff1d(np.arange(EXPERTS), indices[position])
    for got, want in zip(broken[3:], clean[3:], strict=True):
        np.testing.assert_array_equal(got[unused], want[unused])
    if np.isnan(bad):
        assert np.isnan(broken[0][position]).all()


@pytest.mark.hazard(33)
def test_the_dense_backend_isolates_a_broken_token_forward_only():
    """What its docstring says; the table of hazards carries the exception."""
    indices = np.arange(TOKENS * SLOTS, dtype=np.int32).reshape(TOKENS, SLOTS) % 3
    tokens, weights, cotangent = random_tokens(0)
    block = layer("top_k", "dense").routed
    tokens[2] = 0
    clean = output_and_gradients(block, tokens, indices, weights, cotangent)
    tokens[2] = np.nan
    broken = output_and_gradients(block, tokens, indices, weights, cotangent)
    others = np.arange(TOKENS) != 2
    np.testing.assert_array_equal(broken[0][others], clean[0][others])
    assert np.isnan(broken[3][4]).all()  # Expert 4 is used by no token.


@eqx.filter_jit
def call(block, hidden_states, input_ids, mask=None):
    return block(hidden_states, input_ids, mask=mask)[0]


@pytest.mark.hazard(33)
@every_layer
def test_a_broken_hidden_state_changes_no_other_token_of_the_layer(kind, backend):
    block = layer(kind, backend)
    hidden_states, input_ids = make_inputs((TOKENS,))
    clean = np.asarray(call(block, hidden_states, input_ids))
    others = np.arange(TOKENS) != 3
    for bad in (np.nan, np.inf, -np.inf):
        output = np.asarray(call(block, hidden_states.at[3].set(bad), input_ids))
        np.testing.assert_array_equal(output[others], clean[others])
    assert np.isnan(np.asarray(call(block, hidden_states.at[3].set(np.nan), input_ids))[3]).all()


@pytest.mark.hazard(
    34,
    "a NaN in one expert's weights reaches the tokens that use it",
    exception="ragged on a CPU; dense, backward",
)
@given(index_tables, seeds, st.integers(0, EXPERTS - 1), st.sampled_from([np.nan, np.inf]))
def test_a_broken_expert_reaches_its_tokens_only(indices, seed, expert, bad):
    """On the default backend, bit for bit; `test_moe.py` says what the others do."""
    tokens, weights, cotangent = random_tokens(seed)
    block = layer("top_k").routed
    clean = output_and_gradients(block, tokens, indices, weights, cotangent)
    broken = changed_experts(block, lambda a: a.at[expert, ..., 2, :].set(bad))
    got = output_and_gradients(broken, tokens, indices, weights, cotangent)
    free = ~(indices == expert).any(axis=1)
    for a, b in zip(got[:3], clean[:3], strict=True):
        np.testing.assert_array_equal(a[free], b[free])
    others = np.arange(EXPERTS) != expert
    for a, b in zip(got[3:], clean[3:], strict=True):
        assert np.isfinite(a[others]).all()
        unshared = np.setdiff1d(np.flatnonzero(others), indices[~free])
        np.testing.assert_array_equal(a[unshared], b[unshared])


@pytest.mark.hazard(35, "padding that holds NaN: output 0, every gradient finite, not counted")
@every_layer
def test_padding_that_holds_nan_reaches_no_gradient(kind, backend):
    """Of the gate, the experts, the shared expert and every token, ids out of range included."""
    block = layer(kind, backend)
    hidden_states, input_ids = make_inputs((TOKENS,))
    mask = jnp.arange(TOKENS) < 5

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(inputs, input_ids):
        block, hidden_states = inputs
        output, routing = block(hidden_states, input_ids, mask=mask)
        return jnp.sum(jnp.sin(output)), (output, routing.indices, bx.expert_load(routing))

    clean = run((block, jnp.where(mask[:, None], hidden_states, 0)), input_ids)
    dirty_states = jnp.where(mask[:, None], hidden_states, jnp.nan)
    dirty = run((block, dirty_states), jnp.where(mask, input_ids, -1))
    for got, want in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        assert np.isfinite(np.asarray(got)).all()
    (_, (output, indices, load)), (_, gradient) = dirty
    assert not np.asarray(output)[5:].any() and not np.asarray(gradient)[5:].any()
    nobody = np.asarray(indices) == EXPERTS
    assert nobody[5:].all() and not nobody[:5].any()
    assert int(load.sum()) == 5 * SLOTS


@pytest.mark.hazard(
    36, "the order of tokens, the split of a batch, the labels of experts change nothing"
)
@every_kind
@given(permutations, seeds)
def test_the_order_of_the_tokens_changes_nothing(kind, order, seed):
    block = layer(kind)
    _, input_ids = make_inputs((TOKENS,))
    hidden_states = jnp.asarray(random_tokens(seed)[0])
    output = np.asarray(call(block, hidden_states, input_ids))
    shuffled = np.asarray(call(block, hidden_states[order], input_ids[order]))
    np.testing.assert_array_equal(shuffled, output[order])


@pytest.mark.hazard(36)
@every_kind
@given(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS), seeds)
def test_the_split_of_a_batch_changes_nothing(kind, first, seed):
    """The two parts of a batch, each with the other one masked, are the batch."""
    block = layer(kind)
    _, input_ids = make_inputs((TOKENS,))
    hidden_states, first = jnp.asarray(random_tokens(seed)[0]), jnp.asarray(first)
    whole = call(block, hidden_states, input_ids, jnp.ones(TOKENS, bool))
    parts = [call(block, hidden_states, input_ids, mask) for mask in (first, ~first)]
    np.testing.assert_array_equal(np.asarray(parts[0] + parts[1]), np.asarray(whole))


@pytest.mark.hazard(36)
@every_backend
@given(index_tables, seeds, st.permutations(range(EXPERTS)).map(np.array))
def test_the_labels_of_the_experts_change_nothing(backend, indices, seed, labels):
    """Expert e becomes labels[e]."""
    tokens, weights, cotangent = random_tokens(seed)
    block = layer("top_k", backend).routed
    got = output_and_gradients(block, tokens, indices, weights, cotangent)
    relabelled = changed_experts(block, lambda a: a[np.argsort(labels)])
    new = output_and_gradients(
        relabelled, tokens, labels[indices].astype(np.int32), weights, cotangent
    )
    for a, b in zip(got[:3], new[:3], strict=True):
        assert_close(a, b)
    for a, b in zip(got[3:], new[3:], strict=True):
        assert_close(a, b[labels])


@pytest.mark.hazard(37, "the output is linear in the weights; weights of 0 give 0")
@every_backend
@given(index_tables, seeds, st.floats(-8, 8, width=32))
def test_the_output_is_linear_in_the_weights(backend, indices, seed, factor):
    tokens, weights, cotangent = random_tokens(seed)
    others = random_tokens(seed + 1)[1]
    block = layer("top_k", backend).routed
    run = lambda w: output_and_gradients(block, tokens, indices, w, cotangent)[0]  # noqa: E731
    assert_close(run(weights + np.float32(factor) * others), run(weights) + factor * run(others))
    weights[2] = 0
    assert not run(weights)[2].any()

"""Hazards 14 to 16: ids out of range, no tokens, odd sizes. Defined answers, or `checks=True`."""

import os
import pathlib
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    ROUTERS,
    VOCAB,
    assert_close,
    make_dispatch,
    make_inputs,
)
from hazard_inputs import BACKEND_NAMES, LAYERS, TOKENS, layer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import braidax as bx

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
every_kind = pytest.mark.parametrize("kind", ROUTERS)
any_int32 = st.integers(-(2**31), 2**31 - 1)
ids_in_and_out = arrays(np.int32, TOKENS, elements=st.integers(0, VOCAB + 1) | any_int32)


@eqx.filter_jit
def call(block, hidden_states, input_ids, mask=None):
    return block(hidden_states, input_ids, mask=mask)


# --- ids out of range -------------------------------------------------------------------------


@pytest.mark.hazard(
    14, "an id outside the table: NaN for its token, no other bit; an error with checks=True"
)
@every_backend
@given(ids_in_and_out)
def test_ids_outside_the_table_poison_their_tokens_only(backend, ids):
    block = layer("hash", backend)
    hidden_states, _ = make_inputs((TOKENS,))
    known = (ids >= 0) & (ids < VOCAB)
    clean, clean_routing = call(block, hidden_states, jnp.asarray(np.where(known, ids, 3)))
    output, routing = call(block, hidden_states, jnp.asarray(ids))
    for got, want in ((output, clean), (routing.weights, clean_routing.weights)):
        got, want = np.asarray(got), np.asarray(want)
        assert np.isnan(got[~known]).all()
        np.testing.assert_array_equal(got[known], want[known])


@pytest.mark.hazard(7)
def test_a_table_replaced_by_one_of_other_experts_poisons_its_tokens_only():
    block = layer("hash")
    where = lambda b: b.routed.router.table  # noqa: E731
    hidden_states, _ = make_inputs((TOKENS,))
    ids = jnp.arange(TOKENS)
    clean, _ = call(block, hidden_states, ids)
    for bad in (-1, EXPERTS, 255):
        broken = eqx.tree_at(where, block, where(block).at[5, 1].set(bad))
        output, routing = call(broken, hidden_states, ids)
        others = np.arange(TOKENS) != 5
        assert np.isnan(np.asarray(output[5])).all()
        assert 0 <= int(routing.indices.min()) and int(routing.indices.max()) < EXPERTS
        np.testing.assert_array_equal(np.asarray(output)[others], np.asarray(clean)[others])


UNDEFINED = "A token has no experts: .*`input_ids`.*`routing.indices`.*a score is NaN"


def checked(kind="hash"):
    block = layer(kind)
    routed = bx.RoutedMoE(block.routed.router, block.routed.experts, checks=True)
    return bx.RoutedAndSharedMoE(routed, block.shared)


def by_scan(block, hidden_states, input_ids):
    def step(carry, token):
        return carry, block(*token)[0]

    return jax.lax.scan(step, 0.0, (hidden_states, input_ids))[1]


def gradient(block, hidden_states, input_ids):
    return eqx.filter_grad(lambda b: jnp.sum(b(hidden_states, input_ids)[0]))(block)


CALLS = {
    "eager": lambda block, *inputs: block(*inputs)[0],
    "jit": eqx.filter_jit(lambda block, *inputs: block(*inputs)[0]),
    "vmap": eqx.filter_jit(lambda block, *inputs: jax.vmap(block)(*inputs)[0]),
    "scan": eqx.filter_jit(by_scan),
    "grad": eqx.filter_jit(gradient),
}


@pytest.mark.hazard(14)
@pytest.mark.parametrize("name", CALLS)
def test_checks_raise_for_an_id_outside_the_table(name):
    hidden_states, input_ids = make_inputs((TOKENS,))
    with pytest.raises(RuntimeError, match=UNDEFINED):
        jax.block_until_ready(CALLS[name](checked(), hidden_states, input_ids.at[2].set(VOCAB)))


@pytest.mark.hazard(14)
@every_kind
def test_checks_raise_for_a_replayed_index_of_no_expert(kind):
    block = checked(kind)
    hidden_states, input_ids = make_inputs((TOKENS,))
    _, routing = call(layer(kind), hidden_states, input_ids)
    again = eqx.filter_jit(lambda routing: block(hidden_states, routing=routing)[0])

    def replaced(index):
        indices = routing.indices.at[2, 1].set(index)
        return eqx.tree_at(lambda r: r.indices, routing, indices)

    for index in (-1, EXPERTS + 1):
        with pytest.raises(RuntimeError, match=UNDEFINED):
            jax.block_until_ready(again(replaced(index)))
    assert np.isfinite(np.asarray(again(routing))).all()
    # Nobody is an answer: the same as an expert of weight 0.
    without = eqx.tree_at(lambda r: r.weights, routing, routing.weights.at[2, 1].set(0))
    assert_close(again(replaced(EXPERTS)), again(without))


@pytest.mark.hazard(14)
@every_kind
def test_checks_raise_for_a_score_of_nan(kind):
    """Of either router, and of no masked token."""
    hidden_states, input_ids = make_inputs((TOKENS,))
    broken = hidden_states.at[2].set(jnp.nan)
    with pytest.raises(RuntimeError, match=UNDEFINED):
        jax.block_until_ready(call(checked(kind), broken, input_ids))
    output, _ = call(checked(kind), broken, input_ids, jnp.arange(TOKENS) != 2)
    assert np.isfinite(np.asarray(output)).all()


@pytest.mark.hazard(14)
@every_kind
def test_checks_change_nothing_else(kind):
    hidden_states, input_ids = make_inputs((TOKENS,))
    mask = jnp.arange(TOKENS) != 2
    # Padding may hold any id, and a router by score looks at none.
    ids = input_ids.at[2].set(-1) if kind == "hash" else input_ids - 100
    got = call(checked(kind), hidden_states, ids, mask)
    want = call(layer(kind), hidden_states, ids, mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.isfinite(np.asarray(got[0])).all()
    empty = call(checked(kind), hidden_states[:0], ids[:0])[0]
    assert empty.shape == (0, HIDDEN)


NAN_ON_ERROR = """
import equinox as eqx, jax, jax.numpy as jnp, braidax as bx
from test_hazards_run_time import TOKENS, call, checked, make_inputs
hidden_states, input_ids = make_inputs((TOKENS,))
output, routing = call(checked(), hidden_states, input_ids.at[2].set(99))
assert jnp.isnan(routing.weights).all() and jnp.isnan(output).all()
output, routing = call(checked(), hidden_states, input_ids)
assert jnp.isfinite(output).all()
broken = eqx.tree_at(lambda r: r.indices, routing, routing.indices.at[2, 1].set(99))
assert jnp.isnan(checked()(hidden_states, routing=broken)[0]).all()
print("NaN, and never a wrong expert")
"""


@pytest.mark.hazard(14)
def test_checks_give_nan_where_equinox_is_told_to():
    """Attached to integers, the error would become the largest one and the last row's experts."""
    folder = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "EQX_ON_ERROR": "nan", "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", NAN_ON_ERROR], env=environment, capture_output=True, text=True
    )
    assert run.stdout == "NaN, and never a wrong expert\n", run.stderr


# --- no tokens, odd sizes ---------------------------------------------------------------------


@pytest.mark.hazard(15, "no tokens: empty output, zero counts and gradients, finite statistics")
@pytest.mark.hazard(42)
@pytest.mark.parametrize(("kind", "backend"), LAYERS)
def test_no_tokens(kind, backend):
    block = layer(kind, backend)
    hidden_states = jnp.zeros((2, 0, HIDDEN))
    ids = jnp.zeros((2, 0), jnp.int32)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(inputs):
        block, hidden_states = inputs
        output, routing = block(hidden_states, ids)
        loss = bx.sequence_balance_loss(routing) + bx.router_z_loss(routing)
        return jnp.sum(output) + loss, (output, routing)

    (value, (output, routing)), gradients = run((block, hidden_states))
    assert float(value) == 0.0 and output.shape == hidden_states.shape
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
    load = bx.expert_load(routing)
    statistics = (bx.max_violation(load), bx.load_entropy(load), bx.dead_experts(load))
    assert [float(value) for value in statistics] == [0.0, 0.0, EXPERTS]
    assert eqx.tree_equal(bx.rebalance(block, routing, 0.5), block)


@pytest.mark.hazard(16, "one expert, all experts, one token, odd sizes, any number of axes")
@every_kind
@pytest.mark.parametrize("shape", [(7,), (13, 7), (1, 13, 7), (13, 1, 1, 7)])
def test_any_number_of_axes_and_odd_sizes(kind, shape):
    """13 tokens and 7 x 13 weights, a multiple of no block."""
    keys = jax.random.split(jax.random.key(4), 3)
    sizes, experts = (7, 3, 2), bx.Experts(3, 7, 13, key=keys[0])
    if kind == "hash":
        router = bx.HashRouter(*sizes, table=bx.hash_tables.md5(40, 3, 2), key=keys[1])
    else:
        router = bx.TopKRouter(*sizes, key=keys[1])
    hidden_states = jax.random.normal(keys[2], shape)
    ids = jnp.arange(hidden_states.size // 7, dtype=jnp.int32).reshape(shape[:-1])
    output, routing = call(bx.RoutedMoE(router, experts), hidden_states, ids)
    assert output.shape == shape and routing.indices.shape == (*shape[:-1], 2)
    want = oracle.routed(
        np.asarray(hidden_states, np.float64).reshape(-1, 7),
        np.asarray(routing.indices).reshape(-1, 2),
        np.asarray(routing.weights, np.float64).reshape(-1, 2),
        np.asarray(experts.gate_up, np.float64),
        np.asarray(experts.down, np.float64),
        None,
    )
    assert_close(output, want.reshape(shape))


@pytest.mark.hazard(16)
@every_backend
def test_as_many_experts_per_token_as_experts_and_one_of_each(backend):
    """E = K = 1: the weight is the scaling factor, whatever the score."""
    for kind in ROUTERS:
        router = {
            "top_k": lambda: bx.TopKRouter(HIDDEN, 1, 1, scaling_factor=2.5, key=jax.random.key(0)),
            "hash": lambda: bx.HashRouter(
                HIDDEN,
                1,
                1,
                table=np.zeros((VOCAB, 1), np.int32),
                scaling_factor=2.5,
                key=jax.random.key(0),
            ),
        }[kind]()
        experts = bx.Experts(1, HIDDEN, INTERMEDIATE, key=jax.random.key(1))
        hidden_states, input_ids = make_inputs((1,))
        block = bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, backend))
        output, routing = call(block, hidden_states, input_ids)
        assert_close(routing.weights, [[2.5]])
        one = bx.FeedForward(HIDDEN, INTERMEDIATE, key=jax.random.key(1))
        where = lambda m: (m.gate_up, m.down)  # noqa: E731
        one = eqx.tree_at(where, one, (experts.gate_up[0], experts.down[0]))
        assert_close(output, 2.5 * one(hidden_states))

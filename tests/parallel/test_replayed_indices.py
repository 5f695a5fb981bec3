"""Chosen experts over a mesh: the answer of one device and all gradients; no token moves more."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from meshes import (
    EXCHANGES,
    EXPERTS,
    HIDDEN,
    assert_trees_close,
    loss_of,
    make_block,
    make_mesh,
    make_tokens,
    slow_but_one,
    spread,
)

import braidax as bx

SLOTS = 2  # the router of `make_block` has 3
EXCHANGES = {"data parallel": None, **EXCHANGES}
# Tokens that divide over four devices, and tokens that are padded.
CASES = slow_but_one(
    [
        ("gather", "explicit", (4, 5), "hash"),
        ("data parallel", "explicit", (3, 5), "expert_choice"),
        ("gather", "auto", (3, 5), "expert_choice"),
        ("data parallel", "auto", (4, 5), "hash"),
        ("all_to_all", "auto", (3, 5), "hash"),
        ("ragged", "explicit", (3, 5), "hash"),
    ]
)


def make_parallel(exchange, kind="auto"):
    axis = None if exchange == "data parallel" else "expert"
    return bx.ExpertParallel(make_mesh(kind), axis=axis, exchange=EXCHANGES[exchange])


def make_indices(*batch, nobody=True):
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.integers(0, EXPERTS + nobody, (*batch, SLOTS)), jnp.int32)


@eqx.filter_jit
def evaluate(model, hidden_states, target, mask, indices):
    """The loss with its routing, and the gradients of the model and of the hidden states."""

    def loss(trained):
        model, hidden_states = trained
        hidden_states = jnp.where(mask[..., None], hidden_states, 0)
        return loss_of(model, hidden_states, None, target, mask=mask, indices=indices)

    return eqx.filter_value_and_grad(loss, has_aux=True)((model, hidden_states))


def make_case(batch):
    hidden_states, _, target = make_tokens(*batch)
    mask = jnp.arange(np.prod(batch)).reshape(batch) % 4 != 1
    # Padding may name an expert that is not.
    indices = jnp.where(mask[..., None], make_indices(*batch), -1)
    return hidden_states, target, mask, indices


@functools.cache
def one_device(batch, router):
    return evaluate(make_block(router), *make_case(batch))


@pytest.mark.parametrize("exchange, kind, batch, router", CASES)
def test_a_mesh_equals_one_device(exchange, kind, batch, router):
    parallel, desired = make_parallel(exchange, kind), one_device(batch, router)
    model = parallel.shard(make_block(router))
    actual = evaluate(model, *spread(parallel, *make_case(batch)))
    assert_trees_close(actual, desired)
    assert int(actual[0][1][1].dropped) == int(desired[0][1][1].dropped) > 0
    # The gradient of the gate by itself: it is small beside the experts'.
    one, other = (
        np.asarray(gradients[0].routed.router.gate.weight) for _, gradients in (actual, desired)
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    assert np.abs(other).max() > 1e-3


@pytest.mark.parametrize("exchange", slow_but_one(["gather", "data parallel"]))
def test_what_moves_is_what_moves_without_indices(exchange):
    """Data parallel: sums over devices alone. Else the tokens, once, with as many slots."""
    parallel = make_parallel(exchange)
    block = parallel.shard(make_block(dispatch=bx.SortedDispatch()))
    place = jax.NamedSharding(parallel.mesh, jax.P(parallel.tokens))
    shapes = ((4, 64, HIDDEN), "float32"), ((4, 64, 3), "int32")
    tokens, indices = (jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes)
    arrays, static = eqx.partition(block, eqx.is_inexact_array)

    def moved(**options):
        def loss(arrays, hidden_states, options):
            return jnp.sum(jnp.sin(eqx.combine(arrays, static)(hidden_states, **options)[0]))

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(arrays, tokens, options)
        return sorted(map(repr, collectives(lowered.compile().as_text())))

    replayed = moved(indices=indices)
    assert replayed == moved()
    assert exchange != "data parallel" or all("all-reduce" in each for each in replayed)


def test_an_index_of_no_expert_and_a_nan_token_reach_themselves_alone():
    parallel = make_parallel("gather")
    model = eqx.filter_jit(parallel.shard(make_block()))
    hidden_states, indices = make_tokens(4, 5)[0], make_indices(4, 5, nobody=False)
    clean, _ = model(hidden_states, indices=indices)
    others = np.ones((4, 5), bool)
    for index, token in ((EXPERTS + 1, 1.0), (-1, 1.0), (0, jnp.nan)):
        dirty, broken = hidden_states.at[1, 2].multiply(token), indices.at[1, 2, 0].set(index)
        output, _ = model(dirty, indices=broken)
        others[1, 2] = False
        assert np.isnan(output[1, 2]).all()
        np.testing.assert_array_equal(np.asarray(output)[others], np.asarray(clean)[others])


def test_indices_of_another_shape_are_refused(unchecked):
    model = make_parallel("gather").shard(make_block())
    hidden_states, indices = make_tokens(4, 5)[0], make_indices(4, 5)
    with pytest.raises(ValueError, match=r"`indices` must have shape \(4, 5, 'experts_per_token'"):
        model(hidden_states, indices=indices[:1])
    with pytest.raises(TypeError, match="`indices` must have an integer dtype"):
        model(hidden_states, indices=indices * 1.0)
    _, routing = model(hidden_states)
    with pytest.raises(ValueError, match="`indices` must be None when `routing` is given"):
        model(hidden_states, routing=routing, indices=routing.indices)

"""All-to-all with a capacity: which assignments are lost, how many, and what is left."""

import functools
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import (
    EXPERTS,
    SLOTS,
    assert_trees_close,
    loss_of,
    make_block,
    make_mesh,
    make_tokens,
    slow_but_one,
)

import braidax as bx

TOKENS, SHARDS = 40, 4


def recount(indices, mask, *, data, size, capacity):
    """Which assignments are computed, token by token: `indices` are (tokens, slots)."""
    kept = np.zeros(indices.shape, bool)
    local = len(indices) // (data * size)
    per_pair = min(local, math.ceil(capacity * local * min(1, SLOTS / size)))
    for first in range(0, len(indices), local):
        used = [0] * size
        for token in range(first, first + local):
            if not mask[token]:
                continue
            devices = [expert // (EXPERTS // size) for expert in indices[token]]
            for device in sorted(set(devices)):
                used[device] += 1
            for slot, device in enumerate(devices):
                kept[token, slot] = used[device] <= per_pair
    return kept, int((~kept[mask]).sum())


@eqx.filter_jit
def run(model, hidden_states, target, routing):
    """The loss and its gradients for a given assignment."""
    value_and_grad = eqx.filter_value_and_grad(loss_of, has_aux=True)
    return value_and_grad(model, hidden_states, None, target, routing=routing)


@functools.cache
def routing_of_one_device():
    hidden_states, _, _ = make_tokens(TOKENS)
    mask = jnp.arange(TOKENS) % 7 != 2
    return eqx.filter_jit(make_block())(hidden_states, mask=mask)[1]


@pytest.mark.parametrize(
    "shape, capacity", slow_but_one([((2, 2), 0.3), ((1, 4), 0.6), ((1, 4), 0.9)])
)
def test_drops_are_counted_exactly(shape, capacity):
    hidden_states, _, target = make_tokens(TOKENS)
    routing = routing_of_one_device()
    parallel = bx.ExpertParallel(make_mesh("auto", shape), exchange=bx.exchange.AllToAll(capacity))
    kept, dropped = recount(
        np.asarray(routing.indices),
        np.asarray(routing.mask),
        data=shape[0],
        size=shape[1],
        capacity=capacity,
    )
    assert 0 < dropped < kept.size
    actual = run(parallel.shard(make_block()), hidden_states, target, routing)
    assert int(actual[0][1][1].dropped) == dropped
    # One device, with the weights of the lost assignments set to 0.
    lost = eqx.tree_at(lambda r: r.weights, routing, jnp.where(kept, routing.weights, 0))
    desired = run(make_block(), hidden_states, target, lost)
    assert_trees_close(actual[0][1][0], desired[0][1][0])
    assert_trees_close(actual[1], desired[1])


def test_no_capacity_drops_nothing_even_if_everyone_wants_one_expert():
    hidden_states, _, target = make_tokens(TOKENS)
    block = make_block()
    routing = routing_of_one_device()
    routing = eqx.tree_at(lambda r: r.indices, routing, jnp.zeros_like(routing.indices))
    parallel = bx.ExpertParallel(make_mesh("auto", (1, 4)), exchange=bx.exchange.AllToAll())
    actual = run(parallel.shard(block), hidden_states, target, routing)
    assert int(actual[0][1][1].dropped) == 0
    assert_trees_close(actual[1], run(block, hidden_states, target, routing)[1])

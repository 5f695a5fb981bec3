"""Data parallelism: tokens in parts, all experts on every device, in two ways.

By `ExpertParallel(mesh, axis=None)`, and in a `jax.shard_map` of the user's around a plain block.
"""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import (
    HIDDEN,
    KINDS,
    assert_trees_close,
    init_optimizer,
    loss_of,
    make_block,
    make_mesh,
    make_tokens,
    slow_but_one,
    spread,
    train,
)

import braidax as bx

PARTS, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
BATCHES = {"divides": (4, 5), "padded": (3, 5)}


def over(kind, **options):
    mesh = make_mesh(kind, (4,), ("data",))
    return bx.ExpertParallel(mesh, axis=None, tokens=("data",), **options)


def in_parts(parallel, tree):
    """FSDP: every array in parts along its first axis, where that divides."""

    def place(leaf):
        divides = eqx.is_array(leaf) and leaf.ndim and not leaf.shape[0] % 4
        parts = NamedSharding(parallel.mesh, PARTS)
        return jax.device_put(leaf, parts) if divides else leaf

    return jax.tree.map(place, tree)


@pytest.mark.parametrize(
    "kind, batch, stored",
    slow_but_one(
        [
            ("auto", "divides", "parts"),
            ("auto", "padded", "whole"),
            ("explicit", "divides", "whole"),
            ("explicit", "padded", "parts"),
        ]
    ),
)
def test_training_equals_one_device(kind, batch, stored):
    parallel, model, tokens = over(kind), make_block(), make_tokens(*BATCHES[batch])
    model = parallel.shard(in_parts(parallel, model) if stored == "parts" else model)
    down = model.routed.experts.down
    assert down.addressable_shards[0].data.size * (4 if stored == "parts" else 1) == down.size
    actual = train(model, list(spread(parallel, *tokens)), parallel, steps=2)
    assert_trees_close(actual, train(make_block(), tokens, steps=2))


def test_the_optimizer_state_lies_as_the_parameters():
    parallel = over("auto")
    adam, *_ = init_optimizer(parallel.shard(in_parts(parallel, make_block())), parallel)
    assert adam.mu.routed.experts.down.sharding.spec == PARTS
    assert adam.count.sharding == NamedSharding(parallel.mesh, EVERYWHERE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_computes_its_own_rows(kind):
    """No array of the program holds a row for every assignment, and nothing is gathered."""
    parallel = over(kind)
    experts = bx.Experts(8, 128, 6, key=jax.random.key(0))
    router = bx.TopKRouter(128, 8, 3, key=jax.random.key(1))
    model = parallel.shard(bx.RoutedMoE(router, experts))
    tokens = jax.ShapeDtypeStruct(
        (64, 128), "float32", sharding=NamedSharding(parallel.mesh, PARTS)
    )
    arrays, static = eqx.partition(model, eqx.is_array)

    def loss(arrays, tokens):
        return jnp.sum(jnp.sin(eqx.combine(arrays, static)(tokens)[0]))

    text = jax.jit(jax.grad(loss, allow_int=True)).lower(arrays, tokens).compile().as_text()
    assert not re.search(r"all-gather|all-to-all", text)
    rows = {int(rows) for rows in re.findall(r"f32\[(\d+),128\]", text)}
    assert 64 // 4 * 3 in rows and not rows & {64, 64 * 3}


def test_a_plain_block_on_an_explicit_mesh():
    mesh = make_mesh("explicit", (4,), ("data",))
    block, (hidden_states, input_ids, _) = make_block(), make_tokens(4, 5)
    arrays, static = eqx.partition(block, eqx.is_array)
    block = eqx.combine(jax.device_put(arrays, NamedSharding(mesh, EVERYWHERE)), static)
    parts = jax.device_put(hidden_states, NamedSharding(mesh, PARTS))
    message = r"`hidden_states`.*whole.*ExpertParallel\(mesh, axis=None.*Got \('data',\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(block, parts, input_ids)
    whole = jax.device_put(hidden_states, NamedSharding(mesh, EVERYWHERE))
    desired = make_block()(hidden_states, input_ids)
    assert_trees_close(eqx.filter_jit(block)(whole, input_ids), desired)


DISPATCHES = {
    "blocks": bx.SortedDispatch(bx.matmul.Blocks()),
    "ragged": bx.SortedDispatch(bx.matmul.Ragged()),
    "remat": bx.SortedDispatch(remat=True),
}
CALLS = {"plain": lambda call: call, "vmap": jax.vmap, "checkpoint": jax.checkpoint}


def loss_with(arrays, hidden_states, input_ids, mask, target, *, static, call, mesh=None):
    """With a mesh, each device calls the block on its part of the tokens."""

    def part(arrays, *tokens):
        block = eqx.combine(arrays, static)
        return call(lambda x, ids, mask: block(x, ids, mask=mask)[0])(*tokens)

    if mesh is not None:
        part = jax.shard_map(
            part, mesh=mesh, in_specs=(EVERYWHERE, PARTS, PARTS, PARTS), out_specs=PARTS
        )
    return jnp.mean(jnp.square(part(arrays, hidden_states, input_ids, mask) - target))


def gradients(block, mesh=None, call=CALLS["plain"]):
    hidden_states, input_ids, target = make_tokens(4, 5)
    mask = jnp.arange(20).reshape(4, 5) % 4 != 1
    arrays, static = eqx.partition(block, eqx.is_inexact_array)
    tokens = (hidden_states, input_ids, mask, target)
    if mesh is not None:
        arrays = jax.device_put(arrays, NamedSharding(mesh, EVERYWHERE))
        tokens = jax.device_put(tokens, NamedSharding(mesh, PARTS))
    loss = functools.partial(loss_with, static=static, call=call, mesh=mesh)
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(arrays, *tokens)


@functools.cache
def by_every_expert(router):
    return gradients(make_block(router, dispatch=bx.DenseDispatch()))


@pytest.mark.parametrize(
    "dispatch, router, call, kind",
    slow_but_one(
        [
            ("blocks", "hash", "plain", "auto"),
            ("blocks", "top_k", "vmap", "explicit"),
            ("ragged", "top_k", "plain", "explicit"),
            ("ragged", "hash", "vmap", "auto"),
            ("remat", "top_k", "checkpoint", "auto"),
            ("remat", "hash", "plain", "explicit"),
        ]
    ),
)
def test_inside_a_shard_map_of_the_users(dispatch, router, call, kind):
    """Weights vary over no axis, tokens over one: cotangents are summed over the devices."""
    mesh = make_mesh(kind, (4,), ("data",))
    actual = gradients(make_block(router, dispatch=DISPATCHES[dispatch]), mesh, CALLS[call])
    assert_trees_close(actual, by_every_expert(router))


@pytest.mark.parametrize("kernel", slow_but_one(["blocks", "ragged", "remat"]))
def test_experts_split_by_hand(kernel):
    """Tokens on every device, experts on one each: the weights vary, and the rows do not."""
    mesh, hidden_states = make_mesh("auto", (4,), ("data",)), make_tokens(4, 5)[0]
    block = make_block(dispatch=DISPATCHES[kernel]).routed

    def part(experts, router, hidden_states):
        routing = router(hidden_states)
        # Its own two experts; all others are nobody's.
        local = routing.indices - 2 * jax.lax.axis_index("data")
        local = jnp.where((local >= 0) & (local < 2), local, 2)
        replaced = (local, routing.scores[..., :2])
        routing = eqx.tree_at(lambda r: (r.indices, r.scores), routing, replaced)
        return jax.lax.psum(block.dispatch(experts, hidden_states, routing)[0], "data")

    def loss(experts, hidden_states):
        specs = (PARTS, EVERYWHERE, EVERYWHERE)
        mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE)
        return jnp.sum(jnp.sin(mapped(experts, block.router, hidden_states)))

    def desired(experts, hidden_states):
        whole = eqx.tree_at(lambda b: b.experts, block, experts)
        return jnp.sum(jnp.sin(whole(hidden_states)[0]))

    calls = (jax.jit(jax.value_and_grad(f, (0, 1))) for f in (loss, desired))
    assert_trees_close(*(call(block.experts, hidden_states) for call in calls))


CONSTANT = np.linspace(-1, 1, HIDDEN * HIDDEN, dtype=np.float32).reshape(HIDDEN, HIDDEN)


class WithConstants(bx.AbstractExperts):
    """Arrays that are no fields: a matrix for all experts, one of ones for each, and a row."""

    weight: jax.Array

    def __call__(self, rows, group_sizes, matmul):
        first = matmul(rows @ jnp.asarray(CONSTANT), self.weight, group_sizes)
        second = matmul(jnp.ones(rows.shape), self.weight, group_sizes)
        ones = np.ones((len(group_sizes), HIDDEN, HIDDEN), np.float32)
        return first * CONSTANT[:1] + second + matmul(rows, ones, group_sizes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_constants_in_experts_of_ones_own(kind):
    weight = jax.random.normal(jax.random.key(2), (8, HIDDEN, HIDDEN)) / 3
    block = bx.RoutedMoE(make_block().routed.router, WithConstants(weight))
    hidden_states, _, target = make_tokens(4, 5)
    evaluate = eqx.filter_jit(eqx.filter_value_and_grad(loss_of, has_aux=True))
    actual, desired = (
        evaluate(model, hidden_states, None, target)
        for model in (bx.ExpertParallel(make_mesh(kind)).shard(block), block)
    )
    assert_trees_close(actual, desired)

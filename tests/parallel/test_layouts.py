"""Axes of the mesh that `ExpertParallel` does not name are the user's."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import (
    EXCHANGES,
    KINDS,
    assert_trees_close,
    loss_of,
    make_block,
    make_mesh,
    make_tokens,
    slow_but_one,
)

import braidax as bx

WEIGHTS = lambda block: (block.routed.experts.gate_up, block.routed.experts.down)  # noqa: E731
evaluate = eqx.filter_jit(eqx.filter_value_and_grad(loss_of, has_aux=True))


@functools.cache
def one_device():
    return evaluate(make_block(), *make_tokens(4, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("auto", "auto"), ("explicit", "explicit"), ("auto", "explicit")]
)
def test_a_layout_over_another_axis_is_kept(kinds):
    types = tuple(KINDS[kind] for kind in kinds)
    mesh = jax.make_mesh((2, 2), ("expert", "model"), axis_types=types)
    parallel = bx.ExpertParallel(mesh, tokens=("expert",))
    block = make_block()
    # Column-parallel, then row-parallel.
    specs = (PartitionSpec(None, None, "model"), PartitionSpec(("model",), None, None))
    weights = jax.tree.map(
        lambda weight, spec: jax.device_put(weight, NamedSharding(mesh, spec)),
        WEIGHTS(block),
        specs,
    )
    model = parallel.shard(eqx.tree_at(WEIGHTS, block, weights))
    wanted = [PartitionSpec("expert", None, "model"), PartitionSpec(("expert", "model"))]
    assert [weight.sharding.spec for weight in WEIGHTS(model)] == wanted
    assert [s.spec for s in WEIGHTS(parallel.shardings(model))] == wanted
    assert [weight.sharding.spec for weight in WEIGHTS(parallel.shard(model))] == wanted
    # A quarter of the weights on each of the four devices.
    for weight in WEIGHTS(model):
        assert 4 * weight.addressable_shards[0].data.size == weight.size
    assert_trees_close(evaluate(model, *make_tokens(4, 5)), one_device())


@pytest.mark.parametrize("exchange", slow_but_one(["gather", "ragged"]))
def test_inside_a_shard_map_of_the_users(exchange):
    """The batch in two parts by the user's `shard_map`, and each part over the experts."""
    mesh = make_mesh("auto", (2, 2), ("replica", "expert"))
    parallel = bx.ExpertParallel(mesh, tokens=("expert",), exchange=EXCHANGES[exchange])
    hidden_states, input_ids, target = make_tokens(4, 5)
    everywhere, halves = PartitionSpec(), PartitionSpec("replica")

    def loss(model, hidden_states, part):
        return jnp.mean(jnp.square(part(model, hidden_states, input_ids) - target))

    def part(arrays, hidden_states, input_ids):
        return hidden_states + eqx.combine(arrays, static)(hidden_states, input_ids)[0]

    model = parallel.shard(make_block())
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    mapped = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(everywhere, halves, halves),
        out_specs=halves,
        axis_names={"replica"},
    )
    actual = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(
        arrays, hidden_states, mapped
    )
    desired = eqx.filter_jit(jax.value_and_grad(loss, (0, 1)))(
        make_block(), hidden_states, lambda model, *tokens: tokens[0] + model(*tokens)[0]
    )
    assert_trees_close(actual, desired)


@pytest.mark.parametrize(
    "kind, taken, message",
    [
        ("auto", "expert", "`tokens` must name axes .* Got .*'expert'.* where .*'expert'.* taken"),
        ("explicit", "data", "`mesh` must have Auto axes .* inside a jax.shard_map"),
    ],
)
def test_where_it_cannot_be_called(kind, taken, message, unchecked):
    mesh = make_mesh(kind)
    parallel = bx.ExpertParallel(mesh, tokens=("expert",))
    model = parallel.shard(make_block())
    hidden_states = jax.device_put(make_tokens(4, 5)[0], NamedSharding(mesh, PartitionSpec()))
    mapped = jax.shard_map(
        lambda model, hidden_states: model(hidden_states)[0],
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names={taken},
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped, model, hidden_states)

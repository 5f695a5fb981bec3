"""Many devices give what one device gives: outputs, gradients, loads, optimizer steps."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import (
    EXCHANGES,
    HIDDEN,
    KINDS,
    assert_trees_close,
    loss_of,
    make_block,
    make_mesh,
    make_tokens,
    slow_but_one,
    spread,
    train,
)

import braidax as bx

# One leading axis that divides over four shards, and tokens that do not.
BATCHES = {"divides": (4, 5), "padded": (3, 5)}
# Every pair of exchange and mesh, of exchange and batch, and of mesh and batch: half of all
# triples, each of which compiles a training step of its own.
TRAINED = [
    ("gather", "auto", "divides"),
    ("gather", "explicit", "padded"),
    ("all_to_all", "auto", "padded"),
    ("all_to_all", "explicit", "divides"),
    ("ragged", "auto", "divides"),
    ("ragged", "explicit", "padded"),
]


@functools.cache
def one_device(batch, num_experts=8):
    return train(make_block(num_experts=num_experts), make_tokens(*batch))


def test_every_pair_is_trained():
    axes = (EXCHANGES, KINDS, BATCHES)
    for one, other in itertools.combinations(range(3), 2):
        wanted = set(itertools.product(axes[one], axes[other]))
        assert {(case[one], case[other]) for case in TRAINED} == wanted


# In `nox -s tests` every exchange, kind of mesh and batch once.
@pytest.mark.parametrize(
    "exchange, kind, batch",
    [
        pytest.param(*case, marks=() if number in (0, 3, 5) else pytest.mark.slow)
        for number, case in enumerate(TRAINED)
    ],
)
def test_training_equals_one_device(exchange, kind, batch, caplog):
    parallel = bx.ExpertParallel(make_mesh(kind), exchange=EXCHANGES[exchange])
    model = parallel.shard(make_block())
    tokens = spread(parallel, *make_tokens(*BATCHES[batch]))
    desired = one_device(BATCHES[batch])
    with jax.log_compiles():
        actual = train(model, list(tokens), parallel)
    assert_trees_close(actual, desired)
    # Three steps, compiled once.
    messages = [record.getMessage() for record in caplog.records]
    compiled = [m for m in messages if m.startswith("Finished XLA compilation of jit(step)")]
    assert len(compiled) == 1
    assert int(actual[0].routing.dropped) == 0
    # The router's gradient by itself: it is small beside the experts'.
    (one, _), (other, _) = actual[0].gradients, desired[0].gradients
    gradient = np.asarray(other.routed.router.gate.weight)
    np.testing.assert_allclose(
        one.routed.router.gate.weight, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max()
    )
    # And an expert that nobody was routed to.
    assert int(actual[0].load[-1]) == 0 and not np.asarray(one.routed.experts.down)[-1].any()


@pytest.mark.parametrize("kind", slow_but_one(KINDS))
def test_experts_that_do_not_divide_are_padded(kind):
    parallel = bx.ExpertParallel(make_mesh(kind, (1, 4)))
    with pytest.warns(UserWarning, match="6 experts do not divide over 4 devices"):
        model = parallel.shard(make_block(num_experts=6))
    tokens = list(spread(parallel, *make_tokens(4, 5)))
    assert_trees_close(
        train(model, tokens, parallel, steps=1),
        train(make_block(num_experts=6), make_tokens(4, 5), steps=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, names, tokens, exchange",
    [
        ((4, 1), ("data", "expert"), ("data", "expert"), "gather"),
        ((4, 1), ("data", "expert"), ("data", "expert"), "all_to_all"),
        ((4, 1), ("data", "expert"), ("data", "expert"), "ragged"),
        ((1, 4), ("data", "expert"), ("expert",), "all_to_all"),
        ((2, 2), ("expert", "model"), ("expert",), "gather"),
        ((2, 2), ("data", "expert"), ("expert", "data"), "ragged"),
    ],
)
def test_other_meshes(shape, names, tokens, exchange):
    hidden_states, input_ids, _ = make_tokens(4, 5)
    mesh, exchange = make_mesh("auto", shape, names), EXCHANGES[exchange]
    parallel = bx.ExpertParallel(mesh, tokens=tokens, exchange=exchange)
    actual = eqx.filter_jit(parallel.shard(make_block()))(hidden_states, input_ids)
    assert_trees_close(actual, forward_on_one_device())


@functools.cache
def forward_on_one_device():
    hidden_states, input_ids, _ = make_tokens(4, 5)
    return eqx.filter_jit(make_block())(hidden_states, input_ids)


@eqx.filter_jit
def masked_and_replayed(model, hidden_states, input_ids, target, mask):
    """Losses and gradients with a mask, and with the routing that came of it."""
    value_and_grad = eqx.filter_value_and_grad(loss_of, has_aux=True)
    hidden_states = jnp.where(mask[..., None], hidden_states, 0)
    first = value_and_grad(model, hidden_states, input_ids, target, mask=mask)
    routing = first[0][1][1]
    return first, value_and_grad(model, hidden_states, input_ids, target, routing=routing)


@functools.cache
def masked_on_one_device(router="hash"):
    hidden_states, input_ids, target = make_tokens(3, 5)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1
    arrays = (hidden_states, jnp.where(mask, input_ids, -1), target, mask)
    return arrays, masked_and_replayed(make_block(router), *arrays)


@pytest.mark.parametrize("kind", slow_but_one(KINDS))
def test_hashed_masked_and_replayed(kind):
    arrays, desired = masked_on_one_device()
    parallel = bx.ExpertParallel(make_mesh(kind))
    model = parallel.shard(make_block("hash"))
    assert_trees_close(masked_and_replayed(model, *spread(parallel, *arrays)), desired)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_experts_choose_among_the_tokens_of_all_devices(kind):
    arrays, desired = masked_on_one_device("expert_choice")
    load = bx.expert_load(desired[0][0][1][1])
    assert load.tolist() == [5] * 8  # 11 tokens that are no padding, 3 experts each, rounded up
    parallel = bx.ExpertParallel(make_mesh(kind))
    model = parallel.shard(make_block("expert_choice"))
    assert_trees_close(masked_and_replayed(model, *spread(parallel, *arrays)), desired)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_may_count_by_its_arrays(kind):
    class Counted(bx.TopKRouter):
        def count_dropped(self, indices, mask):
            return jnp.sum(self.score_correction_bias == 0, dtype=jnp.int32)

    parallel, (hidden_states, *_) = bx.ExpertParallel(make_mesh(kind)), make_tokens(3, 5)
    router = Counted(HIDDEN, 8, 2, key=jax.random.key(0))
    model = parallel.shard(bx.RoutedMoE(router, bx.Experts(8, HIDDEN, 4, key=jax.random.key(1))))
    _, routing = eqx.filter_jit(model)(*spread(parallel, hidden_states))
    assert int(routing.dropped) == 8


@pytest.mark.parametrize("exchange", slow_but_one(EXCHANGES))
def test_nothing_of_a_masked_token_gets_out(exchange):
    parallel = bx.ExpertParallel(make_mesh(), exchange=EXCHANGES[exchange])
    hidden_states, input_ids, _ = make_tokens(3, 5)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1
    broken = jnp.where(mask[..., None], hidden_states, jnp.nan)
    model = eqx.filter_jit(eqx.filter_grad(lambda m, *a: jnp.sum(m(*a[:2], mask=a[2])[0])))
    sharded = parallel.shard(make_block("hash"))
    gradients = model(sharded, broken, jnp.where(mask, input_ids, -1), mask)
    assert_trees_close(gradients, model(sharded, hidden_states, input_ids, mask), tolerance=0)


@pytest.mark.parametrize("exchange", slow_but_one(EXCHANGES))
def test_a_nan_token_reaches_itself_alone(exchange):
    parallel = bx.ExpertParallel(make_mesh(), exchange=EXCHANGES[exchange])
    hidden_states, input_ids, _ = make_tokens(4, 5)
    broken = hidden_states.at[1, 2].set(jnp.nan)
    model = eqx.filter_jit(parallel.shard(make_block()))
    clean, _ = model(hidden_states, input_ids)
    output, _ = model(broken, input_ids)
    others = np.ones((4, 5), bool)
    others[1, 2] = False
    assert np.isnan(output[1, 2]).all()
    np.testing.assert_array_equal(np.asarray(output)[others], np.asarray(clean)[others])


@pytest.mark.parametrize(
    "kind, batch", slow_but_one([("explicit", ()), ("auto", (1,)), ("auto", (0,))])
)
def test_one_token_and_none(kind, batch):
    parallel = bx.ExpertParallel(make_mesh(kind))
    block = make_block()
    model = parallel.shard(block)
    hidden_states, input_ids, _ = make_tokens(*batch)
    actual = eqx.filter_jit(model)(*spread(parallel, hidden_states, input_ids))
    assert actual[0].shape == (*batch, HIDDEN)
    assert_trees_close(actual, eqx.filter_jit(block)(hidden_states, input_ids))


evaluate = eqx.filter_jit(eqx.filter_value_and_grad(loss_of, has_aux=True))


@functools.cache
def bfloat16_on_one_device():
    return evaluate(make_block(dtype=jnp.bfloat16), *make_tokens(4, 5, dtype=jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bfloat16(exchange):
    parallel = bx.ExpertParallel(make_mesh(), exchange=EXCHANGES[exchange])
    model = parallel.shard(make_block(dtype=jnp.bfloat16))
    actual = evaluate(model, *make_tokens(4, 5, dtype=jnp.bfloat16))
    desired = bfloat16_on_one_device()
    # The sums over experts are float32 on any number of devices; the gradients of the weights are
    # rounded to bfloat16 before they are summed over devices: two roundings of 2**-9 each.
    assert_trees_close(actual[0], desired[0])
    assert_trees_close(actual[1], desired[1], tolerance=2**-7)


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def scanned(layers, hidden_states, target):
    """Stacked layers in a `jax.lax.scan`, each recomputed in the backward pass."""
    arrays, static = eqx.partition(layers, eqx.is_array)

    @eqx.filter_checkpoint
    def body(hidden_states, layer):
        output, routing = eqx.combine(layer, static)(hidden_states)
        return hidden_states + output, bx.expert_load(routing)

    output, loads = jax.lax.scan(body, hidden_states, arrays)
    return jnp.mean(jnp.square(output - target)), loads


@functools.cache
def stacked_layers():
    make = lambda key: bx.RoutedMoE(  # noqa: E731
        bx.TopKRouter(HIDDEN, 8, 3, key=key),
        bx.Experts(8, HIDDEN, 6, key=key),
    )
    layers = eqx.filter_vmap(make)(jax.random.split(jax.random.key(5), 3))
    hidden_states, _, target = make_tokens(4, 5)
    return layers, (hidden_states, target), scanned(layers, hidden_states, target)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_layers_by_scan_with_checkpoint(exchange):
    layers, tokens, desired = stacked_layers()
    sharded = bx.ExpertParallel(make_mesh(), exchange=EXCHANGES[exchange]).shard(layers)
    assert sharded.experts.down.sharding.spec[:2] == (None, "expert")
    assert_trees_close(scanned(sharded, *tokens), desired)


@pytest.mark.parametrize("kind", slow_but_one(KINDS))
def test_what_was_loaded_is_placed_again(kind, tmp_path):
    """A file knows no devices."""
    hidden_states, input_ids, _ = make_tokens(4, 5)
    parallel = bx.ExpertParallel(make_mesh(kind))
    sharded = parallel.shard(make_block(seed=1))
    eqx.tree_serialise_leaves(tmp_path / "one", make_block())
    loaded = eqx.tree_deserialise_leaves(tmp_path / "one", sharded)
    arrays = [leaf for leaf in jax.tree.leaves(loaded) if eqx.is_array(leaf)]
    assert all(len(leaf.devices()) == 1 for leaf in arrays)
    placed = parallel.shard(loaded)
    for leaf, like in zip(*map(jax.tree.leaves, (placed, sharded)), strict=True):
        assert leaf.sharding == like.sharding
    actual = eqx.filter_jit(placed)(*spread(parallel, hidden_states, input_ids))
    assert_trees_close(actual, forward_on_one_device())
    # And the other way.
    eqx.tree_serialise_leaves(tmp_path / "many", placed)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "many", make_block(seed=1))
    assert_trees_close(loaded, make_block(), tolerance=0)

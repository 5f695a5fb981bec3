"""Mistakes are errors that name the argument, and layouts that are not ours are left alone."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from meshes import HIDDEN, KINDS, VOCAB, make_block, make_mesh, make_tokens

import braidax as bx


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"axis": "model"}, ValueError, "`tokens` must hold `axis`"),
        ({"axis": None, "tokens": ()}, ValueError, "an axis where `axis` is None"),
        ({"tokens": ("expert", "batch")}, ValueError, "`mesh` must hold the axes"),
        ({"tokens": ("expert", "expert")}, ValueError, "no name twice"),
        ({"tokens": "expert"}, TypeError, "`tokens` must be a tuple"),
        ({"exchange": "ring"}, TypeError, "`exchange` must be an exchange"),
        ({"axis": None, "exchange": bx.exchange.Gather()}, ValueError, "must be None where `axis`"),
        ({"matmul": bx.matmul.Dense()}, TypeError, "`matmul` must be a kernel for groups of any"),
        ({"matmul": "ragged"}, TypeError, "`matmul` must be a kernel for groups of any"),
    ],
)
def test_construction(options, error, message, unchecked):
    with pytest.raises(error, match=message):
        bx.ExpertParallel(make_mesh(), **options)


def test_a_capacity_is_a_positive_number(unchecked):
    with pytest.raises(ValueError, match="`capacity` must be finite and"):
        bx.exchange.AllToAll(0)


def test_axes_of_two_kinds(unchecked):
    devices = np.array(jax.devices()).reshape(2, 2)
    mesh = Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto, AxisType.Explicit))
    with pytest.raises(ValueError, match="all Auto or all Explicit"):
        bx.ExpertParallel(mesh)
    bx.ExpertParallel(mesh, tokens=("expert",))
    with pytest.raises(TypeError, match="`mesh` must be a jax.sharding.Mesh. Got str"):
        bx.ExpertParallel("mesh")


def test_models():
    parallel = bx.ExpertParallel(make_mesh())
    with pytest.raises(ValueError, match="`model` must hold at least one RoutedMoE"):
        parallel.shard(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
    # An error that is raised on one device would leave the others waiting.
    parts = make_block().routed.router, make_block().routed.experts
    with pytest.raises(ValueError, match="`checks` must be False over a mesh"):
        parallel.shard(bx.RoutedMoE(*parts, checks=True))
    checked = bx.RoutedMoE(*parts, dispatch=parallel, checks=True)
    with pytest.raises(ValueError, match="`checks` must be False over a mesh"):
        jax.eval_shape(checked, make_tokens(4, 5)[0])


def test_whatever_the_block_had_is_replaced():
    """Dispatches of one device have no say over the mesh."""
    options = {"exchange": bx.exchange.Ragged(), "matmul": bx.matmul.Ragged()}
    parallel = bx.ExpertParallel(make_mesh(), **options)
    for dispatch in (bx.DenseDispatch(), bx.SortedDispatch(bx.matmul.Blocks())):
        model = parallel.shard([make_block(dispatch=dispatch)])
        assert model[0].routed.dispatch == parallel


@pytest.mark.parametrize("kind", KINDS)
def test_the_dispatch_is_replaced_as_any_field(kind):
    """In the block, and in a gradient of it, whose leaves are placed in the same way."""
    parallel = bx.ExpertParallel(make_mesh(kind))
    block = parallel.shard(make_block().routed)
    hidden_states = make_tokens(4, 5)[0]
    other = bx.ExpertParallel(parallel.mesh, exchange=bx.exchange.AllToAll(2.0))
    gradients = eqx.filter(block, bx.trainable(block))
    for tree in (block, gradients):
        assert tree.dispatch == parallel
        for changed in (
            dataclasses.replace(tree, dispatch=other),
            eqx.tree_at(lambda b: b.dispatch, tree, other),
        ):
            assert changed.dispatch == other != tree.dispatch
            back = eqx.tree_at(lambda b: b.dispatch, changed, tree.dispatch)
            assert jax.tree.structure(back) == jax.tree.structure(tree)
            assert jax.tree.leaves(back) == jax.tree.leaves(tree)
    output, routing = jax.eval_shape(dataclasses.replace(block, dispatch=other), hidden_states)
    assert output.shape == (4, 5, HIDDEN) and routing.indices.shape == (4, 5, 3)


def test_tokens(unchecked):
    model = bx.ExpertParallel(make_mesh()).shard(make_block("hash"))
    hidden_states, input_ids, _ = make_tokens(4, 5)
    with pytest.raises(ValueError, match=r"\(\*batch, hidden=8\). Got \(4, 5, 7\)"):
        model(hidden_states[..., :7], input_ids)
    with pytest.raises(ValueError, match=r"`input_ids` must have the shape.*\(4, 5\). Got \(5,\)"):
        model(hidden_states, input_ids[0])
    with pytest.raises(TypeError, match="`hidden_states` must be an array. Got a list"):
        model(hidden_states.tolist(), input_ids)
    with pytest.raises(TypeError, match="`input_ids` must be an array. Got a list"):
        model(hidden_states, input_ids.tolist())
    with pytest.raises(ValueError, match=r"`mask` must have the shape"):
        model(hidden_states, input_ids, mask=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="`input_ids` must be given to a `HashRouter`"):
        model(hidden_states)


def test_shard_places_all_and_keeps_layouts_on_the_mesh():
    mesh = make_mesh()
    parallel = bx.ExpertParallel(mesh)
    fsdp = NamedSharding(mesh, PartitionSpec(None, "data"))
    embedding = eqx.nn.Embedding(VOCAB, HIDDEN, key=jax.random.key(0))
    weight = jax.device_put(embedding.weight, fsdp)
    embedding = eqx.tree_at(lambda e: e.weight, embedding, weight)
    model = {"embedding": embedding, "block": make_block(), "scale": jnp.ones(())}
    sharded = parallel.shard(model)
    assert sharded["embedding"].weight.sharding == fsdp
    assert sharded["block"].shared.down.sharding == NamedSharding(mesh, PartitionSpec())
    shardings = parallel.shardings(sharded)
    assert shardings["embedding"].weight == fsdp
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert shardings["scale"] == shardings["block"].routed.router.gate.weight == everywhere
    experts = NamedSharding(mesh, PartitionSpec("expert"))
    assert shardings["block"].routed.experts.gate_up == experts
    assert sharded["block"].routed.experts.gate_up.sharding == experts
    # The same for shapes alone, which is what a checkpoint library restores into.
    shapes = eqx.filter_eval_shape(lambda: parallel.shard(make_block()))
    assert parallel.shardings(shapes).routed.experts.down == experts

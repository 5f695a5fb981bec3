"""What an optimizer may touch, and the bias update over whole models."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import braidax as bx

HIDDEN, EXPERTS, CHOSEN, VOCAB = 8, 4, 2, 11


def top_k_router(seed):
    router = bx.TopKRouter(HIDDEN, EXPERTS, CHOSEN, key=jax.random.key(seed))
    bias = jnp.asarray([1.0, -1.0, 0.5, 0.25], jnp.float32)
    return eqx.tree_at(lambda r: r.score_correction_bias, router, bias)


def hash_router(seed):
    table = np.stack([np.arange(VOCAB) % EXPERTS, (np.arange(VOCAB) + 1) % EXPERTS], axis=1)
    return bx.HashRouter(
        HIDDEN, EXPERTS, CHOSEN, table=table.astype(np.int32), key=jax.random.key(seed)
    )


class Model(eqx.Module):
    """A hash layer and two top-k layers, each with a projection; callable, as models are."""

    routers: list
    projections: list
    activation: object

    def __init__(self):
        self.routers = [hash_router(0), top_k_router(1), top_k_router(2)]
        keys = jax.random.split(jax.random.key(3), 3)
        self.projections = [eqx.nn.Linear(HIDDEN, HIDDEN, key=k) for k in keys]
        self.activation = jax.nn.silu

    def __call__(self, hidden_states, input_ids):
        routings = []
        for router, project in zip(self.routers, self.projections, strict=True):
            routing = router(hidden_states, input_ids)
            scale = jnp.sum(routing.weights * jnp.arange(1.0, CHOSEN + 1)[None, :], axis=-1)
            hidden_states = hidden_states + scale[..., None] * jax.vmap(project)(hidden_states)
            routings.append(routing)
        return self.activation(hidden_states), routings


def inputs(tokens=6):
    hidden_states = jax.random.normal(jax.random.key(9), (tokens, HIDDEN))
    return hidden_states, jnp.arange(tokens, dtype=jnp.int32)


def bits(model):
    return [
        np.asarray(model.routers[0].table).tobytes(),
        *(np.asarray(r.score_correction_bias).tobytes() for r in model.routers[1:]),
    ]


# --- masks ------------------------------------------------------------------------------------


def test_trainable_is_false_on_bias_table_and_functions():
    model = Model()
    spec = bx.trainable(model)
    assert jax.tree.structure(spec) == jax.tree.structure(jax.tree.map(lambda _: 0, model))
    assert spec.routers[0].gate.weight is True and spec.routers[0].table is False
    assert spec.routers[1].gate.weight is True and spec.routers[1].score_correction_bias is False
    assert spec.projections[0].weight is True and spec.activation is False
    params, static = eqx.partition(model, spec)
    assert params.routers[1].score_correction_bias is None and params.routers[0].table is None
    assert eqx.tree_equal(eqx.combine(params, static), model)


def test_a_router_alone_and_a_tree_without_routers():
    assert bx.trainable(top_k_router(0)).score_correction_bias is False
    assert bx.trainable({"score_correction_bias": jnp.ones(2), "count": 3}) == {
        "score_correction_bias": True,
        "count": False,
    }


def test_decay_mask_keeps_the_structure_of_params():
    model = Model()
    for params in (
        model,
        eqx.filter(model, eqx.is_inexact_array),
        eqx.tree_at(lambda m: m.routers[1].gate.weight, model, optax.MaskedNode()),
    ):
        mask = bx.decay_mask(params)
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        assert mask.routers[1].score_correction_bias is False
        assert mask.routers[2].gate.weight is True and mask.projections[0].bias is True
    assert bx.decay_mask(model).routers[0].table is False


@pytest.mark.parametrize("given", [3, jnp.int32(3), jax.nn.silu, "params"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("model", bx.trainable),
        ("model", bx.routers),
        ("model", lambda model: bx.cast(model, jnp.bfloat16)),
        ("params", bx.decay_mask),
        ("params", bx.muon_dimension_numbers),
        ("model", lambda model: bx.rebalance(model, [], 0.1)),
    ],
    ids=("trainable", "routers", "cast", "decay_mask", "muon_dimension_numbers", "rebalance"),
)
def test_what_is_no_tree_is_refused(name, function, given):
    with pytest.raises(TypeError, match=f"`{name}` must be a model or a tree of its parameters"):
        function(given)


def test_a_mask_that_is_called_as_a_schedule_is_an_error():
    params = eqx.filter(top_k_router(1), eqx.is_inexact_array)
    adamw = {"learning_rate": 0.1, "weight_decay": 0.1, "mask": bx.decay_mask}
    with pytest.raises(TypeError, match=r'`params` must.*step count.*static_args="mask"'):
        optax.inject_hyperparams(optax.adamw)(**adamw).init(params)
    optimizer = optax.inject_hyperparams(optax.adamw, static_args="mask")(**adamw)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(updates.score_correction_bias, np.zeros(EXPERTS))
    np.testing.assert_allclose(updates.gate.weight, -0.01 * params.gate.weight, rtol=1e-5)


def test_shapes_are_filtered_as_the_arrays_are():
    shapes = eqx.filter_eval_shape(Model)
    assert eqx.tree_equal(bx.trainable(shapes), bx.trainable(Model()))
    assert bx.cast(Model(), jnp.float16).routers[0].table.dtype == jnp.int32


def test_a_cast_narrows_everything_but_routers():
    model = Model()
    narrow = bx.cast(model, jnp.bfloat16)
    assert eqx.tree_equal(narrow.routers, model.routers)
    assert {p.weight.dtype for p in narrow.projections} == {jnp.dtype(jnp.bfloat16)}
    mixed = {"count": 3, "key": jax.random.key(0), "phase": jnp.ones(2, complex)}
    assert eqx.tree_equal(bx.cast(mixed, jnp.bfloat16), mixed)
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
        bx.cast(model, jnp.int32)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-1, weight_decay=0.1, mask=bx.decay_mask),
    "lion": optax.lion(1e-1, weight_decay=0.1, mask=bx.decay_mask),
    "momentum": optax.sgd(1e-1, momentum=0.9),
    "clip": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-1, weight_decay=0.1, mask=bx.decay_mask)
    ),
    # Here the mask meets params that already hold MaskedNode.
    "nested": optax.masked(optax.adamw(1e-1, weight_decay=0.1, mask=bx.decay_mask), bx.decay_mask),
}


@eqx.filter_jit
@eqx.filter_grad
def gradient_of(params, static):
    output, routings = eqx.combine(params, static)(*inputs())
    return jnp.mean(output**2) + bx.sequence_balance_loss(routings[1])


@pytest.mark.hazard(43)
@pytest.mark.parametrize(
    ("name", "partition"), [*((name, "inexact") for name in OPTIMIZERS), ("adamw", "trainable")]
)
def test_ten_steps_leave_bias_and_table_bit_for_bit(name, partition):
    model, optimizer = Model(), OPTIMIZERS[name]
    before = bits(model)
    spec = eqx.is_inexact_array if partition == "inexact" else bx.trainable(model)
    params, static = eqx.partition(model, spec)
    state = optimizer.init(params)

    for _ in range(10):
        gradients = gradient_of(params, static)
        updates, state = eqx.filter_jit(optimizer.update)(gradients, state, params)
        params = eqx.apply_updates(params, updates)
    trained = eqx.combine(params, static)
    assert bits(trained) == before
    for old, new in zip(model.routers, trained.routers, strict=True):
        assert not np.array_equal(old.gate.weight, new.gate.weight)


def test_routers_are_found_in_model_order():
    model = Model()
    assert all(a is b for a, b in zip(bx.routers(model), model.routers, strict=True))
    assert bx.routers(model.routers[1]) == [model.routers[1]]
    assert bx.routers(model.projections) == []


# --- rebalance --------------------------------------------------------------------------------


def test_rebalance_updates_every_bias_in_model_order():
    model = Model()
    _, routings = model(*inputs())
    new = bx.rebalance(model, routings, 0.01)
    for old_router, new_router, routing in zip(
        model.routers[1:], new.routers[1:], routings[1:], strict=True
    ):
        load = np.bincount(np.asarray(routing.indices).reshape(-1), minlength=EXPERTS)
        expected = np.asarray(old_router.score_correction_bias) + np.float32(0.01) * np.sign(
            load.mean() - load
        ).astype(np.float32)
        np.testing.assert_array_equal(new_router.score_correction_bias, expected)
    same = eqx.tree_at(
        lambda m: [r.score_correction_bias for r in m.routers[1:]],
        new,
        [r.score_correction_bias for r in model.routers[1:]],
    )
    assert eqx.tree_equal(same, model)


def test_rebalance_one_router_in_jit_with_a_traced_rate():
    router = top_k_router(0)
    routing = router(inputs()[0])
    expected = bx.rebalance(router, routing, 0.5)
    jitted = eqx.filter_jit(bx.rebalance)(router, routing, jnp.float32(0.5))
    assert eqx.tree_equal(jitted, expected)
    assert not eqx.tree_equal(expected, router)


def test_where_chooses_routers_and_their_order():
    model = Model()
    _, routings = model(*inputs())
    full = bx.rebalance(model, routings, 0.01)
    swapped = bx.rebalance(
        model,
        [routings[2], routings[1]],
        0.01,
        where=lambda m: [m.routers[2], m.routers[1]],
    )
    assert eqx.tree_equal(swapped, full)
    one = bx.rebalance(model, routings[2], 0.01, where=lambda m: m.routers[2])
    assert eqx.tree_equal(one.routers[2], full.routers[2])
    assert eqx.tree_equal(one.routers[1], model.routers[1])


def test_stacked_layers_are_balanced_one_by_one():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = eqx.filter_vmap(lambda k: bx.TopKRouter(HIDDEN, EXPERTS, CHOSEN, key=k))(keys)
    hidden_states, _ = inputs()
    mask = jnp.arange(6) < 5

    def body(_, router):
        return None, router(hidden_states, mask=mask)

    _, routing = jax.lax.scan(body, None, stacked)
    new = bx.rebalance(stacked, routing, 0.25)
    assert new.score_correction_bias.shape == (3, EXPERTS)
    for layer in range(3):
        load = np.bincount(np.asarray(routing.indices)[layer, :5].reshape(-1), minlength=EXPERTS)
        expected = 0.25 * np.sign(load.mean() - load)
        np.testing.assert_array_equal(new.score_correction_bias[layer], expected)
    with pytest.raises(ValueError, match=r"stacked over the layers \(3,\).*Got \(\)"):
        bx.rebalance(stacked, jax.tree.map(lambda a: a[0], routing), 0.25)


def test_micro_batches_of_stacked_layers_are_never_taken_for_layers():
    """As many micro-batches as layers: the axes could not be told apart by their sizes."""
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = eqx.filter_vmap(lambda k: bx.TopKRouter(HIDDEN, EXPERTS, CHOSEN, key=k))(keys)
    tokens = jax.random.normal(jax.random.key(1), (3, 6, HIDDEN))

    def micro_batch(_, hidden_states):
        layer = lambda _, router: (None, router(hidden_states))  # noqa: E731
        return None, jax.lax.scan(layer, None, stacked)[1]

    _, routing = jax.lax.scan(micro_batch, None, tokens)
    assert routing.stacked == (3, 3)
    with pytest.raises(ValueError, match=r"over nothing else. Got \(3, 3\).*give the sum"):
        bx.rebalance(stacked, routing, 0.25)
    new = bx.rebalance(stacked, bx.expert_load(routing).sum(axis=0), 0.25)
    for layer in range(3):
        load = np.bincount(np.asarray(routing.indices)[:, layer].reshape(-1), minlength=EXPERTS)
        expected = 0.25 * np.sign(load.mean() - load)
        np.testing.assert_array_equal(new.score_correction_bias[layer], expected)


def test_loads_do_where_routings_are_not_kept():
    """Sums over micro-batches, also of unequal sizes, in numpy too."""
    model = Model()
    hidden_states, input_ids = inputs(8)
    _, routings = model(hidden_states, input_ids)
    parts = [model(hidden_states[:3], input_ids[:3]), model(hidden_states[3:], input_ids[3:])]
    loads = [sum(np.asarray(bx.expert_load(routing[i])) for _, routing in parts) for i in range(3)]
    expected = bx.rebalance(model, routings, 0.01)
    assert eqx.tree_equal(bx.rebalance(model, loads, 0.01), expected)
    assert eqx.tree_equal(bx.rebalance(model, [routings[0], *loads[1:]], 0.01), expected)
    one, load = model.routers[1], jnp.asarray([[3, 0, 1, 0], [0, 1, 1, 0]])
    moved = bx.rebalance(one, load, 0.5).score_correction_bias - one.score_correction_bias
    np.testing.assert_array_equal(moved, [-0.5, 0.5, -0.5, 0.5])  # 3, 1, 2, 0 in the whole


def test_rebalance_pulls_a_collapsed_router_towards_balance():
    router = eqx.tree_at(
        lambda r: r.score_correction_bias, top_k_router(1), jnp.asarray([3.0, 3.0, 0.0, 0.0])
    )
    hidden_states = jax.random.normal(jax.random.key(4), (64, HIDDEN))
    before = float(bx.max_violation(bx.expert_load(router(hidden_states))))
    for _ in range(100):
        router = bx.rebalance(router, router(hidden_states), 0.05)
    assert before == 1.0
    assert float(bx.max_violation(bx.expert_load(router(hidden_states)))) < 0.3


def test_mistakes_are_named():
    model = Model()
    _, routings = model(*inputs())
    with pytest.raises(ValueError, match="Got 2 for 3 routers"):
        bx.rebalance(model, routings[:2], 0.01)
    with pytest.raises(TypeError, match="`where` must return routers. Got Linear"):
        bx.rebalance(model, routings[:1], 0.01, where=lambda m: [m.projections[0]])
    with pytest.raises(ValueError, match="at least one router"):
        bx.rebalance(model.projections, [], 0.01)
    other = bx.TopKRouter(HIDDEN, EXPERTS + 1, CHOSEN, key=jax.random.key(0))(inputs()[0])
    with pytest.raises(ValueError, match=r"(?s)4 experts. Got 5.*`routings\[2\]`"):
        bx.rebalance(model, [*routings[:2], other], 0.01)
    with pytest.raises(TypeError, match=r"whole routers. Got a router whose `gate.weight` is None"):
        bx.rebalance(eqx.partition(model, bx.trainable(model))[1], routings, 0.01)
    with pytest.raises(ValueError, match="`rate` must be finite. Got nan"):
        inspect.unwrap(bx.rebalance)(model, routings, float("nan"))


def test_what_is_neither_routing_nor_load_is_named(unchecked):
    router = top_k_router(0)
    output, routing = inputs()[0], router(inputs()[0])
    for given, error, found in (
        (output, TypeError, "`load` must have an integer dtype.*float32"),
        ([[routing]], TypeError, "a list"),
        (None, TypeError, "a NoneType"),
        (jnp.int32(3), ValueError, r"shape \(\)"),
    ):
        with pytest.raises(error, match=rf"(?s){found}.*`routings\[0\]`"):
            bx.rebalance(router, given, 0.01)
    with pytest.raises(TypeError, match=r"(?s)Got a NoneType.*`routings\[1\]`"):
        bx.rebalance([router, router], [routing, None], 0.01)
    with pytest.raises(ValueError, match="Got 2 for 1 routers"):
        bx.rebalance(router, (output, routing), 0.01)

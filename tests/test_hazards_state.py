"""Hazards 41 to 47: the bias update, optimisers, casts, files, transformations, export."""

import io
from fractions import Fraction

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import HIDDEN, ROUTERS, SLOTS, make_inputs
from hazard_inputs import layer, route
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import braidax as bx

every_kind = pytest.mark.parametrize("kind", ROUTERS)
update = jax.jit(bx.updated_bias, static_argnames="center")
RATE = np.float32(1e-3)
loads = arrays(np.int32, 48, elements=st.integers(0, 5) | st.integers(2**31 - 5, 2**31 - 1))


# --- the bias update --------------------------------------------------------------------------


@pytest.mark.hazard(
    41, "the sign of the bias update is that of exact fractions; balance moves nothing"
)
@given(loads)
def test_the_sign_is_that_of_exact_fractions(load):
    mean = Fraction(int(load.astype(object).sum()), len(load))
    signs = np.array([(mean > int(n)) - (mean < int(n)) for n in load], np.float32)
    new = update(jnp.zeros(48), jnp.asarray(load), RATE)
    np.testing.assert_array_equal(np.asarray(new), RATE * signs)
    centred = update(jnp.zeros(48), jnp.asarray(load), RATE, center=True)
    np.testing.assert_allclose(np.asarray(centred), RATE * (signs - signs.mean()), atol=1e-9)
    assert abs(float(np.asarray(centred, np.float64).sum())) < 1e-8


@eqx.filter_jit
def call(block, hidden_states, input_ids):
    return block(hidden_states, input_ids)


@pytest.mark.hazard(41)
@pytest.mark.parametrize("num_experts", [7, 48, 96, 192, 384])
@pytest.mark.parametrize("count", [1, 11, 2**31 - 1])
def test_balanced_counts_move_nothing(num_experts, count):
    """A float mean of 7 counts of 11 is not 11."""
    bias = jnp.linspace(-1, 1, num_experts)
    for center in (False, True):
        new = update(bias, jnp.full(num_experts, count, jnp.int32), RATE, center=center)
        np.testing.assert_array_equal(np.asarray(new), np.asarray(bias))


@pytest.mark.hazard(
    42, "counts are summed before the sign, padding left out, recomputation counted once"
)
def test_shards_are_summed_before_the_sign():
    """Updating by each shard and averaging is another rule: these two shards tell them apart."""
    shards = np.array([[5, 0, 1], [0, 2, 1]], np.int32)
    whole = update(jnp.zeros(3), jnp.asarray(shards.sum(axis=0)), RATE)
    np.testing.assert_array_equal(np.asarray(whole), RATE * np.array([-1, 1, 1], np.float32))
    router = layer("top_k").routed.router
    hidden_states, _ = make_inputs((4, 6))
    mask = jnp.arange(6)[None] < jnp.asarray([6, 3, 0, 1])[:, None]
    load = bx.expert_load(route(router, hidden_states, mask=mask))
    parts = [route(router, x, mask=m) for x, m in zip(hidden_states, mask, strict=True)]
    summed = np.sum([np.asarray(bx.expert_load(part)) for part in parts], axis=0)
    np.testing.assert_array_equal(np.asarray(load), summed)
    assert int(load.sum()) == 10 * SLOTS


@pytest.mark.hazard(42)
def test_a_skewed_router_is_balanced():
    """64 experts, 6 a token, skewed towards a few: the largest load was 2.98 of the mean in the
    reference's run and 1.50 after it."""
    router = bx.TopKRouter(16, 64, 6, key=jax.random.key(0))
    skew = jnp.linspace(-1, 1, 64)[:, None] * 0.15
    router = eqx.tree_at(lambda r: r.gate.weight, router, router.gate.weight + skew)

    def tokens(key):
        return 0.5 + jax.random.normal(key, (256, 16))

    def step(router, key):
        return bx.rebalance(router, router(tokens(key)), 1e-3), None

    train = eqx.filter_jit(lambda router, keys: jax.lax.scan(step, router, keys)[0])
    trained = train(router, jax.random.split(jax.random.key(1), 2000))
    probe = jax.vmap(tokens)(jax.random.split(jax.random.key(2), 16))
    before, after = (float(bx.max_violation(bx.expert_load(r(probe)))) for r in (router, trained))
    assert before > 2.0 and after < 0.6


@pytest.mark.hazard(42)
@every_kind
def test_recomputation_counts_once(kind):
    block = layer(kind)
    hidden_states, input_ids = make_inputs((8,))

    def loss(block):
        output, routing = block(hidden_states, input_ids)
        return jnp.sum(output**2), bx.expert_load(routing)

    load = bx.expert_load(call(block, hidden_states, input_ids)[1])
    run = eqx.filter_jit(eqx.filter_grad(lambda b: eqx.filter_checkpoint(loss)(b), has_aux=True))
    np.testing.assert_array_equal(np.asarray(run(block)[1]), np.asarray(load))
    assert int(load.sum()) == 8 * SLOTS


# --- optimisers, casts, files -----------------------------------------------------------------


def untrained(block):
    router = block.routed.router
    return [np.asarray(getattr(router, name)) for name in router.untrained_fields]


@pytest.mark.hazard(43, "adamw, lion, adam, momentum and averages: bias and table to the last bit")
@every_kind
def test_adam_and_a_moving_average_leave_the_untrained_alone(kind):
    block = layer(kind)
    hidden_states, input_ids = make_inputs((8,))
    parameters, static = eqx.partition(block, bx.trainable(block))
    optimiser = optax.adam(1e-1)

    @eqx.filter_jit
    def step(parameters, average, state):
        loss = lambda p: jnp.sum(eqx.combine(p, static)(hidden_states, input_ids)[0] ** 2)  # noqa: E731
        updates, state = optimiser.update(eqx.filter_grad(loss)(parameters), state, parameters)
        parameters = eqx.apply_updates(parameters, updates)
        return parameters, optax.incremental_update(parameters, average, 0.1), state

    average, state = parameters, optimiser.init(parameters)
    for _ in range(10):
        parameters, average, state = step(parameters, average, state)
    for tree in (parameters, average):
        trained = eqx.combine(tree, static)
        assert not np.array_equal(
            trained.routed.router.gate.weight, block.routed.router.gate.weight
        )
        for got, want in zip(untrained(trained), untrained(block), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


@pytest.mark.hazard(44, "a cast to bfloat16 keeps the bias float32 and the table int32")
@every_kind
def test_a_cast_of_the_trainable_keeps_bias_and_table(kind):
    block = layer(kind)
    parameters, static = eqx.partition(block, bx.trainable(block))
    narrow = eqx.combine(jax.tree.map(lambda a: a.astype(jnp.bfloat16), parameters), static)
    assert narrow.routed.router.gate.weight.dtype == narrow.shared.down.dtype == jnp.bfloat16
    for got, want in zip(untrained(narrow), untrained(block), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    hidden_states, input_ids = make_inputs((4,))
    output, routing = eqx.filter_eval_shape(narrow, hidden_states.astype(jnp.bfloat16), input_ids)
    assert output.dtype == jnp.bfloat16 and routing.weights.dtype == jnp.float32


@pytest.mark.hazard(44)
def test_a_cast_of_everything_is_refused():
    """Released biases are near 5, where bfloat16 has steps of 1/32: the bias must not be rounded,
    neither by a call nor by an update, and the error names the cast that leaves routers alone."""
    block = layer("top_k")
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), block).routed.router
    with pytest.raises(TypeError, match=r"`score_correction_bias` must be float32.*`braidax.cast`"):
        route(narrow, make_inputs((4,))[0])
    routing = route(block.routed.router, make_inputs((4,))[0])
    with pytest.raises(TypeError, match="`bias` must be float32 or wider.*Got bfloat16"):
        bx.rebalance(narrow, routing, 1e-3)


@pytest.mark.hazard(44)
@every_kind
def test_the_cast_of_the_library_leaves_routers_alone(kind):
    block = layer(kind)
    narrow = bx.cast(block, jnp.bfloat16)
    assert narrow.shared.down.dtype == narrow.routed.experts.gate_up.dtype == jnp.bfloat16
    assert eqx.tree_equal(narrow.routed.router, block.routed.router)
    hidden_states, input_ids = make_inputs((64,))
    output, routing = call(narrow, hidden_states.astype(jnp.bfloat16), input_ids)
    assert output.dtype == jnp.bfloat16
    same = route(block.routed.router, hidden_states.astype(jnp.bfloat16), input_ids)
    np.testing.assert_array_equal(routing.indices, same.indices)


@pytest.mark.hazard(45)
@every_kind
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_a_file_of_another_layer_is_refused(kind, change):
    block = layer(kind)
    where = lambda b: b.routed.experts.down  # noqa: E731
    other = where(block).astype(jnp.bfloat16) if change == "dtype" else where(block)[:, :-1]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, eqx.tree_at(where, block, other))
    file.seek(0)
    with pytest.raises(RuntimeError, match=change):
        eqx.tree_deserialise_leaves(file, block)


# --- transformations and export ---------------------------------------------------------------


@pytest.mark.hazard(
    46,
    "jit, vmap and grad either way round, scan, checkpoint; no compilation twice",
    exception="forward mode: dense only",
)
@every_kind
def test_eager_and_jit_route_alike_to_the_last_bit(kind):
    """A call outside of jit is compiled as a whole: one operation at a time, JAX 0.12 rounds the
    gate's product differently."""
    block, inputs = layer(kind), make_inputs((8,))
    assert eqx.tree_equal(block(*inputs), call(block, *inputs))
    router = block.routed.router
    assert eqx.tree_equal(router(*inputs), call(router, *inputs))


@pytest.mark.hazard(46)
def test_second_derivatives_where_they_are_promised():
    """`dense` has a Hessian; on the others forward mode is refused and reverse over reverse is in
    `test_transforms.py`."""
    hidden_states, input_ids = make_inputs((2,))

    def hessian(backend):
        block = layer("hash", backend)
        return jax.jit(jax.hessian(lambda x: jnp.sum(block(x, input_ids)[0] ** 2)))(hidden_states)

    matrix = np.asarray(hessian("dense")).reshape(2 * HIDDEN, 2 * HIDDEN)
    assert np.isfinite(matrix).all() and matrix.any()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        hessian("blocks")


@pytest.mark.hazard(
    47, "no weights are baked into a compiled layer; jax.export works with checks off"
)
@every_kind
def test_no_weights_are_baked_into_the_compiled_layer(kind):
    block = layer(kind)
    leaves, structure = jax.tree.flatten(block)

    def forward(leaves, hidden_states, input_ids):
        return jax.tree.unflatten(structure, leaves)(hidden_states, input_ids)[0]

    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(forward(*a)), argnums=1))
    constants = jaxpr(leaves, *make_inputs((8,))).consts
    assert all(np.size(constant) <= 1 for constant in constants)


@pytest.mark.hazard(47)
@every_kind
def test_export(kind):
    block = layer(kind)
    inputs = make_inputs((8,))
    exported = jax.export.export(jax.jit(lambda x, ids: block(x, ids)[0]))(*inputs)
    want = call(block, *inputs)[0]
    np.testing.assert_allclose(np.asarray(exported.call(*inputs)), np.asarray(want), atol=1e-6)
    # What cannot be exported is a call back into Python, which the checks make.
    assert "callback" not in exported.mlir_module()
    routed = bx.RoutedMoE(block.routed.router, block.routed.experts, checks=True)
    lowered = jax.jit(lambda x, ids: routed(x, ids)[0]).lower(*inputs).as_text()
    assert "callback" in lowered

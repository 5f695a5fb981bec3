"""Hazards 38 to 40: the clamp at its limits, overflow in narrow floats, dtypes with x64 on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXPERTS, HIDDEN, INTERMEDIATE, SLOTS, VOCAB, make_dispatch, make_inputs
from hazard_inputs import BACKEND_NAMES, LAYERS, layer

import braidax as bx

pytestmark = pytest.mark.optimized  # one rounding more or less is an error here

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
LIMIT = 10.0
SWIGLU = bx.activations.swiglu(LIMIT)
GATES = [-np.inf, -3e38, -20.0, 0.0, 9.99, 10.0, 10.01, 3e38, np.inf, np.nan]
UPS = [-np.inf, -10.01, -10.0, 1.5, 10.0, 10.01, np.inf, np.nan]
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


def expected(gate, up):
    """Value and both slopes in float64, the slope exactly at the limit being the full one."""
    with np.errstate(over="ignore"):
        g, u = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        sigmoid = 1 / (1 + np.exp(-g))
    silu = np.where(g < -700, 0, g * sigmoid)
    slope = np.where(g < -700, 0, sigmoid + g * sigmoid * (1 - sigmoid))
    return silu * u, np.where(gate > LIMIT, 0, slope * u), np.where(abs(up) > LIMIT, 0, silu)


@pytest.mark.hazard(38, "the clamp at, around and far beyond its limits, shared experts included")
@DTYPES
def test_the_clamp_at_every_limit(dtype):
    """In bfloat16 9.99 and 10.01 both are the limit itself, where the slope must not be halved."""
    pairs = np.array([(g, u) for g in GATES for u in UPS], np.float64)
    with np.errstate(over="ignore"):
        given = pairs.astype(dtype)
    function = jax.vmap(jax.value_and_grad(lambda pair: SWIGLU(*pair)))
    value, gradient = function(jnp.asarray(given))
    assert value.dtype == gradient.dtype == dtype
    wide = given.astype(np.float64)
    with np.errstate(invalid="ignore"):
        want = np.stack(expected(wide[:, 0], wide[:, 1]))
    got = np.stack([np.asarray(a, np.float64) for a in (value, gradient[:, 0], gradient[:, 1])])
    for column, name in enumerate(("value", "gate slope", "up slope")):
        # A NaN gate poisons everything it multiplies; a select passes no slope to a NaN up.
        finite = ~np.isnan(wide).any(axis=1)
        tolerance = 3 * float(jnp.finfo(dtype).eps)  # silu itself runs in the narrow float
        np.testing.assert_allclose(
            got[column][finite], want[column][finite], rtol=tolerance, atol=1e-6, err_msg=name
        )
    assert np.isnan(got[0][~finite]).all()


def one_by_one(dtype, hidden=2):
    """An expert whose gate is the first hidden entry and whose up is the second."""
    expert = bx.FeedForward(hidden, 1, activation=SWIGLU, dtype=dtype, key=jax.random.key(0))
    where = lambda e: (e.gate_up, e.down)  # noqa: E731
    return eqx.tree_at(where, expert, (jnp.eye(2, dtype=dtype)[:, None], jnp.ones((1, 2), dtype)))


def one_routed(expert, backend):
    """The same expert as the only one of a routed block: its weight is 1."""
    hidden = expert.gate_up.shape[-1]
    router = bx.TopKRouter(hidden, 1, 1, key=jax.random.key(0))
    # Logits of 0: one that underflows would give the weight 0.
    router = eqx.tree_at(lambda r: r.gate.weight, router, 0 * router.gate.weight)
    experts = bx.Experts(1, hidden, 1, activation=SWIGLU, key=jax.random.key(0))
    where = lambda e: (e.gate_up, e.down)  # noqa: E731
    experts = eqx.tree_at(where, experts, (expert.gate_up[None], expert.down[None]))
    return bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, backend))


def as_layer(expert, backend):
    """The expert as it is, or as a routed block on a backend."""
    return expert if backend == "shared" else one_routed(expert, backend)


@eqx.filter_jit
def output_and_gradient(module, hidden_states):
    """Output, and the gradient of its first column, for the hidden states."""

    def first_column(x):
        output = module(x)
        output = (output if isinstance(module, bx.FeedForward) else output[0]).astype(x.dtype)
        return jnp.sum(output[:, 0]), output

    gradient, output = jax.grad(first_column, has_aux=True)(hidden_states)
    return output, gradient


EXPERT_CASES = [
    *(("shared", dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)),
    *((backend, jnp.bfloat16) for backend in BACKEND_NAMES),
]


@pytest.mark.hazard(38)
@pytest.mark.parametrize(("backend", "dtype"), EXPERT_CASES)
def test_shared_and_routed_experts_are_clamped_alike(dtype, backend):
    pairs = [(g, u) for g in (-20.0, 9.99, 10.0, 10.01, 1e4) for u in (-10.01, -10.0, 10.0, 1e4)]
    hidden_states = jnp.asarray(np.array(pairs).astype(dtype))
    value, gradient = output_and_gradient(as_layer(one_by_one(dtype), backend), hidden_states)
    wide = np.asarray(hidden_states, np.float64)
    want = expected(wide[:, 0], wide[:, 1])
    got = (value[:, 0], gradient[:, 0], gradient[:, 1])
    for a, b in zip(got, want, strict=True):
        tolerance = 3 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=1e-6)


@pytest.mark.hazard(39, "float16 products that overflow stay finite; bfloat16 is rounded once")
@pytest.mark.parametrize("backend", ["shared", *BACKEND_NAMES])
def test_a_product_beyond_the_largest_float16_is_finite(backend):
    """512 terms of 40 * 40 are +-819,200; the largest float16 is 65,504."""
    expert = bx.FeedForward(512, 1, activation=SWIGLU, dtype=jnp.float16, key=jax.random.key(0))
    where = lambda e: (e.gate_up, e.down)  # noqa: E731
    hidden_states = jnp.full((4, 512), 40.0, jnp.float16)
    for gate, want in ((-40.0, 0.0), (40.0, 99.9955)):
        weights = (jnp.full((2, 1, 512), gate, jnp.float16), jnp.full((1, 512), 1.0, jnp.float16))
        expert = eqx.tree_at(where, expert, weights)
        output, gradient = output_and_gradient(as_layer(expert, backend), hidden_states)
        assert output.dtype == jnp.float16 and not np.asarray(gradient).any()
        np.testing.assert_array_equal(np.asarray(output), np.float16(want))


@pytest.mark.hazard(9)
def test_weights_of_another_dtype_than_the_tokens():
    """bfloat16 tokens through float32 weights are those tokens through them, rounded at the end."""
    block = layer("top_k").routed
    hidden_states = make_inputs((8,))[0].astype(jnp.bfloat16)
    output, routing = eqx.filter_jit(block)(hidden_states)
    wide, wide_routing = eqx.filter_jit(block)(hidden_states.astype(jnp.float32))
    assert output.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    assert eqx.tree_equal(routing, wide_routing)
    # The activations are rounded between the two products as well.
    np.testing.assert_allclose(
        np.asarray(output, np.float64), np.asarray(wide, np.float64), rtol=2e-2, atol=2e-2
    )


def layer_and_tokens(kind, backend, dtype):
    sizes, keys = (HIDDEN, EXPERTS, SLOTS), jax.random.split(jax.random.key(0), 3)
    options = {"scaling_factor": 1.5, "dtype": dtype, "key": keys[0]}
    if kind == "hash":
        options["table"] = bx.hash_tables.md5(VOCAB, EXPERTS, SLOTS)
    router = {"hash": bx.HashRouter, "top_k": bx.TopKRouter}[kind](*sizes, **options)
    experts = bx.Experts(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype, key=keys[1])
    shared = bx.FeedForward(HIDDEN, INTERMEDIATE, dtype=dtype, key=keys[2])
    block = bx.RoutedAndSharedMoE(
        bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, backend)), shared
    )
    return block, jnp.ones((4, HIDDEN), dtype)


@pytest.mark.hazard(40, "dtypes: the output as the input, int32 and float32 routing, x64 or not")
@pytest.mark.parametrize(("kind", "backend"), LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_float64_and_no_int64_leak_with_x64_on(kind, dtype, backend):
    def run():
        block, hidden_states = layer_and_tokens(kind, backend, dtype)

        def loss(inputs):
            output, routing = inputs[0](inputs[1], jnp.arange(4))
            return jnp.sum(output.astype(jnp.float32)), (output, routing)

        inputs = (block, hidden_states)
        (_, (output, routing)), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(inputs)
        trained = eqx.filter(inputs, eqx.is_inexact_array)
        moved = bx.rebalance(block, routing, 1e-3)
        bias = jnp.zeros(routing.scores.shape[-1], jnp.float32)
        histogram, moments = bx.bias_histogram(bias, routing), bx.loss_moments(routing)
        biases = bx.quantile_bias(bias, routing), bx.quantile_bias(bias, histogram)
        sums = histogram.counts, moments, bx.batch_balance_loss(moments), biases
        return output, routing, bx.expert_load(routing), gradients, trained, moved, sums

    with jax.enable_x64(True):
        output, routing, load, gradients, trained, moved, sums = eqx.filter_eval_shape(run)
    assert output.dtype == dtype and load.dtype == jnp.int32
    assert routing.indices.dtype == routing.dropped.dtype == jnp.int32
    assert routing.weights.dtype == routing.scores.dtype == routing.logits.dtype == jnp.float32
    for gradient, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(trained), strict=True):
        assert gradient.dtype == leaf.dtype
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(moved)}
    assert dtypes <= {jnp.dtype(dtype), jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("f4"), jnp.dtype("i4")}


@pytest.mark.hazard(40)
@every_backend
def test_float64_tokens_give_float64_with_a_float32_routing(backend):
    block = layer("top_k", backend)
    with jax.enable_x64(True):
        hidden_states = jnp.ones((4, HIDDEN), jnp.float64)
        output, routing = eqx.filter_eval_shape(block, hidden_states)
    assert hidden_states.dtype == output.dtype == jnp.float64
    assert routing.weights.dtype == jnp.float32 and routing.indices.dtype == jnp.int32

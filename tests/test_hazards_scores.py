"""Hazards 17 to 23: scores and weights are finite, exact where they can be, at every logit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hazard_inputs import by_hand, identity_router
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

import braidax as bx
from braidax._scoring import normalized

pytestmark = pytest.mark.optimized  # bounds in units of the last place

mpmath.mp.dps = 60
SIZE, CHOSEN, TOKENS = 6, 3, 4

value_and_slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: bx.sqrt_softplus(x))))


def exact(x):
    """Value and slope of sqrt(log(1 + e^x))."""
    x = mpmath.mpf(float(x))
    softplus = mpmath.log1p(mpmath.exp(x)) if x < 200 else x + mpmath.log1p(mpmath.exp(-x))
    value = mpmath.sqrt(softplus)
    return value, 1 / (1 + mpmath.exp(-x)) / (2 * value)


def worst_relative(got, want):
    return max(abs((mpmath.mpf(float(g)) - w) / w) for g, w in zip(got, want, strict=True))


# --- sqrt_softplus ----------------------------------------------------------------------------

# Below -173 the float32 slope is subnormal, which a CPU flushes to zero.
float32_range = st.floats(-173, 2.0**100, width=32) | st.floats(-173, 173, width=32)


@pytest.mark.hazard(17, "sqrt_softplus and its slope within 2e-7 in float32, 1e-15 in float64")
@given(arrays(np.float32, 16, elements=float32_range))
def test_any_float32_against_mpmath(x):
    truth = [exact(v) for v in x]
    for got, want in zip(value_and_slope(x), zip(*truth, strict=True), strict=True):
        assert worst_relative(np.asarray(got), want) <= 2e-7


@pytest.mark.hazard(17)
@pytest.mark.parametrize("x", [-176, -1e4, -3e38, -np.inf])
def test_far_below_is_exactly_zero(x):
    got = value_and_slope(jnp.full(16, x, jnp.float32))
    assert not np.asarray(got).any()


@pytest.mark.hazard(17)
@pytest.mark.hazard(
    22, "the reference's activation and routers, by formula and by its recorded outputs"
)
def test_float64_against_mpmath_and_the_reference_formula():
    """The reference is torch's softplus, which returns x itself above its threshold of 20: its
    own slope is off by 1.9e-9 there."""
    x = np.concatenate([np.linspace(-600, 100, 601), np.linspace(-80, 80, 400), [0.0, 1e30]])
    with jax.enable_x64(True):
        value, slope = (np.asarray(a) for a in value_and_slope(jnp.asarray(x, jnp.float64)))
    assert value.dtype == slope.dtype == np.float64
    truth = [exact(v) for v in x]
    assert worst_relative(value, [t[0] for t in truth]) <= 1e-15
    assert worst_relative(slope, [t[1] for t in truth]) <= 1e-15
    softplus = np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))
    sigmoid = np.where(x > 20, 1, 1 / (1 + np.exp(-np.minimum(x, 20))))
    near = np.abs(x) <= 80
    np.testing.assert_allclose(value[near], np.sqrt(softplus)[near], rtol=2e-9)
    reference_slope = sigmoid / (2 * np.sqrt(softplus))
    np.testing.assert_allclose(slope[near], reference_slope[near], rtol=2e-9)
    narrow = np.asarray(value_and_slope(x[near].astype(np.float32))[0], np.float64)
    rounded = x[near].astype(np.float32).astype(np.float64)
    softplus = np.where(rounded > 20, rounded, np.log1p(np.exp(np.minimum(rounded, 20))))
    np.testing.assert_allclose(narrow, np.sqrt(softplus), rtol=1e-6)


@pytest.mark.hazard(19, "its second derivative is finite and continuous, the function never falls")
def test_derivatives_of_second_order_in_both_modes():
    x = np.asarray([-170.0, -90.0, -20.0, -1.0, 0.0, 1.0, 30.0])
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        function = lambda x: bx.sqrt_softplus(jnp.asarray(x))  # noqa: E731
        check_grads(function, (x,), order=2, modes=("fwd", "rev"))


@pytest.mark.hazard(19)
@given(arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False)))
def test_never_falls(x):
    value = np.asarray(value_and_slope(np.sort(x))[0])
    # Infinities at the end compare equal; one unit in the last place is rounding.
    assert (value[1:] >= value[:-1] * np.float32(1 - 1.2e-7)).all()


# --- routers at extreme logits ----------------------------------------------------------------

extreme = st.sampled_from([-1e4, -400.0, -120.0, -88.0, -87.0, 0.0, 88.0, 1e4])
logits_tables = arrays(
    np.float32, (TOKENS, SIZE), elements=extreme | st.floats(-1e4, 1e4, width=32)
)
SCORE_FUNCTIONS = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "sqrtsoftplus": bx.sqrt_softplus,
}
# Each divided by the sum; softmax without it too, as DeepSeek-V2 has it.
GATES = [*((name, True) for name in SCORE_FUNCTIONS), ("softmax", False)]
ROUTER_CASES = [(kind, *gate) for kind in ("top_k", "hash") for gate in GATES]


@eqx.filter_jit
def routing_and_gradients(router, hidden_states):
    """Gradients of an uneven sum of the weights, for the gate and the hidden states."""

    def loss(inputs):
        weight, hidden_states = inputs
        routing = eqx.tree_at(lambda r: r.gate.weight, router, weight)(
            hidden_states, jnp.arange(TOKENS)
        )
        return jnp.sum(routing.weights * jnp.arange(1.0, CHOSEN + 1)[None]), routing

    gradients, routing = jax.grad(loss, has_aux=True)((router.gate.weight, hidden_states))
    return routing, *gradients


@pytest.mark.hazard(20, "extreme logits: finite gradients, exactly 0 for experts not selected")
@pytest.mark.hazard(
    21, "weights finite, not negative, summing to the scaling factor; 0 if all underflow"
)
@pytest.mark.parametrize(("kind", "name", "normalize"), ROUTER_CASES)
@given(logits_tables)
def test_any_logits_give_finite_weights_and_gradients(kind, name, normalize, logits):
    options = {"score_function": SCORE_FUNCTIONS[name], "normalize": normalize}
    router = identity_router(kind, SIZE, CHOSEN, scaling_factor=2.5, **options)
    routing, gate_gradient, gradient = routing_and_gradients(router, jnp.asarray(logits))
    weights, indices = np.asarray(routing.weights), np.asarray(routing.indices)
    for array in (weights, gate_gradient, gradient):
        assert np.isfinite(np.asarray(array)).all()
    assert (weights >= 0).all() and (weights <= 2.5 * (1 + 1e-6)).all()
    if name != "softmax":  # Softmax couples all logits.
        unselected = ~(indices[..., None] == np.arange(SIZE)).any(axis=1)
        assert not np.asarray(gradient)[unselected].any()
        never = unselected.all(axis=0)
        assert not np.asarray(gate_gradient)[never].any()
    if normalize:
        sums = np.take_along_axis(np.asarray(routing.scores, np.float64), indices, 1).sum(axis=1)
        assert (np.abs(weights.sum(axis=1) / 2.5 - 1) <= 1e-6)[sums > 1e-10].all()


@pytest.mark.hazard(20)
@pytest.mark.parametrize("name", ["sqrtsoftplus", "sigmoid"])
def test_an_unselected_logit_of_minus_infinity_has_exactly_zero_gradient(name):
    logits = jnp.asarray([1.0, 0.5, -120.0, -1e4, -jnp.inf])

    def weight_of_the_first(logits):
        return normalized(SCORE_FUNCTIONS[name](logits)[:2])[0]

    gradient = np.asarray(jax.grad(weight_of_the_first)(logits))
    assert gradient[0] > 0 > gradient[1] and not gradient[2:].any()


@pytest.mark.hazard(21)
@pytest.mark.parametrize("kind", ["top_k", "hash"])
@pytest.mark.parametrize("name", ["sqrtsoftplus", "sigmoid"])
def test_logits_that_all_underflow_give_zero_weights_and_gradients(kind, name):
    router = identity_router(kind, SIZE, CHOSEN, score_function=SCORE_FUNCTIONS[name])
    routing, gate_gradient, gradient = routing_and_gradients(
        router, jnp.full((TOKENS, SIZE), -400.0)
    )
    for array in (routing.weights, gate_gradient, gradient):
        assert not np.asarray(array).any()


# Vectors on which implementations are known to differ; `test_routers.py` holds the others.
VECTORS = {
    "bias picks the third": (
        [1, 0.9, 0.8, -2],
        [0, 0, 0.0478495, 0],
        {},
        [0, 2],
        [0.514317, 0.485683],
    ),
    "two to one": ("scores", [2, 1], {}, [0, 1], [2 / 3, 1 / 3]),
    "scale after the division": ("scores", [2, 1], {"scaling_factor": 1.5}, [0, 1], [1.0, 0.5]),
    "no division": (
        "scores",
        [2, 1],
        {"scaling_factor": 1.5, "normalize": False},
        [0, 1],
        [3.0, 1.5],
    ),
    "softmax, divided": (
        np.log([4, 2, 1, 1]),
        [0, 0, 0, 0],
        {"score_function": jax.nn.softmax},
        [0, 1],
        [2 / 3, 1 / 3],
    ),
    "softmax, not divided": (
        np.log([4, 2, 1, 1]),
        [0, 0, 0, 0],
        {"score_function": jax.nn.softmax, "normalize": False},
        [0, 1],
        [1 / 2, 1 / 4],
    ),
}


@pytest.mark.hazard(23, "the vectors on which other libraries differ")
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_other_libraries(name):
    logits, second, options, indices, weights = VECTORS[name]
    bias = second
    if isinstance(logits, str):
        logits, bias = list(np.log(np.expm1(np.square(second)))), [0, 0]
    padding = 16 - len(logits)
    routing = by_hand(list(logits) + [-30] * padding, list(bias) + [0] * padding, **options)
    assert sorted(routing.indices.tolist()) == indices
    order = np.argsort(np.asarray(routing.indices))
    np.testing.assert_allclose(np.asarray(routing.weights)[order], weights, rtol=0, atol=1e-6)

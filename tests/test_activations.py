"""Activations against float64 numpy, alone and inside of experts with biases."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, make_dispatch, slow_but_one

import braidax as bx


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def silu_of_clamped(limit):
    return lambda gate, up: (
        np.minimum(gate, limit) * sigmoid(np.minimum(gate, limit)) * np.clip(up, -limit, limit)
    )


def exact_geglu(gate, up):
    return gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2 * up


def tanh_geglu(gate, up):
    cubic = gate + 0.044715 * gate**3
    return gate * (1 + np.tanh(math.sqrt(2 / math.pi) * cubic)) / 2 * up


def gpt_oss(gate, up):
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def relu_squared(up):
    return np.maximum(up, 0.0) ** 2


ACTIVATIONS = {
    "swiglu": (bx.activations.swiglu(), silu_of_clamped(np.inf)),
    "clamped swiglu": (bx.activations.swiglu(2.0), silu_of_clamped(2.0)),
    "geglu": (bx.activations.geglu(), tanh_geglu),
    "exact geglu": (bx.activations.geglu(approximate=False), exact_geglu),
    "gpt_oss": (bx.activations.gpt_oss(), gpt_oss),
    "relu_squared": (bx.activations.relu_squared(), relu_squared),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def arguments(name, count):
    """Values for each argument, none of them at a clamp, where there is no derivative."""
    number = 1 if name == "relu_squared" else 2
    return np.random.default_rng(0).uniform(-9, 9, (number, count))


@every_activation
def test_value_and_derivatives(name):
    activation, reference = ACTIVATIONS[name]
    points = arguments(name, 50)
    assert_close(activation(*map(jnp.float32, points)), reference(*points))
    for argument, _ in enumerate(points):
        step = np.zeros_like(points)
        step[argument] = 1e-5
        # A difference of float64 values: exact to 1e-9.
        slope = (reference(*(points + step)) - reference(*(points - step))) / 2e-5
        ours = jax.grad(lambda *a: activation(*a).sum(), argument)(*map(jnp.float32, points))
        assert_close(ours, slope)


@every_activation
@pytest.mark.parametrize("gate, value", [(-np.inf, 0.0), (-3e38, 0.0), (-1e4, 0.0)])
def test_the_far_side_is_zero(name, gate, value):
    """Value and derivative, where products of the gate overflow."""
    activation, _ = ACTIVATIONS[name]
    rest = () if name == "relu_squared" else (jnp.float32(1.0),)
    assert jax.value_and_grad(activation)(jnp.float32(gate), *rest) == (value, 0.0)


@pytest.mark.parametrize("approximate", [True, False])
@pytest.mark.parametrize("gate", [100.0, 1e4, 1e30])
def test_geglu_of_a_large_gate_is_linear(gate, approximate):
    activation = bx.activations.geglu(approximate=approximate)
    got = jax.value_and_grad(activation)(jnp.float32(gate), jnp.float32(1.0))
    np.testing.assert_allclose(got, (gate, 1.0), rtol=1e-6)


def test_equal_when_their_numbers_are():
    activations = bx.activations
    assert activations.gpt_oss() == activations.gpt_oss(7, 1.702) != activations.gpt_oss(8.0)
    assert activations.geglu() == activations.geglu() != activations.geglu(approximate=False)
    assert hash(activations.relu_squared()) == hash(activations.relu_squared())


@pytest.mark.parametrize("make", [bx.activations.swiglu, bx.activations.gpt_oss])
@pytest.mark.parametrize("limit", [0.0, -1.0, np.nan])
def test_a_limit_is_positive(unchecked, make, limit):
    with pytest.raises(ValueError, match="`limit` must be"):
        make(limit)


def test_gpt_oss_without_a_limit():
    value = bx.activations.gpt_oss(None)(jnp.float32(20.0), jnp.float32(20.0))
    np.testing.assert_allclose(value, 420.0, rtol=1e-6)


def test_geglu_takes_a_bool(unchecked):
    with pytest.raises(TypeError, match="`approximate` must be"):
        bx.activations.geglu(approximate=1)


def experts_and_arrays(name):
    """Experts with biases that are not 0, and the same numbers in float64."""
    experts = bx.Experts(
        3, 5, 4, activation=ACTIVATIONS[name][0], use_bias=True, key=jax.random.key(0)
    )
    rng = np.random.default_rng(1)
    experts = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), experts)
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    return experts, [np.asarray(getattr(experts, name), np.float64) for name in names]


@pytest.mark.parametrize("backend", slow_but_one(["blocks", "ragged", "dense"]))
@pytest.mark.parametrize("name", ["geglu", "gpt_oss", "relu_squared"])
def test_experts_with_biases(name, backend):
    """Each token by each of its experts, one at a time; and the gradient of a bias by a difference
    of the same sum."""
    experts, (gate_up, down, gate_up_bias, down_bias) = experts_and_arrays(name)
    reference = ACTIVATIONS[name][1]
    tokens = np.random.default_rng(2).normal(size=(6, 5))
    router = bx.TopKRouter(5, 3, 2, key=jax.random.key(1))
    block = bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, backend))

    def by_token(indices, weights, gate_up_bias):
        output = np.zeros_like(tokens)
        for t, token in enumerate(tokens):
            for expert, weight in zip(indices[t], weights[t], strict=True):
                before = gate_up[expert] @ token + gate_up_bias[expert]
                output[t] += weight * (reference(*before) @ down[expert] + down_bias[expert])
        return output

    def total(bias, block):
        block = eqx.tree_at(lambda b: b.experts.gate_up_bias, block, bias)
        output, routing = block(jnp.float32(tokens))
        return output.sum(), (output, routing)

    loss = eqx.filter_jit(jax.grad(total, has_aux=True))
    gradient, (output, routing) = loss(experts.gate_up_bias, block)
    chosen = np.asarray(routing.indices), np.asarray(routing.weights, np.float64)
    assert_close(output, by_token(*chosen, gate_up_bias))
    step = np.zeros_like(gate_up_bias)
    step[1, 0, 2] = 1e-6
    ends = (by_token(*chosen, gate_up_bias + sign * step).sum() for sign in (1, -1))
    higher, lower = ends
    assert_close(gradient[1, 0, 2], (higher - lower) / 2e-6)

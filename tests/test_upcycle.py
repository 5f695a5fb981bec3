"""A dense network as a mixture: its output at step 0, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import braidax as bx

DENSE = {
    "swiglu": bx.activations.swiglu(2.0),
    "geglu": bx.activations.geglu(),
    "gpt_oss": bx.activations.gpt_oss(),
    "relu_squared": bx.activations.relu_squared(),
}
KEYS = jax.random.split(jax.random.key(0), 3)
TOKENS = 2 * jax.random.normal(KEYS[2], (5, 8))


def dense(name="swiglu", **options):
    network = bx.FeedForward(8, 6, activation=DENSE[name], key=KEYS[0], **options)
    if network.gate_up_bias is None:
        return network
    biases = (network.gate_up_bias + 0.5, network.down_bias - 0.25)
    return eqx.tree_at(lambda n: (n.gate_up_bias, n.down_bias), network, biases)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_the_output_of_the_dense_network(name, use_bias):
    network = dense(name, use_bias=use_bias)
    block = bx.upcycle(network, 4, 2, score_function=jax.nn.softmax, key=KEYS[1])
    output, routing = block(TOKENS)
    assert_close(output, network(TOKENS))
    assert len(np.unique(routing.indices)) > 2  # tokens go to different copies


def test_noise_is_relative_and_differs_between_copies():
    network = dense(dtype=jnp.bfloat16)
    block = bx.upcycle(network, 64, 2, noise=0.1, key=KEYS[1])
    for name in ("gate_up", "down"):
        array = np.asarray(getattr(block.experts, name), np.float64)
        original = np.asarray(getattr(network, name), np.float64)
        factor = (array / np.where(original == 0, np.nan, original))[:, original != 0]
        assert array.shape[0] == 64 and getattr(block.experts, name).dtype == jnp.bfloat16
        # Of thousands of numbers; bfloat16 rounds each to 1 part in 256.
        assert abs(factor.mean() - 1) < 0.01 and abs(factor.std() - 0.1) < 0.01
        assert (array[0] != array[1]).mean() > 0.9


REFUSED = [
    ({"noise": -1.0}, ValueError, "`noise` must be finite and at least 0. Got -1.0"),
    ({"noise": "0.1"}, TypeError, "`noise` must be a number"),
    ({"normalize": False}, ValueError, "`normalize` must be True"),
    ({"scaling_factor": 2.5}, ValueError, "`scaling_factor` must be 1"),
    ({"num_experts_per_token": 5}, ValueError, "num_experts=4. Got 5"),
    ({"feed_forward": eqx.nn.Identity()}, TypeError, "`feed_forward` must be a `FeedForward`"),
]


@pytest.mark.parametrize("options, error, message", REFUSED)
def test_what_cannot_be_upcycled(options, error, message, unchecked):
    given = {"feed_forward": dense(), "num_experts": 4, "num_experts_per_token": 2, **options}
    with pytest.raises(error, match=message):
        bx.upcycle(given.pop("feed_forward"), **given, key=KEYS[1])

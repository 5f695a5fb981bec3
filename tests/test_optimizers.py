"""The recommended split of a model, under optimizers that move what has no gradient, and others."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import braidax as bx

LOAD = np.array([5, 1, 2, 0])
START = np.array([1.0, -1.0, 0.5, 0.25], np.float32)
RATE = np.float32(0.25)
STEPS = 3

NOISE = optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1))
SCHEDULE_FREE = optax.contrib.schedule_free_adamw(0.1, weight_decay=0.1)
OPTIMIZERS = {
    "adafactor": optax.adafactor(0.1, weight_decay_rate=0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "fromage": optax.fromage(0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "micro_batches": optax.MultiSteps(optax.adamw(0.1, weight_decay=0.1), 2),
    "muon": optax.contrib.muon(0.1, weight_decay=0.1),
    "noise": NOISE,
    "novograd": optax.novograd(0.1, weight_decay=0.1),
    "prodigy": optax.contrib.prodigy(0.1, weight_decay=0.1),
    "schedule_free_adamw": SCHEDULE_FREE,
    "sgd": optax.sgd(0.1, momentum=0.9),
    "yogi": optax.yogi(0.1),
}


def train(optimizer, filter_spec):
    """Steps of a router whose load is always `LOAD`, each followed by the bias update."""
    router = bx.TopKRouter(8, 4, 2, key=jax.random.key(0))
    router = eqx.tree_at(lambda r: r.score_correction_bias, router, jnp.asarray(START))
    hidden_states = jax.random.normal(jax.random.key(1), (6, 8))
    state = optimizer.init(eqx.filter(router, filter_spec(router)))

    @eqx.filter_jit
    def step(router, state):
        parameters, rest = eqx.partition(router, filter_spec(router))
        loss = lambda p: jnp.sum(eqx.combine(p, rest)(hidden_states).scores ** 2)  # noqa: E731
        gradient = jax.grad(loss)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        router = eqx.combine(eqx.apply_updates(parameters, updates), rest)
        return bx.rebalance(router, jnp.asarray(LOAD), RATE), state

    trained = router
    for _ in range(STEPS):
        trained, state = step(trained, state)
    assert not np.array_equal(trained.gate.weight, router.gate.weight)
    return np.asarray(trained.score_correction_bias)


EXPECTED = START + STEPS * RATE * np.sign(LOAD.mean() - LOAD).astype(np.float32)


@pytest.mark.hazard(43)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_by_partition_the_bias_makes_its_own_steps_only(name):
    np.testing.assert_array_equal(train(OPTIMIZERS[name], bx.trainable), EXPECTED)


def decays(mask):
    return optax.adamw(0.1, weight_decay=0.1, mask=mask)


def test_the_mask_is_enough_for_decay_only():
    inexact = lambda tree: jax.tree.map(eqx.is_inexact_array, tree)  # noqa: E731
    np.testing.assert_array_equal(train(decays(bx.decay_mask), inexact), EXPECTED)
    # What the guide says about the others: each of them moves a bias whose gradient is zero.
    for optimizer in (decays(None), NOISE, SCHEDULE_FREE, optax.fromage(0.1)):
        assert np.abs(train(optimizer, inexact) - EXPECTED).max() > 1e-3

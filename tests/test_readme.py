"""The README's training step, run as it is written."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import braidax as bx

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_training_step_runs_as_written():
    (recipe,) = re.findall(r"```python\n(optimizer = .*?)```", README.read_text(), re.DOTALL)
    config = bx.MoEConfig.tiny()
    model = bx.RoutedAndSharedMoE.from_config(config, layer_idx=2, key=jax.random.key(0))
    biased = jnp.linspace(-1, 1, config.num_experts)
    model = eqx.tree_at(lambda m: m.routed.router.score_correction_bias, model, biased)

    def loss_function(model, tokens):
        output, routing = model(tokens)
        return jnp.mean(output**2), [routing]

    names = {"bx": bx, "eqx": eqx, "jax": jax, "optax": optax, "loss_function": loss_function}
    exec(recipe, names)
    tokens = jax.random.normal(jax.random.key(1), (64, config.hidden_size))
    state = names["optimizer"].init(eqx.filter(model, bx.trainable(model)))
    trained, _, loss = names["step"](model, state, tokens)

    np.testing.assert_allclose(float(loss), float(loss_function(model, tokens)[0]), rtol=1e-5)
    assert float(loss_function(trained, tokens)[0]) < float(loss)
    load = np.asarray(bx.expert_load(model(tokens)[1]))
    moved = 1e-3 * np.sign(load.sum() - load * config.num_experts)
    bias = np.asarray(trained.routed.router.score_correction_bias)
    np.testing.assert_array_equal(bias, np.asarray(biased) + np.float32(moved))

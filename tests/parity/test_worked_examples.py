"""The family that the guide adds outside of the library, against transformers.

The other one, Llama-4, has a table, so `test_families.py` has its test.
"""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pages import run_page
from test_families import error, first, output_and_vjp
from tiny_models import HIDDEN, make_model, mixtures

import braidax as bx

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "guide" / "families.md"


@pytest.fixture(scope="module")
def page():
    """What the page defines."""
    return run_page(PAGE)


def experts(gate_up, down):
    """From (experts, 2, intermediate, hidden) and (experts, intermediate, hidden) of torch."""
    arrays = [jnp.asarray(a.detach().numpy()) for a in (gate_up, down)]
    made = bx.Experts(8, HIDDEN, 8, key=jax.random.key(0))
    return eqx.tree_at(lambda e: (e.gate_up, e.down), made, arrays)


def router(weight, slots, **options):
    made = bx.TopKRouter(HIDDEN, 8, slots, normalize=False, key=jax.random.key(0), **options)
    return eqx.tree_at(lambda r: r.gate.weight, made, jnp.asarray(weight.detach().numpy()))


def test_phi(page, record):
    """Two experts, one after the other, each with a softmax of its own.

    Outputs, and the gradients of the hidden states and of the router."""
    model, _ = make_model("phimoe")
    module = mixtures(model)[1]
    rows = module.experts.gate_up_proj.reshape(8, 2, 8, HIDDEN)
    mixer = router(module.router.weight, 2, score_function=page["sparse_mixer"])
    block = bx.RoutedMoE(mixer, experts(rows, module.experts.down_proj.transpose(1, 2)))
    hidden_states, cotangent = np.random.default_rng(0).standard_normal(
        (2, 2, 9, HIDDEN), np.float32
    )
    given = torch.from_numpy(hidden_states).requires_grad_()
    theirs = first(module(given)).reshape(given.shape)
    theirs.backward(torch.from_numpy(cotangent))
    ours, gradient, hidden_gradient = output_and_vjp(block, hidden_states, cotangent)
    errors = {
        "output": error(ours, theirs),
        "hidden states": error(hidden_gradient, given.grad),
        "weights": error(gradient.router.gate.weight, module.router.weight.grad),
    }
    record("phimoe", "worked example", errors)
    assert max(errors.values()) <= 1e-5, errors

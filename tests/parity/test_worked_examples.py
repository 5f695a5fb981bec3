"""The two families of the guide that its page adds outside of the library, against transformers."""

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


def compare(name, block, module, record):
    """Outputs, and the gradients of the hidden states and of the router."""
    hidden_states, cotangent = np.random.default_rng(0).standard_normal(
        (2, 2, 9, HIDDEN), np.float32
    )
    given = torch.from_numpy(hidden_states).requires_grad_()
    module.zero_grad()
    theirs = first(module(given)).reshape(2, 9, HIDDEN)
    theirs.backward(torch.from_numpy(cotangent))
    ours, gradient, hidden_gradient = output_and_vjp(block, hidden_states, cotangent)
    routed = gradient.routed if isinstance(gradient, bx.RoutedAndSharedMoE) else gradient
    errors = {
        "output": error(ours, theirs),
        "hidden states": error(hidden_gradient, given.grad),
        "weights": error(routed.router.gate.weight, module.router.weight.grad),
    }
    record(name, "worked example", errors)
    assert max(errors.values()) <= 1e-5, errors


def test_llama4(page, record):
    """The weight multiplies the expert's input."""
    model, _ = make_model("llama4_text")
    module = mixtures(model)[1]
    rows = module.experts.gate_up_proj.transpose(1, 2).reshape(8, 2, 8, HIDDEN)
    sigmoid = router(module.router.weight, 1, score_function=jax.nn.sigmoid)
    routed = bx.RoutedMoE(
        sigmoid, experts(rows, module.experts.down_proj), dispatch=page["WeightedInput"]()
    )
    parts = module.shared_expert
    weights = [
        torch.stack([parts.gate_proj.weight, parts.up_proj.weight]),
        parts.down_proj.weight.T,
    ]
    shared = eqx.tree_at(
        lambda s: (s.gate_up, s.down),
        bx.FeedForward(HIDDEN, 8, key=jax.random.key(0)),
        [jnp.asarray(a.detach().numpy()) for a in weights],
    )
    compare("llama4", bx.RoutedAndSharedMoE(routed, shared), module, record)


def test_phi(page, record):
    """Two experts, one after the other, each with a softmax of its own."""
    model, _ = make_model("phimoe")
    module = mixtures(model)[1]
    rows = module.experts.gate_up_proj.reshape(8, 2, 8, HIDDEN)
    mixer = router(module.router.weight, 2, score_function=page["sparse_mixer"])
    down = module.experts.down_proj.transpose(1, 2)
    compare("phimoe", bx.RoutedMoE(mixer, experts(rows, down)), module, record)

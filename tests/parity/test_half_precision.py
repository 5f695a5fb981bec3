"""What transformers 5.23 loses in bfloat16 and float16, beside ours. Every number is measured."""

import copy

import equinox as eqx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference as ref
import torch

import braidax as bx


def blocks(dtype, *, hidden=256, **sizes):
    """Their block in float32 and ours in `dtype`, from the same random arrays."""
    config = ref.make_reference_config(hidden=hidden, per_token=6, limit=1.0, **sizes)
    theirs = ref.make_reference_block(config).requires_grad_(False)
    ours = bx.from_state_dict(ref.moe_config(config), 0, ref.tensors(theirs), dtype=dtype)
    return theirs, ours


def test_the_gate_in_bfloat16():
    theirs, ours = blocks(jnp.bfloat16, intermediate=8, experts=256)
    hidden = np.random.default_rng(0).standard_normal((1024, 256)).astype(ml_dtypes.bfloat16)
    narrow = copy.deepcopy(theirs.gate).bfloat16()
    wide = copy.deepcopy(narrow).float()
    to_torch = torch.tensor(hidden.astype(np.float32))
    chosen = [
        np.sort(indices.numpy(), axis=-1)
        for indices in (
            narrow(to_torch.bfloat16())[2],
            wide(to_torch)[2],
            torch.tensor(np.array(ours.routed.router(jnp.asarray(hidden)).indices)),
        )
    ]
    theirs_bfloat16, theirs_float32, ours = chosen
    share = (theirs_bfloat16 != theirs_float32).any(axis=-1).mean()
    assert share == pytest.approx(0.095, rel=0.1)
    np.testing.assert_array_equal(ours, theirs_float32)


def test_the_sum_over_experts_in_bfloat16():
    """Same bfloat16 inputs, experts and weights; error against float64."""
    theirs, ours = blocks(jnp.bfloat16, intermediate=128, experts=32)
    hidden = np.random.default_rng(0).standard_normal((256, 256)).astype(ml_dtypes.bfloat16)
    to_torch = torch.tensor(hidden.astype(np.float32)).bfloat16()
    experts = copy.deepcopy(theirs.experts).bfloat16()
    _, weights, indices = theirs.gate(to_torch.float())
    weights = weights.bfloat16()
    exact = copy.deepcopy(experts).double()(to_torch.double(), indices, weights.double()).numpy()

    def error(output):
        return np.sqrt(np.mean((output - exact) ** 2) / np.mean(exact**2))

    scores = jnp.zeros((256, 32))
    routing = bx.Routing(
        indices=jnp.asarray(indices.numpy(), jnp.int32),
        weights=jnp.asarray(weights.float().numpy()),
        scores=scores,
        logits=scores,
        mask=None,
        dropped=jnp.zeros((), jnp.int32),
    )
    output, _ = ours.routed(jnp.asarray(hidden), routing=routing)
    ours_error = error(np.asarray(output, np.float64))
    assert ours_error == pytest.approx(1.7e-3, rel=0.1)
    for implementation, measured in (("eager", 4.6e-3), ("grouped_mm", 3.6e-3)):
        experts.config._experts_implementation = implementation
        theirs_error = error(experts(to_torch, indices, weights).double().numpy())
        assert theirs_error == pytest.approx(measured, rel=0.1)


def test_an_overflow_in_float16():
    """512 products of 40 and -40: -inf in float16, whose silu is NaN; the exact answer is 0."""
    theirs, ours = blocks(jnp.float16, hidden=512, intermediate=4, experts=8)
    shared = copy.deepcopy(theirs.shared_experts)
    shared.gate_proj.weight.data.fill_(-40)
    shared.up_proj.weight.data.fill_(1)
    output = shared.half()(torch.full((1, 512), 40.0).half())
    assert output.isnan().all()
    gate_up = jnp.stack([jnp.full((4, 512), -40.0), jnp.ones((4, 512))]).astype(jnp.float16)
    expert = eqx.tree_at(lambda expert: expert.gate_up, ours.shared, gate_up)
    np.testing.assert_array_equal(expert(jnp.full((1, 512), 40.0, jnp.float16)), 0)

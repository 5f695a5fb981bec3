"""Experts that stay in 4 bits, spread over devices: the answer of one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import make_block, make_mesh, make_tokens

import braidax as bx
from braidax._experts.packed import PackedMatrices

pytestmark = pytest.mark.slow


def packed_block():
    """Random FP4 numbers with a scale of 2^-3 for each group of 32 along the input."""
    block = make_block()
    rng = np.random.default_rng(0)

    def matrices(size_out, size_in, **form):
        experts = block.routed.router.gate.weight.shape[0]
        payload = rng.integers(0, 256, (experts, size_out, size_in // 2)).astype(np.uint8)
        scale = np.full((experts, size_out, -(-size_in // 32)), 124, np.uint8)
        arrays = map(jnp.asarray, (payload, scale))
        return PackedMatrices(*arrays, "float4_e2m1fn", (1, 32), **form)

    _, intermediate, hidden = block.routed.experts.down.shape
    return eqx.tree_at(
        lambda b: (b.routed.experts.gate_up, b.routed.experts.down),
        block,
        (
            matrices(2 * intermediate, hidden, parts=2),
            matrices(hidden, intermediate, transposed=True),
        ),
    )


def test_packed_experts_equal_one_device():
    block = packed_block()
    hidden_states, input_ids, _ = make_tokens(4, 8)
    parallel = bx.ExpertParallel(make_mesh())

    @eqx.filter_jit
    def output_and_gradient(block, hidden_states):
        def loss(hidden_states):
            output, _ = block(hidden_states, input_ids)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, has_aux=True)(hidden_states)

    desired, actual = (
        output_and_gradient(model, hidden_states) for model in (block, parallel.shard(block))
    )
    for ours, wanted in zip(actual, desired, strict=True):
        assert np.abs(wanted).max() > 0.01
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

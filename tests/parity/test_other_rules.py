"""Rules that other implementations had or have, in a few lines of numpy: their value beside ours.

The projects are not installed; each test names the public thread that shows the rule.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import reference as ref
import torch

import braidax as bx


def blocks(**options):
    config = ref.make_reference_config(hidden=16, intermediate=8, experts=8, per_token=2, **options)
    bias = np.array([2, 0, 0, 0, 0, 0, 0, 0], np.float32)
    theirs = ref.make_reference_block(config, bias=bias, spread=3.0)
    return theirs, bx.from_state_dict(ref.moe_config(config), 0, ref.tensors(theirs))


def inputs(tokens=5):
    return np.random.default_rng(0).standard_normal((1, tokens, 16), np.float32)


def test_shared_expert_without_the_clamp():
    """sgl-project/sglang #23776, huggingface/transformers #46018."""
    theirs, ours = blocks(limit=1.0)
    hidden = inputs()
    desired = theirs(torch.tensor(hidden)).detach().numpy()
    tensors = ref.tensors(theirs)
    gate, up = (hidden @ tensors[f"shared_experts.{name}_proj.weight"].T for name in ("gate", "up"))
    down = tensors["shared_experts.down_proj.weight"].T

    def swiglu(gate, up):
        return (gate / (1 + np.exp(-gate)) * up) @ down

    unclamped = swiglu(gate, up)
    clamped = swiglu(np.minimum(gate, 1), np.clip(up, -1, 1))
    output, _ = eqx.filter_jit(ours)(jnp.asarray(hidden))
    assert ref.relative_error(output, desired) < 1e-5
    assert ref.relative_error(output - clamped + unclamped, desired) > 0.5


def test_bias_that_leaks_into_the_weights():
    """huggingface/transformers #41647 and #41663."""
    theirs, ours = blocks(scaling=1.0)
    hidden = inputs()
    _, desired, indices = theirs.gate(torch.tensor(hidden))
    routing = ours.routed.router(jnp.asarray(hidden))
    order = np.argsort(indices.numpy(), axis=-1)
    desired = np.take_along_axis(desired.detach().numpy(), order, axis=-1)
    sorted_weights = np.take_along_axis(
        np.asarray(routing.weights[0]), np.argsort(routing.indices[0], axis=-1), axis=-1
    )
    np.testing.assert_allclose(sorted_weights, desired, rtol=1e-5)
    biased = np.asarray(routing.scores[0]) + np.asarray(ours.routed.router.score_correction_bias)
    leaked = np.take_along_axis(biased, np.asarray(routing.indices[0]), axis=-1)
    leaked /= leaked.sum(axis=-1, keepdims=True)
    assert np.abs(leaked - routing.weights[0]).max() > 0.1


def test_masked_groups_that_win_with_zero():
    """huggingface/transformers #45440, sgl-project/sglang #3705."""
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.07, 0.08], np.float32)
    corrected = scores - 0.5
    # Two groups of four; the first has the higher sum of two best.
    masked_with_zero = np.where(np.arange(8) < 4, corrected, 0)
    assert set(np.argsort(-masked_with_zero, kind="stable")[:2]) == {4, 5}
    router = bx.TopKRouter(
        8,
        8,
        2,
        score_function=jax.nn.sigmoid,
        num_groups=2,
        num_selected_groups=1,
        key=jax.random.key(0),
    )
    weight = np.diag(np.log(scores / (1 - scores)))
    router = eqx.tree_at(
        lambda router: (router.gate.weight, router.score_correction_bias),
        router,
        (jnp.asarray(weight), jnp.full(8, -0.5)),
    )
    np.testing.assert_array_equal(router(jnp.ones(8)).indices, [3, 2])


def test_an_expert_named_twice():
    """NVIDIA/Megatron-LM #6699: `scatter` keeps one of two weights where they should add up."""
    _, ours = blocks()
    hidden = jnp.asarray(inputs(1))
    routing = ours.routed.router(hidden)
    call = eqx.filter_jit(lambda routing: ours.routed(hidden, routing=routing)[0])

    def output(weights):
        fields = (jnp.full((1, 1, 2), 3, jnp.int32), jnp.asarray([[weights]], jnp.float32))
        return call(eqx.tree_at(lambda r: (r.indices, r.weights), routing, fields))

    twice, once, overwritten = output([0.2, 0.3]), output([0.5, 0.0]), output([0.0, 0.3])
    np.testing.assert_allclose(twice, once, rtol=1e-5)
    assert ref.relative_error(overwritten, twice) > 0.3


def test_scores_that_underflow():
    """sgl-project/sglang #34459: log(1 + e^x) is 0 below -16.64, and the token has no experts."""
    x = np.float32(-17)
    naive = np.sqrt(np.log(np.float32(1) + np.exp(x)))
    assert naive.dtype == np.float32 and naive == 0
    exact = np.sqrt(np.log1p(np.exp(-17.0)))
    np.testing.assert_allclose(bx.sqrt_softplus(jnp.asarray(x)), exact, rtol=1e-6)
    assert exact > 2e-4

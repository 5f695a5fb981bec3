"""bfloat16 parameters and inputs: a float32 gate, and one rounding between input and output."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BACKENDS, make_dispatch, slow_but_one

import braidax as bx
from braidax._matmul.block_loop import block_sizes

pytestmark = pytest.mark.optimized  # one rounding more or less is an error here

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, TOKENS, VOCAB = 256, 128, 32, 6, 256, 100
# Within reach of the activations, so that some are clamped.
LIMIT = 1.0


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.fixture(scope="module", params=slow_but_one(["top-k", "hash"]))
def case(request):
    """A layer, its inputs, and what float64 makes of their bfloat16 values."""
    config = bx.MoEConfig(
        *(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, VOCAB),
        scaling_factor=1.5,
        num_hash_layers=1,
        swiglu_limit=LIMIT,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    layer_idx = 0 if request.param == "hash" else 1
    moe = bx.RoutedAndSharedMoE.from_config(config, layer_idx, dtype=jnp.bfloat16, key=keys[0])
    if request.param == "top-k":
        bias = 0.1 * jax.random.normal(keys[1], (EXPERTS,))
        moe = eqx.tree_at(lambda moe: moe.routed.router.score_correction_bias, moe, bias)
    hidden_states = jax.random.normal(keys[2], (TOKENS, HIDDEN)).astype(jnp.bfloat16)
    input_ids = jax.random.randint(keys[3], (TOKENS,), 0, VOCAB, dtype=jnp.int32)
    return moe, hidden_states, input_ids, exact(moe, float64(hidden_states), np.array(input_ids))


def swiglu_with_rounded_activations(token, gate_up, down, limit):
    gate, up = gate_up @ token
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    activations = (gate / (1 + np.exp(-gate)) * up).astype(jnp.bfloat16)
    return activations.astype(np.float64) @ down


def exact(moe, tokens, input_ids):
    """Indices, weights and outputs in float64: with nothing rounded on the way, and with the
    routed experts' activations rounded as by a backend that multiplies bfloat16 by bfloat16."""
    router, experts, shared = moe.routed.router, moe.routed.experts, moe.shared

    def chosen(token_id):
        if isinstance(router, bx.HashRouter):
            return lambda scores: np.asarray(router.table)[token_id]
        bias = np.asarray(router.score_correction_bias, np.float64)
        return lambda scores: oracle.select(scores, bias, SLOTS)

    weight = float64(router.gate.weight)
    gates = [
        oracle.gate(token, weight, chosen(i), "sqrtsoftplus", True, 1.5)
        for token, i in zip(tokens, input_ids, strict=True)
    ]
    indices, weights = (np.array([gate[field] for gate in gates]) for field in (1, 2))
    gate_up, down = float64(experts.gate_up), float64(experts.down)
    routed = [
        oracle.routed(tokens, indices, weights, gate_up, down, LIMIT, network)
        for network in (oracle.swiglu, swiglu_with_rounded_activations)
    ]
    gate_up, down = float64(shared.gate_up), float64(shared.down)
    shared = [oracle.swiglu(token, gate_up, down, LIMIT) for token in tokens]
    return indices, weights, [output + shared for output in routed]


def test_the_gate_computes_in_float32(case):
    moe, hidden_states, input_ids, (indices, weights, _) = case
    router = moe.routed.router
    weight = router.gate.weight.astype(jnp.float32)
    wide = eqx.tree_at(lambda router: router.gate.weight, router, weight)
    route = eqx.filter_jit(lambda router, *inputs: router(*inputs))
    ours = route(router, hidden_states, input_ids)
    float32 = route(wide, hidden_states.astype(jnp.float32), input_ids)
    assert ours.weights.dtype == ours.scores.dtype == jnp.float32
    np.testing.assert_array_equal(ours.indices, float32.indices)
    np.testing.assert_array_equal(ours.weights, float32.weights)
    np.testing.assert_array_equal(ours.indices, indices)
    np.testing.assert_allclose(ours.weights, weights, rtol=1e-6)


@pytest.mark.hazard(30)
@pytest.mark.hazard(39)
@pytest.mark.parametrize("backend", BACKENDS, ids=[backend.name for backend in BACKENDS])
def test_the_output_is_rounded_once(case, backend):
    moe, hidden_states, input_ids, (_, _, (unrounded, rounded_activations)) = case
    output = unrounded if backend.wide_activations else rounded_activations
    dispatch = make_dispatch(bx, backend.name)
    moe = eqx.tree_at(lambda moe: moe.routed.dispatch, moe, dispatch)
    ours, _ = eqx.filter_jit(moe)(hidden_states, input_ids)
    assert ours.dtype == jnp.bfloat16
    # The distance of neighbouring bfloat16 numbers: 8 bits of precision.
    spacing = 2.0 ** (np.floor(np.log2(np.abs(output))) - 7)
    error = np.abs(float64(ours) - output) / spacing
    # Rounding to nearest moves a number by half a spacing; one more rounding anywhere and a fifth
    # of them are off. The rest are sums that cancel, with the float32 error of their terms.
    if backend.wide_activations:
        assert (error <= 0.501).mean() >= 0.999
        worst = 1e-6
    else:
        # A float32 error may tip a rounded activation to its other neighbour.
        assert (error <= 0.51).mean() >= 0.99 and (error <= 1).mean() >= 0.999
        worst = 2e-4
    beyond = np.abs(float64(ours) - output) - 0.501 * spacing
    assert beyond.max() <= worst * np.abs(output).max()


def test_rounded_operands_in_blocks_of_every_size(case):
    """XLA:CPU cannot run every product of bfloat16 numbers that it compiles. The six sizes of a
    block, forward and backward, against the exact kernel."""
    moe, hidden_states, input_ids, _ = case
    tokens, ids = jnp.tile(hidden_states, (5, 1)), jnp.tile(input_ids, 5)
    parameters, static = eqx.partition(moe, eqx.is_inexact_array)

    @eqx.filter_jit
    def gradients(parameters, tokens, round_operands):
        def loss(parameters, tokens):
            moe = eqx.combine(parameters, static)
            dispatch = bx.SortedDispatch(bx.matmul.Blocks(round_operands=round_operands))
            moe = eqx.tree_at(lambda moe: moe.routed.dispatch, moe, dispatch)
            return jnp.sum(jnp.sin(moe(tokens, ids)[0].astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1))(parameters, tokens)

    assert len(block_sizes(SLOTS * len(tokens), EXPERTS)) == 6
    exact, rounded = (jax.tree.leaves(gradients(parameters, tokens, r)) for r in (False, True))
    differs = False
    for one, other in zip(exact, rounded, strict=True):
        one, other = float64(one), float64(other)
        # Some of eight terms are off by half a spacing, 2**-9 of each.
        np.testing.assert_allclose(other, one, rtol=0, atol=2**-6 * np.abs(one).max())
        differs |= bool((one != other).any())
    assert differs

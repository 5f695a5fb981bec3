"""The parts that only some families have, each against float64 numpy: a gate on the shared expert,
a projection around the routed experts, and experts that hand a token on as it is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close, make_dispatch

import braidax as bx

HIDDEN, LATENT, INTERMEDIATE, EXPERTS, IDENTITY, SLOTS = 6, 4, 5, 4, 3, 3
every_backend = pytest.mark.parametrize("backend", ["blocks", "dense"])
KEYS = jax.random.split(jax.random.key(0), 6)
MASK = np.array([True, True, False, True, True])


def make_routed(backend="blocks", width=HIDDEN, num_identity=0, **options):
    num_experts = EXPERTS + num_identity
    router = bx.TopKRouter(HIDDEN, num_experts, SLOTS, scaling_factor=1.5, key=KEYS[0])
    # Logits of a few units: every expert is somebody's.
    router = eqx.tree_at(lambda r: r.gate.weight, router, replace_fn=lambda weight: 4 * weight)
    experts = bx.Experts(EXPERTS, width, INTERMEDIATE, key=KEYS[1])
    options |= {"dispatch": make_dispatch(bx, backend), "num_identity_experts": num_identity}
    return bx.RoutedMoE(router, experts, **options)


def tokens():
    """The third is padding, which may hold anything."""
    array = np.random.default_rng(0).normal(size=(len(MASK), HIDDEN)).astype(np.float32)
    array[2] = np.nan
    return array


def float64(array):
    return np.asarray(array, np.float64)


@eqx.filter_jit
def run(block, hidden_states, mask):
    """The output, and the gradients of its sum of squares."""

    def loss(block, hidden_states):
        output, routing = block(hidden_states, mask=mask)
        return jnp.square(output).sum(), (output, routing)

    both = eqx.filter_value_and_grad(lambda pair: loss(*pair), has_aux=True)
    (_, (output, routing)), gradients = both((block, hidden_states))
    return output, routing, gradients


def check(block, expected, changed):
    """`expected(block's numbers, token, indices, weights)` for each real token; 0 for padding. And
    the derivative with respect to one entry of `changed(block)`, by a difference."""
    output, routing, (gradient, token_gradient) = run(block, tokens(), MASK)
    chosen = np.asarray(routing.indices), float64(routing.weights)

    def everything(block):
        return np.array(
            [
                expected(block, float64(token), *row) if real else np.zeros(HIDDEN)
                for token, real, *row in zip(tokens(), MASK, *chosen, strict=True)
            ]
        )

    assert_close(output, everything(block))
    assert np.isfinite(token_gradient).all() and not token_gradient[2].any()
    leaf, step = float64(changed(block)), np.zeros(changed(block).shape)
    step.flat[1] = 1e-6
    ends = (
        np.square(everything(eqx.tree_at(changed, block, leaf + sign * step))).sum()
        for sign in (1, -1)
    )
    higher, lower = ends
    assert_close(changed(gradient).ravel()[1], (higher - lower) / 2e-6)


def expert(block, token, index, weight):
    gate_up, down = (float64(a[index]) for a in (block.experts.gate_up, block.experts.down))
    return weight * oracle.swiglu(token, gate_up, down, None)


def experts_sum(block, token, indices, weights):
    pairs = zip(indices, weights, strict=True)
    return sum(expert(block, token, index, weight) for index, weight in pairs)


@every_backend
def test_a_gate_on_the_shared_expert(backend):
    shared = bx.FeedForward(HIDDEN, 7, key=KEYS[2])
    gate = jax.random.normal(KEYS[3], (1, HIDDEN))
    block = bx.RoutedAndSharedMoE(make_routed(backend), shared, shared_gate=gate)

    def expected(block, token, indices, weights):
        routed = experts_sum(block.routed, token, indices, weights)
        shared = oracle.swiglu(
            token, *map(float64, (block.shared.gate_up, block.shared.down)), None
        )
        return routed + shared / (1 + np.exp(-float64(block.shared_gate)[0] @ token))

    check(block, expected, lambda block: block.shared_gate)


@every_backend
def test_a_projection_around_the_experts(backend):
    latent = bx.LatentProjection(HIDDEN, LATENT, key=KEYS[4])
    block = make_routed(backend, LATENT, latent=latent)

    def expected(block, token, indices, weights):
        narrow = float64(block.latent.down) @ token
        return float64(block.latent.up) @ experts_sum(block, narrow, indices, weights)

    check(block, expected, lambda block: block.latent.down)
    check(block, expected, lambda block: block.latent.up)


@every_backend
def test_experts_that_hand_a_token_on(backend):
    block = make_routed(backend, num_identity=IDENTITY)

    def expected(block, token, indices, weights):
        return sum(
            expert(block, token, index, weight) if index < EXPERTS else weight * token
            for index, weight in zip(indices, weights, strict=True)
        )

    check(block, expected, lambda block: block.experts.down)
    _, routing, _ = run(block, tokens(), MASK)
    load = np.asarray(bx.expert_load(routing))
    assert load[:EXPERTS].any() and load[EXPERTS:].any()  # both kinds were chosen
    assert load.sum() == SLOTS * MASK.sum() and int(routing.dropped) == 0


def test_a_token_of_nobody_may_hold_anything_beside_experts_that_do_nothing():
    block = make_routed("blocks", num_identity=IDENTITY)
    routing = bx.over_capacity(block.router(jnp.ones((2, HIDDEN))), 0)
    hidden_states = jnp.full((2, HIDDEN), jnp.nan)
    output, vjp = jax.vjp(lambda h: block(h, routing=routing)[0], hidden_states)
    assert not output.any() and not vjp(jnp.ones_like(output))[0].any()


def test_all_parts_at_once_under_vmap():
    """`jax.vmap` of the block is the block of a batch."""
    latent = bx.LatentProjection(HIDDEN, LATENT, key=KEYS[4])
    routed = make_routed("blocks", LATENT, IDENTITY, latent=latent)
    block = bx.RoutedAndSharedMoE(
        routed, bx.FeedForward(HIDDEN, 7, key=KEYS[2]), shared_gate=jnp.ones((1, HIDDEN))
    )
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(3, HIDDEN)), jnp.float32)
    assert_close(jax.vmap(lambda token: block(token)[0])(batch), block(batch)[0])


SIZES_THAT_DIFFER = {
    "`latent` must have": lambda: make_routed(latent=bx.LatentProjection(5, 4, key=KEYS[0])),
    "`experts` must have": lambda: make_routed(latent=bx.LatentProjection(6, 4, key=KEYS[0])),
    "`num_identity_experts` must be": lambda: make_routed(num_identity=-1),
    "`latent_size` must be": lambda: bx.LatentProjection(6, 0, key=KEYS[0]),
    "`shared_gate` must have": lambda: bx.RoutedAndSharedMoE(
        make_routed(), bx.FeedForward(HIDDEN, 7, key=KEYS[2]), shared_gate=jnp.ones((1, 5))
    ),
}


@pytest.mark.parametrize("message", SIZES_THAT_DIFFER)
def test_sizes_that_differ(message, unchecked):
    with pytest.raises(ValueError, match=message):
        SIZES_THAT_DIFFER[message]()

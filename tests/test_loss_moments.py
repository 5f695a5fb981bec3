"""Losses of micro-batches and devices: equal to those of the large batch, and so are gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_balance import make_routing, oracle_balance, random_scores

import braidax as bx

LOSSES = [bx.sequence_balance_loss, bx.batch_balance_loss, bx.router_z_loss]
EXPERTS, CHOSEN, HIDDEN, SEQUENCES, TOKENS = 8, 2, 16, 6, 5
# The micro-batches have 1, 10 and 8 valid tokens, and one sequence none at all.
MASK = np.ones((SEQUENCES, TOKENS), bool)
MASK[0, 1:], MASK[1], MASK[5, :2] = False, False, False
PARTS = [slice(0, 2), slice(2, 4), slice(4, 6)]


def make_router():
    router = bx.TopKRouter(HIDDEN, EXPERTS, CHOSEN, key=jax.random.key(0))
    weight = jax.random.normal(jax.random.key(1), (EXPERTS, HIDDEN))
    return eqx.tree_at(lambda router: router.gate.weight, router, weight)


def make_tokens():
    tokens = np.random.default_rng(2).normal(size=(SEQUENCES, TOKENS, HIDDEN))
    return jnp.asarray(np.where(MASK[..., None], tokens, np.nan), jnp.float32)


def summed(stacked):
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), stacked)


def weighted(moments, balance=0.5, z=0.25):
    """All three losses at once, so that each of their gradients counts."""
    losses = [loss(moments) for loss in LOSSES]
    return losses[0] + balance * losses[1] + z * losses[2]


def large_batch(router):
    return weighted(router(make_tokens(), mask=jnp.asarray(MASK)))


def test_moments_by_hand():
    scores, logits = random_scores(0, 3, 4, 6), np.random.default_rng(1).normal(size=(3, 4, 6))
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    scores[~mask] = logits[~mask] = np.nan
    moments = bx.loss_moments(make_routing(scores, 2, mask=mask, logits=logits))
    chosen = np.argsort(-scores[mask], axis=-1)[:, :2]
    np.testing.assert_array_equal(moments.counts, np.bincount(chosen.reshape(-1), minlength=6))
    shares = (scores[mask] / scores[mask].sum(axis=-1, keepdims=True)).sum(axis=0)
    np.testing.assert_allclose(moments.shares, shares, rtol=1e-6)
    squares = (np.log(np.exp(logits[mask]).sum(axis=-1)) ** 2).sum()
    np.testing.assert_allclose(moments.squares, squares, rtol=1e-6)
    sequences = 2 * oracle_balance(scores, 2, mask)
    np.testing.assert_allclose(moments.sequence_losses, sequences, rtol=1e-6)
    assert (int(moments.num_tokens), int(moments.num_sequences)) == (4, 2)


def test_values_of_sums_are_those_of_the_large_batch():
    router, tokens = make_router(), make_tokens()
    parts = [bx.loss_moments(router(tokens[part], mask=MASK[part])) for part in PARTS]
    total = parts[0] + parts[1] + parts[2]
    routing = router(tokens, mask=MASK)
    scores, logits = np.asarray(routing.scores, np.float64), np.asarray(routing.logits, np.float64)
    flat = scores.reshape(1, -1, EXPERTS), MASK.reshape(1, -1)
    expected = [
        oracle_balance(scores, CHOSEN, MASK),
        oracle_balance(flat[0], CHOSEN, flat[1]),
        np.mean(np.log(np.exp(logits[MASK]).sum(axis=-1)) ** 2),
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    for loss, value in zip(LOSSES, expected, strict=True):
        for given in (routing, total, summed(stacked)):
            np.testing.assert_allclose(loss(given), value, rtol=1e-6)
        # Nothing is merged unasked, and the mean of unequal micro-batches is another number.
        apart = loss(stacked)
        np.testing.assert_array_equal(apart, [loss(part) for part in parts])
        assert abs(float(apart.mean()) - value) > 1e-3


@pytest.fixture(scope="module")
def of_the_large_batch():
    return eqx.filter_jit(eqx.filter_value_and_grad(large_batch))(make_router())


def assert_same_gradient(actual, desired):
    actual, desired = actual.gate.weight, np.asarray(desired.gate.weight)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-6 * np.abs(desired).max())


def test_sums_inside_of_the_differentiated_function(of_the_large_batch):
    """A scan over micro-batches, each computed again in the backward pass."""
    batches = make_tokens().reshape(3, 2, TOKENS, HIDDEN), MASK.reshape(3, 2, TOKENS)

    def loss_of(router):
        @jax.checkpoint
        def micro_batch(_, batch):
            return None, bx.loss_moments(router(batch[0], mask=batch[1]))

        return weighted(summed(jax.lax.scan(micro_batch, None, batches)[1]))

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss_of))(make_router())
    np.testing.assert_allclose(value, of_the_large_batch[0], rtol=1e-6)
    assert_same_gradient(gradient, of_the_large_batch[1])


def test_a_gradient_for_each_micro_batch(of_the_large_batch):
    """By `optax.MultiSteps`, which takes the mean of the gradients, after a pass for the sums."""
    router, tokens = make_router(), make_tokens()

    @eqx.filter_jit
    def moments_of(router, tokens, mask):
        return bx.loss_moments(router(tokens, mask=mask))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def value_and_grad(router, total, tokens, mask):
        return weighted(total.with_gradient_of(moments_of(router, tokens, mask)))

    batches = [(tokens[part], MASK[part]) for part in PARTS]
    parts = [moments_of(router, *batch) for batch in batches]
    total = parts[0] + parts[1] + parts[2]
    optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
    parameters = eqx.filter(router, bx.trainable(router))
    state = optimizer.init(parameters)
    for batch in batches:
        value, gradient = value_and_grad(router, total, *batch)
        np.testing.assert_allclose(value, of_the_large_batch[0], rtol=1e-6)
        gradient = jax.tree.map(lambda leaf: len(batches) * leaf, gradient)
        gradient = eqx.filter(gradient, bx.trainable(router))
        updates, state = optimizer.update(gradient, state, parameters)
    assert_same_gradient(jax.tree.map(jnp.negative, updates), of_the_large_batch[1])


def test_devices_add_their_moments(of_the_large_batch):
    """Of three devices, one has a single valid token."""
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    arrays, static = eqx.partition(make_router(), eqx.is_array)
    data, whole = PartitionSpec("data"), PartitionSpec()

    @jax.shard_map(mesh=mesh, in_specs=(whole, data, data), out_specs=whole)
    def loss_of(arrays, tokens, mask):
        moments = bx.loss_moments(eqx.combine(arrays, static)(tokens, mask=mask))
        return weighted(jax.lax.psum(moments, "data"))

    value, gradient = jax.jit(jax.value_and_grad(loss_of))(arrays, make_tokens(), MASK)
    np.testing.assert_allclose(value, of_the_large_batch[0], rtol=1e-6)
    assert_same_gradient(gradient, of_the_large_batch[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_gathers_no_token(kind):
    scores = random_scores(3, 8, 64, EXPERTS)
    routing = make_routing(scores, CHOSEN, logits=np.log(scores))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    spec = lambda leaf: PartitionSpec(*["data"] * (leaf.ndim > 0))  # noqa: E731
    place = lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec(leaf)))  # noqa: E731
    spread = jax.tree.map(place, routing)
    for actual in (bx.loss_moments(spread), jax.jit(bx.loss_moments)(spread)):
        for one, other in zip(
            *map(jax.tree.leaves, (actual, bx.loss_moments(routing))), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    text = jax.jit(bx.loss_moments).lower(spread).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text

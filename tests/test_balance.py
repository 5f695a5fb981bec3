"""Load, losses and the bias update against hand-computed cases and plain loops."""

import inspect
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braidax as bx


def make_routing(scores, experts_per_token, *, mask=None, logits=None, indices=None):
    """A `Routing` over given scores; the selection is theirs unless `indices` says otherwise."""
    scores = np.asarray(scores, np.float32)
    if indices is None:
        indices = np.argsort(-scores, axis=-1, kind="stable")[..., :experts_per_token]
    indices = jnp.asarray(indices, jnp.int32)
    return bx.Routing(
        indices=indices,
        weights=jnp.ones(indices.shape, jnp.float32) / experts_per_token,
        scores=jnp.asarray(scores),
        logits=jnp.asarray(scores if logits is None else logits, jnp.float32),
        mask=None if mask is None else jnp.asarray(mask, bool),
        dropped=jnp.zeros((), jnp.int32),
    )


def random_scores(seed, *shape):
    return np.random.default_rng(seed).uniform(0.1, 1.0, shape)


def oracle_balance(scores, experts_per_token, mask):
    """DeepSeek-V3, eq. 17-20, in float64 loops over `scores` (groups, tokens, experts)."""
    losses = []
    for group, valid in zip(scores, mask, strict=True):
        tokens = [row.astype(np.float64) for row, keep in zip(group, valid, strict=True) if keep]
        if not tokens:
            continue
        num_experts, loss = len(tokens[0]), 0.0
        best = [sorted(range(num_experts), key=lambda i: -s[i])[:experts_per_token] for s in tokens]
        for expert in range(num_experts):
            count = sum(expert in chosen for chosen in best)
            fraction = num_experts / (experts_per_token * len(tokens)) * count
            share = sum(s[expert] / s.sum() for s in tokens) / len(tokens)
            loss += fraction * share
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0


# --- load -------------------------------------------------------------------------------------


def test_load_counts_by_hand():
    routing = make_routing(np.ones((4, 5)), 2, indices=[[0, 1], [1, 4], [1, 0], [4, 4]])
    load = bx.expert_load(routing)
    assert load.dtype == jnp.int32
    np.testing.assert_array_equal(load, [2, 3, 0, 0, 3])


@pytest.mark.hazard(42)
def test_load_skips_masked_tokens_and_sums_all_axes():
    indices = np.random.default_rng(0).integers(0, 7, (3, 2, 5, 4))
    mask = np.random.default_rng(1).random((3, 2, 5)) < 0.6
    routing = make_routing(np.ones((3, 2, 5, 7)), 4, indices=indices, mask=mask)
    expected = np.bincount(indices[mask].reshape(-1), minlength=7)
    np.testing.assert_array_equal(bx.expert_load(routing), expected)
    np.testing.assert_array_equal(jax.jit(bx.expert_load)(routing), expected)
    stacked = eqx.tree_at(lambda r: r.dropped, routing, jnp.zeros(3, jnp.int32))
    per_layer = [
        np.bincount(rows[valid].reshape(-1), minlength=7)
        for rows, valid in zip(indices, mask, strict=True)
    ]
    np.testing.assert_array_equal(bx.expert_load(stacked), per_layer)
    np.testing.assert_array_equal(jax.vmap(bx.expert_load)(stacked), per_layer)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_load_of_one_token_and_of_none(shape):
    routing = make_routing(random_scores(0, *shape, 4), 2)
    assert int(bx.expert_load(routing).sum()) == 2 * int(np.prod(shape))


def test_load_has_no_scatter():
    routing = make_routing(random_scores(0, 8, 4), 2, mask=np.ones(8))
    assert "scatter" not in str(jax.make_jaxpr(bx.expert_load)(routing))


@pytest.mark.parametrize(
    ("load", "violation", "entropy", "dead"),
    [
        ([3, 3, 3, 3], 0.0, 1.0, 0),
        ([8, 0, 0, 0], 3.0, 0.0, 3),
        ([4, 4, 0, 0], 1.0, 0.5, 2),
        ([5, 4, 3, 4], 0.25, None, 0),
        ([0, 0, 0, 0], 0.0, 0.0, 4),
        ([9], 0.0, 1.0, 0),
        ([0], 0.0, 0.0, 1),
        ([2**31 - 1] * 2, 0.0, 1.0, 0),
    ],
)
def test_load_statistics_by_hand(load, violation, entropy, dead):
    load = jnp.asarray(load, jnp.int32)
    if entropy is None:
        shares = np.asarray(load) / np.sum(load)
        entropy = -np.sum(shares * np.log(shares)) / np.log(len(shares))
    assert bx.max_violation(load).dtype == bx.load_entropy(load).dtype == jnp.float32
    np.testing.assert_allclose(bx.max_violation(load), violation, atol=1e-6)
    np.testing.assert_allclose(bx.load_entropy(load), entropy, atol=1e-6)
    assert bx.dead_experts(load).dtype == jnp.int32
    assert int(bx.dead_experts(load)) == dead


def test_load_statistics_per_layer():
    load = jnp.asarray([[[2, 2], [4, 0]], [[0, 0], [1, 3]]], jnp.int32)
    np.testing.assert_allclose(bx.max_violation(load), [[0, 1], [0, 0.5]], atol=1e-6)
    np.testing.assert_array_equal(bx.dead_experts(load), [[0, 1], [2, 0]])
    assert bx.load_entropy(load).shape == (2, 2)


# --- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "experts_per_token"), [((5,), 8), ((3, 6), 1), ((3, 6), 3), ((2, 2, 4), 2)]
)
def test_balance_losses_match_the_equations(shape, experts_per_token):
    scores = random_scores(3, *shape, 8)
    # The selection of the routing is biased; the loss must look at the scores alone.
    indices = np.zeros((*shape, experts_per_token))
    routing = make_routing(scores, experts_per_token, indices=indices)
    groups = scores.reshape(-1, shape[-1], 8)
    valid = np.ones(groups.shape[:2], bool)
    expected = oracle_balance(groups, experts_per_token, valid)
    np.testing.assert_allclose(jax.jit(bx.sequence_balance_loss)(routing), expected, rtol=1e-5)
    expected = oracle_balance(groups.reshape(1, -1, 8), experts_per_token, valid.reshape(1, -1))
    np.testing.assert_allclose(jax.jit(bx.batch_balance_loss)(routing), expected, rtol=1e-5)


def test_balance_losses_with_a_mask():
    scores = random_scores(4, 4, 5, 6)
    mask = np.random.default_rng(5).random((4, 5)) < 0.5
    mask[2], mask[3] = False, [True, False, False, False, False]
    scores[~mask] = np.nan
    routing = make_routing(scores, 2, mask=mask, indices=np.zeros((4, 5, 2)))
    expected = oracle_balance(scores, 2, mask)
    np.testing.assert_allclose(jax.jit(bx.sequence_balance_loss)(routing), expected, rtol=1e-5)
    expected = oracle_balance(scores.reshape(1, 20, 6), 2, mask.reshape(1, 20))
    np.testing.assert_allclose(jax.jit(bx.batch_balance_loss)(routing), expected, rtol=1e-5)


def test_one_token_is_a_sequence_of_one():
    scores = random_scores(6, 6)
    expected = oracle_balance(scores[None, None], 2, np.ones((1, 1), bool))
    routing = make_routing(scores, 2)
    np.testing.assert_allclose(jax.jit(bx.sequence_balance_loss)(routing), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(bx.batch_balance_loss)(routing), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [bx.sequence_balance_loss, bx.batch_balance_loss])
def test_one_at_perfect_balance_and_largest_at_collapse(loss):
    rolled = np.stack([np.roll([4.0, 3.0, 1.0, 0.5, 0.2, 0.1], i) for i in range(6)])
    np.testing.assert_allclose(loss(make_routing(rolled, 2)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(loss(make_routing(np.ones((6, 6)), 2)), 1.0, rtol=1e-6)
    collapsed = np.tile([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], (6, 1))
    np.testing.assert_allclose(loss(make_routing(collapsed, 2)), 6 / 2, rtol=1e-6)


def test_z_loss_matches_the_equation():
    logits = np.random.default_rng(7).normal(0, 3, (3, 4, 5))
    mask = np.random.default_rng(8).random((3, 4)) < 0.6
    logits[~mask] = np.nan
    expected = np.mean(np.log(np.sum(np.exp(logits[mask]), axis=-1)) ** 2)
    routing = make_routing(np.ones((3, 4, 5)), 2, logits=logits, mask=mask)
    np.testing.assert_allclose(bx.router_z_loss(routing), expected, rtol=1e-5)
    large = make_routing(np.ones((1, 2)), 1, logits=[[1000.0, 0.0]])
    np.testing.assert_allclose(bx.router_z_loss(large), 1e6, rtol=1e-6)


LOSSES = [bx.sequence_balance_loss, bx.batch_balance_loss, bx.router_z_loss]


def gradients(loss, routing):
    def value(scores, logits):
        return loss(eqx.tree_at(lambda r: (r.scores, r.logits), routing, (scores, logits)))

    return jax.jit(jax.grad(value, argnums=(0, 1)))(routing.scores, routing.logits)


@pytest.mark.hazard(15)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens(loss, shape):
    routing = make_routing(np.zeros((*shape, 4)), 2)
    assert float(jax.jit(loss)(routing)) == 0.0
    assert all(g.shape == (*shape, 4) for g in gradients(loss, routing))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_valid_token_has_value_and_gradient_zero(loss):
    routing = make_routing(np.full((2, 3, 4), np.nan), 2, mask=np.zeros((2, 3)))
    assert float(jax.jit(loss)(routing)) == 0.0
    for gradient in gradients(loss, routing):
        np.testing.assert_array_equal(gradient, np.zeros((2, 3, 4)))


@pytest.mark.parametrize("loss", LOSSES)
def test_dtype_is_float32(loss):
    assert loss(make_routing(random_scores(9, 3, 4), 2)).dtype == jnp.float32


def test_balance_gradient_against_finite_differences():
    scores = random_scores(10, 2, 4, 5).astype(np.float32).astype(np.float64)
    mask = np.array([[True, True, False, True], [True, False, True, True]])
    expected = np.zeros_like(scores)
    for position in np.ndindex(*scores.shape):
        up, down = scores.copy(), scores.copy()
        up[position] += 1e-6
        down[position] -= 1e-6
        expected[position] = (oracle_balance(up, 2, mask) - oracle_balance(down, 2, mask)) / 2e-6
    poisoned = np.where(mask[..., None], scores, np.nan)
    routing = make_routing(poisoned, 2, mask=mask, indices=np.zeros((2, 4, 2)))
    gradient, _ = gradients(bx.sequence_balance_loss, routing)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.all(np.asarray(gradient)[~mask] == 0)


def test_z_loss_gradient_by_formula():
    logits = np.random.default_rng(11).normal(0, 2, (3, 4))
    mask = np.array([True, False, True])
    total = np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    expected = np.where(mask[:, None], 2 * total * np.exp(logits - total) / 2, 0)
    poisoned = np.where(mask[:, None], logits, np.nan)
    routing = make_routing(np.ones((3, 4)), 2, logits=poisoned, mask=mask)
    _, gradient = gradients(bx.router_z_loss, routing)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_underflowed_scores_keep_gradients_finite(loss):
    routing = make_routing(np.full((3, 4), 1e-30), 2)
    assert np.isfinite(float(loss(routing)))
    assert np.all(np.isfinite(gradients(loss, routing)[0]))


# --- stacked routings, and what is no routing -------------------------------------------------


def test_stacked_routings_are_not_merged():
    """Three layers of two micro-batches, collapsed onto different experts: merged they would look
    balanced, and each of them is not."""
    scores = random_scores(12, 2, 3, 4, 6, 6)
    for layer in range(3):
        scores[:, layer, ..., 2 * layer : 2 * layer + 2] += 2
    routing = make_routing(scores, 2, logits=np.log(scores))
    routing = eqx.tree_at(lambda r: r.dropped, routing, jnp.zeros((2, 3), jnp.int32))
    assert routing.stacked == (2, 3)
    load = bx.expert_load(routing).sum(axis=0)
    np.testing.assert_array_equal(load, 48 * np.repeat(np.eye(3, dtype=int), 2, axis=1))
    np.testing.assert_allclose(bx.max_violation(load), [2, 2, 2], rtol=1e-6)

    valid = np.ones((4, 6), bool)
    calls = [[scores[i, j] for j in range(3)] for i in range(2)]
    expected = [[oracle_balance(call, 2, valid) for call in row] for row in calls]
    np.testing.assert_allclose(bx.sequence_balance_loss(routing), expected, rtol=1e-5)
    whole = [
        [oracle_balance(call.reshape(1, 24, 6), 2, valid.reshape(1, 24)) for call in row]
        for row in calls
    ]
    np.testing.assert_allclose(bx.batch_balance_loss(routing), whole, rtol=1e-5)
    squares = np.log(scores.sum(axis=-1)) ** 2
    np.testing.assert_allclose(bx.router_z_loss(routing), squares.mean(axis=(2, 3)), rtol=1e-5)


def test_a_capacity_is_that_of_each_stacked_call():
    indices = np.random.default_rng(13).integers(0, 4, (3, 5, 2))
    routing = make_routing(np.ones((3, 5, 4)), 2, indices=indices)
    routing = eqx.tree_at(lambda r: r.dropped, routing, jnp.asarray([0, 7, 0], jnp.int32))
    capped = bx.over_capacity(routing, 2)
    for layer, wanted in enumerate(indices.copy()):
        seen, dropped = [0] * 4, 0
        for token, slot in np.ndindex(5, 2):
            expert = wanted[token, slot]
            seen[expert] += 1
            if seen[expert] > 2:
                wanted[token, slot], dropped = 4, dropped + 1
        np.testing.assert_array_equal(capped.indices[layer], wanted)
        assert int(capped.dropped[layer]) == dropped + [0, 7, 0][layer]


OF_ROUTINGS = [bx.expert_load, bx.sequence_balance_loss, bx.batch_balance_loss, bx.router_z_loss]
OF_LOADS = [bx.max_violation, bx.load_entropy, bx.dead_experts]


@pytest.mark.parametrize("function", [*OF_ROUTINGS, lambda r: bx.over_capacity(r, 1)])
def test_what_is_no_routing_is_named(function, unchecked):
    routing = make_routing(np.ones((4, 5)), 2)
    for given, name in (
        (jnp.zeros(4, jnp.int32), "ArrayImpl"),
        ([routing], "list"),
        ((jnp.zeros((4, 8)), routing), "tuple"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=f"`routing` must be a Routing.*Got a {name}"):
            function(given)


@pytest.mark.parametrize("function", OF_LOADS)
def test_what_is_no_load_is_named(function, unchecked):
    routing = make_routing(np.ones((4, 5)), 2)
    for given, found in (
        (routing, "a Routing"),
        ([1, 2], "a list"),
        ((jnp.zeros((4, 8)), routing), "a tuple"),
        (jnp.zeros(4, bool), "dtype bool"),
    ):
        with pytest.raises(TypeError, match=f"`load` must be an array of counts.*Got {found}"):
            function(given)
    with pytest.raises(ValueError, match=r"`load` must have shape \(\*layers, experts\)"):
        function(jnp.int32(3))
    np.testing.assert_array_equal(function(np.array([2, 2])), function(jnp.array([2, 2])))


# --- bias update ------------------------------------------------------------------------------


@pytest.mark.hazard(41)
@pytest.mark.parametrize(
    ("load", "signs"),
    [
        ([5, 4, 3, 4], [-1, 0, 1, 0]),
        ([11] * 7, [0] * 7),
        ([3, 2, 2], [-1, 1, 1]),
        ([0, 0, 0], [0, 0, 0]),
        ([7], [0]),
        ([2**31 - 1, 2**31 - 1, 2**31 - 1], [0, 0, 0]),
        ([2**31 - 1, 2**31 - 2, 2**31 - 1], [-1, 1, -1]),
        ([2**31 - 1, 2**31 - 2, 2**31 - 3], [-1, 0, 1]),
        ([2**31 - 1, 0], [-1, 1]),
        # 2**24 + 1 has no float32, so a float mean would call these equal.
        ([2**24 + 1, 2**24, 2**24], [-1, 1, 1]),
    ],
)
def test_sign_rule_by_hand(load, signs):
    rate, bias = np.float32(0.001), np.linspace(-1, 1, len(load), dtype=np.float32)
    new = bx.updated_bias(jnp.asarray(bias), jnp.asarray(load, jnp.int32), 0.001)
    assert new.dtype == jnp.float32
    np.testing.assert_array_equal(new, bias + rate * np.asarray(signs, np.float32))


@pytest.mark.hazard(41)
@pytest.mark.parametrize("top", [3, 2000, 2**31])
@pytest.mark.parametrize("num_experts", [1, 7, 384])
def test_sign_rule_against_fractions(top, num_experts):
    for seed in range(5):
        load = np.random.default_rng(seed).integers(max(0, top - 1000), top, num_experts)
        mean = Fraction(sum(int(n) for n in load), num_experts)
        signs = [(mean > int(n)) - (mean < int(n)) for n in load]
        new = bx.updated_bias(jnp.zeros(num_experts), jnp.asarray(load, jnp.int32), 1.0)
        np.testing.assert_array_equal(new, np.asarray(signs, np.float32))


def test_layers_narrow_counts_and_traced_rate():
    load = np.array([[200, 100, 0], [1, 1, 1]])
    update = jax.jit(bx.updated_bias)
    for dtype in (jnp.uint8, jnp.int16, jnp.uint32):
        new = update(jnp.zeros((2, 3)), jnp.asarray(load, dtype), jnp.float32(0.5))
        np.testing.assert_array_equal(new, [[-0.5, 0, 0.5], [0, 0, 0]])


def test_many_narrow_counts_do_not_overflow():
    load = np.full(384, 255)
    load[0] = 1
    new = bx.updated_bias(jnp.zeros(384), jnp.asarray(load, jnp.uint8), 1.0)
    np.testing.assert_array_equal(new, np.where(load == 255, -1.0, 1.0))


def test_center_subtracts_the_mean_of_the_update():
    bias, load = jnp.asarray([0.5, 0.25, 0.0, 0.0]), jnp.asarray([9, 1, 1, 1])
    new = bx.updated_bias(bias, load, 0.5, center=True)
    np.testing.assert_allclose(new, [0.5 - 0.75, 0.25 + 0.25, 0.25, 0.25], rtol=1e-6)
    zero = bx.updated_bias(bias, jnp.zeros(4, jnp.int32), 0.5, center=True)
    np.testing.assert_array_equal(zero, bias)


@pytest.mark.hazard(3)
@pytest.mark.parametrize(
    ("bias", "load", "rate", "error", "message"),
    [
        (jnp.zeros(3), jnp.zeros(3, jnp.int32), float("nan"), ValueError, "`rate` must be finite"),
        (jnp.zeros(3), jnp.zeros(3, jnp.int32), jnp.inf, ValueError, "Got inf"),
        (jnp.zeros(3), jnp.zeros(3, jnp.int32), jnp.zeros(2), ValueError, "`rate` must be a scal"),
        (jnp.zeros(3), jnp.zeros(3, jnp.int32), len, TypeError, "`rate` must be a number. Got <bu"),
        (jnp.zeros(3), jnp.zeros(3), 0.1, TypeError, "`load` must have an integer.*float32"),
        (
            jnp.zeros(3),
            jnp.zeros(4, jnp.int32),
            0.1,
            ValueError,
            "`load` must be of 3 experts. Got 4",
        ),
        (jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), 0.1, ValueError, r"layers \(2,\).*Got \(\)"),
        (jnp.zeros(3, jnp.bfloat16), jnp.zeros(3, jnp.int32), 0.1, TypeError, "Got bfloat16: cast"),
    ],
)
def test_wrong_updates_are_named(bias, load, rate, error, message):
    # Unwrapped: the message a user reads who runs no type checker.
    with pytest.raises(error, match=message):
        inspect.unwrap(bx.updated_bias)(bias, load, rate)

"""Both routers against the oracle, and the mistakes a router must refuse or survive."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EXPERTS, HIDDEN, ROUTERS, SLOTS, VOCAB, assert_close, make_inputs, make_router

import braidax as bx

# By the names that the oracle has for them.
SCORE_FUNCTIONS = {
    "sqrtsoftplus": bx.sqrt_softplus,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
}


def by_hand(logits, bias=0.0, *, k=2, **options):
    """Route logits directly: hidden states are the logits, the gate is the identity."""
    logits = jnp.asarray(logits, jnp.float32)
    size = logits.shape[-1]
    router = bx.TopKRouter(size, size, k, key=jax.random.key(0), **options)
    bias = jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (size,))
    router = eqx.tree_at(
        lambda r: (r.gate.weight, r.score_correction_bias), router, (jnp.eye(size), bias)
    )
    return router(logits)


@pytest.mark.hazard(40)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_against_the_oracle(kind, normalize, score_function):
    options = {"normalize": normalize, "scaling_factor": 2.5}
    function = SCORE_FUNCTIONS[score_function]
    router = make_router(bx, kind, jax.random.key(3), score_function=function, **options)
    hidden_states, input_ids = make_inputs()
    routing = router(hidden_states, input_ids)
    tokens = np.asarray(hidden_states, np.float64).reshape(-1, HIDDEN)
    weight = np.asarray(router.gate.weight, np.float64)
    for t, token in enumerate(tokens):
        if kind == "hash":
            row = np.asarray(router.table)[np.asarray(input_ids).reshape(-1)[t]]
            chosen = lambda scores, row=row: list(row)  # noqa: E731
        else:
            bias = np.asarray(router.score_correction_bias, np.float64)
            chosen = lambda scores, bias=bias: oracle.select(scores, bias, SLOTS)  # noqa: E731
        scores, indices, weights = oracle.gate(token, weight, chosen, score_function, **options)
        assert routing.indices.reshape(-1, SLOTS)[t].tolist() == list(indices)
        assert_close(routing.weights.reshape(-1, SLOTS)[t], weights)
        assert_close(routing.scores.reshape(-1, EXPERTS)[t], scores)
    assert routing.indices.dtype == jnp.int32
    assert routing.weights.dtype == routing.scores.dtype == routing.logits.dtype == jnp.float32
    assert routing.mask is None and int(routing.dropped) == 0


# Vectors that tell mixed-up implementations apart: another score function, a bias that leaks
# into the weights, scaling before renormalising. Padded with experts at logit -30.
VECTORS = {
    "bias moves nothing here": ([3, 0], [0, 0.7], 1, {}, [0], [1.0]),
    "bias not in the weights": (
        [2, 1, 0, -1],
        [0, 0, 0.25, 0],
        2,
        {},
        [0, 1],
        [0.559980, 0.440020],
    ),
    "no bias": ([1, 0.9, 0.8, -2], [0, 0, 0, 0], 2, {}, [0, 1], [0.507059, 0.492941]),
    "a small bias moves the last expert": (
        [1, 0.9, 0.8, -2],
        [0, 0, 0.0478495, 0],
        2,
        {},
        [0, 2],
        [0.514317, 0.485683],
    ),
    # Scores of 2 and 1.
    "normalised": ([3.98151455, 0.54132485], [0, 0], 2, {}, [0, 1], [2 / 3, 1 / 3]),
    "scaled after it": (
        [3.98151455, 0.54132485],
        [0, 0],
        2,
        {"scaling_factor": 1.5},
        [0, 1],
        [1.0, 0.5],
    ),
    "scaled without it": (
        [3.98151455, 0.54132485],
        [0, 0],
        2,
        {"scaling_factor": 1.5, "normalize": False},
        [0, 1],
        [3.0, 1.5],
    ),
    "large bias": ([1, 0.9, 0.8, -2], [0, 0, 0, 10], 2, {}, [3, 0], [0.237158, 0.762842]),
    "scale last": ([2, 2], [5, 0], 2, {"scaling_factor": 1.5}, [0, 1], [0.75, 0.75]),
    "not key minus bias": (
        [-30, 0, -1, -2],
        [12, 0, 0, 0],
        2,
        {"normalize": False},
        [0, 1],
        [3.05902e-7, 0.832555],
    ),
    "large logits": (
        [100, 60, -100],
        [0, 0, 50],
        3,
        {"normalize": False},
        [2, 0, 1],
        [1.928750e-22, 10.0, 7.745967],
    ),
    "not sigmoid": ([3, 0, -1], [0, 1, 1.25], 1, {}, [1], [1.0]),
}


@pytest.mark.hazard(23)
@pytest.mark.parametrize("name", VECTORS)
def test_adversarial_vectors(name):
    logits, bias, k, options, indices, weights = VECTORS[name]
    padding = 16 - len(logits)
    routing = by_hand(logits + [-30] * padding, bias + [0] * padding, k=k, **options)
    assert routing.indices.tolist() == indices
    np.testing.assert_allclose(np.asarray(routing.weights), weights, rtol=1e-5, atol=1e-27)


def test_tiny_equal_scores_share_equally():
    bias = [0.25, 0.5] * 8
    weights = np.asarray(by_hand([-20.0] * 16, bias, k=8, scaling_factor=2.5).weights)
    assert (weights == weights[0]).all()
    np.testing.assert_allclose(weights, 0.3125, rtol=1.2e-7)  # a sum of eight may round once


@pytest.mark.hazard(29)
def test_masked_groups_are_minus_infinity_not_zero():
    """With 0 instead of -inf the masked experts 4 and 5 would beat negative biased scores."""
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.07, 0.08])
    logits = np.log(scores / (1 - scores))
    routing = by_hand(
        logits, -0.5, score_function=jax.nn.sigmoid, num_groups=2, num_selected_groups=1
    )
    assert routing.indices.tolist() == [3, 2]


@pytest.mark.hazard(29)
@pytest.mark.parametrize("group_score, num_summed", [("top2", 2), ("max", 1)])
def test_groups_against_the_oracle(group_score, num_summed):
    rng = np.random.default_rng(0)
    bias = rng.normal(size=12).astype(np.float32) * 0.3
    logits = rng.normal(size=(50, 12)).astype(np.float32)
    groups = {"num_groups": 4, "num_selected_groups": 2, "group_score": group_score}
    routing = by_hand(logits, bias, k=4, **groups)
    for row, got in zip(np.asarray(routing.scores, np.float64), routing.indices, strict=True):
        assert got.tolist() == oracle.select(row, bias, 4, 4, 2, num_summed)


def test_the_best_score_may_rank_groups_of_one_expert():
    groups = {"num_groups": 4, "num_selected_groups": 2, "group_score": "max"}
    assert by_hand([0.0, 3.0, 1.0, 2.0], **groups).indices.tolist() == [1, 3]


def test_softmax_weights_are_normalized_by_default():
    """exp(2) / (exp(2) + exp(1)); without, the shares among all four experts."""
    options = {"score_function": jax.nn.softmax}
    weights = by_hand([2.0, 1.0, 0.0, -1.0], **options).weights
    np.testing.assert_allclose(np.asarray(weights), [0.731059, 0.268941], rtol=1e-5)
    weights = by_hand([2.0, 1.0, 0.0, -1.0], normalize=False, **options).weights
    np.testing.assert_allclose(np.asarray(weights), [0.643914, 0.236883], rtol=1e-5)


def test_a_trained_bias_moves_logits_and_weights():
    gate = bx.Gate(2, 3, score_function=jax.nn.sigmoid, use_bias=True, key=jax.random.key(0))
    bias = jnp.asarray([0.0, 1.0, -1.0])
    gate = eqx.tree_at(lambda g: (g.weight, g.bias), gate, (jnp.zeros((3, 2)), bias))
    scores, logits = gate(jnp.ones(2))
    np.testing.assert_array_equal(np.asarray(logits), [0.0, 1.0, -1.0])
    np.testing.assert_allclose(np.asarray(scores), [0.5, 0.731059, 0.268941], rtol=1e-5)
    weights = gate.weigh(scores, jnp.asarray([1, 3, 0]))  # 3 is nobody
    np.testing.assert_allclose(np.asarray(weights), [0.593848, 0.0, 0.406152], rtol=1e-5)


class _KeyedRouter(bx.AbstractRouter):
    """A user's router: two fields and one method, here with a choice that is drawn."""

    gate: bx.Gate
    num_experts_per_token: int = eqx.field(static=True, default=1)

    def select(self, scores, logits, input_ids, *, key):
        indices = jax.random.randint(key, (*scores.shape[:-1], 1), 0, scores.shape[-1])
        return indices, jnp.ones(scores.shape[:-1], bool)


def test_the_key_of_a_block_reaches_select():
    router = _KeyedRouter(bx.Gate(HIDDEN, EXPERTS, key=jax.random.key(0)))
    experts = bx.Experts(EXPERTS, HIDDEN, 4, key=jax.random.key(1))
    _, routing = bx.RoutedMoE(router, experts)(jnp.ones((6, HIDDEN)), key=jax.random.key(3))
    drawn = jax.random.randint(jax.random.key(3), (6, 1), 0, EXPERTS)
    np.testing.assert_array_equal(np.asarray(routing.indices), np.asarray(drawn))


def test_temperature_divides_the_logits():
    cold = by_hand([1.0, 2.0, 3.0], temperature=0.5)
    np.testing.assert_allclose(np.asarray(cold.logits), [2.0, 4.0, 6.0], rtol=1e-6)


@pytest.mark.hazard(24)
def test_equal_scores_go_to_the_lower_index():
    assert by_hand([1.0, 2.0, 2.0, 2.0, 1.0]).indices.tolist() == [1, 2]
    tied = np.random.default_rng(0).integers(0, 3, (200, 16)).astype(np.float32)
    want = np.argsort(-tied, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(np.asarray(by_hand(tied, k=4).indices), want)


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_a_nan_score_poisons_its_row_only(nan):
    logits = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    clean = by_hand(logits)
    # The gate is the identity here, so one NaN makes all the logits of that token NaN.
    logits[1, 2] = nan
    routing = by_hand(logits)
    assert np.isnan(np.asarray(routing.weights[1])).all()
    for row in (0, 2):
        assert (routing.weights[row] == clean.weights[row]).all()
        assert (routing.indices[row] == clean.indices[row]).all()


@pytest.mark.hazard(4)
def test_a_nan_bias_is_loud():
    assert np.isnan(np.asarray(by_hand([1.0, 2.0, 3.0], [0.0, np.nan, 0.0]).weights)).all()


@pytest.mark.hazard(28)
def test_minus_infinity_loses_to_an_underflowed_score():
    # On selection itself: a gate of ones and zeros would make NaN out of -inf * 0.
    router = bx.TopKRouter(3, 3, 2, key=jax.random.key(0))
    logits = jnp.asarray([-jnp.inf, -400.0, 1.0])
    indices, defined = router.select(bx.sqrt_softplus(logits), logits, None, key=None)
    assert indices.tolist() == [2, 1] and bool(defined)


@pytest.mark.hazard(20)
def test_unselected_experts_have_exactly_zero_gradient_at_extreme_logits():
    router = bx.TopKRouter(4, 4, 2, key=jax.random.key(0))

    def loss(weight):
        router_ = eqx.tree_at(lambda r: r.gate.weight, router, weight)
        return router_(jnp.asarray([1.0, 0, 0, 0])).weights[0]

    gradient = jax.grad(loss)(jnp.zeros((4, 4)).at[:, 0].set(jnp.asarray([1, 0.5, -3, -120.0])))
    assert np.isfinite(np.asarray(gradient)).all()
    assert not np.asarray(gradient[2:]).any()
    assert np.asarray(gradient[:2, 0]).any()


@pytest.mark.hazard(26)
def test_no_gradient_reaches_the_bias():
    router = make_router(bx, "top_k", jax.random.key(0))
    hidden_states, _ = make_inputs()
    gradient = eqx.filter_grad(lambda r: jnp.sum(r(hidden_states).weights ** 2))(router)
    assert not np.asarray(gradient.score_correction_bias).any()
    assert np.asarray(gradient.gate.weight).any()


@pytest.mark.hazard(27)
def test_the_bias_keeps_small_steps_in_float32():
    """20.14 + 2e-5: in bfloat16 both would be 20.125."""
    bias = [20.14, 20.14002, 20.14]
    assert by_hand([0.0, 0.0, 0.0], bias, k=1).indices.tolist() == [1]
    router = bx.TopKRouter(4, 4, 1, dtype=jnp.bfloat16, key=jax.random.key(0))
    assert router.gate.weight.dtype == jnp.bfloat16
    assert router.score_correction_bias.dtype == jnp.float32


@pytest.mark.hazard(27)
def test_bfloat16_parameters_keep_a_float32_gate():
    router = bx.TopKRouter(256, 64, 6, dtype=jnp.bfloat16, key=jax.random.key(0))
    hidden_states = jax.random.normal(jax.random.key(1), (128, 256), jnp.bfloat16)
    wide = eqx.tree_at(lambda r: r.gate.weight, router, router.gate.weight.astype(jnp.float32))
    got, want = router(hidden_states), wide(hidden_states.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_gate_multiplies_at_the_highest_precision():
    router = make_router(bx, "top_k", jax.random.key(0))
    jaxpr = str(jax.make_jaxpr(lambda x: router(x).logits)(jnp.zeros((2, HIDDEN))))
    assert "HIGHEST" in jaxpr


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    "dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32]
)
def test_every_integer_type_of_ids(dtype):
    table = bx.hash_tables.md5(1000, EXPERTS, SLOTS)
    router = bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table, key=jax.random.key(0))
    routing = router(jnp.ones((3, HIDDEN)), jnp.asarray([0, 5, 100], dtype))
    np.testing.assert_array_equal(np.asarray(routing.indices), table[[0, 5, 100]])


@pytest.mark.hazard(14)
@pytest.mark.parametrize(
    "bad",
    [
        np.int32(-1),
        np.int32(VOCAB),
        np.int32(VOCAB + 1),
        np.int32(2**31 - 1),
        np.int32(-(2**31)),
        np.uint32(2**32 - 1),
        np.uint32(2**31),
        np.int8(-1),
    ],
)
def test_an_id_outside_the_table_poisons_its_token_only(bad):
    router = make_router(bx, "hash", jax.random.key(0))
    hidden_states = jax.random.normal(jax.random.key(1), (3, HIDDEN))
    ids = np.array([1, 2, 3], bad.dtype)
    call = eqx.filter_jit(router)
    clean = call(hidden_states, jnp.asarray(ids))
    ids[1] = bad
    routing = call(hidden_states, jnp.asarray(ids))
    assert np.isnan(np.asarray(routing.weights[1])).all()
    for row in (0, 2):
        assert (routing.weights[row] == clean.weights[row]).all()
        assert (routing.indices[row] == clean.indices[row]).all()


@pytest.mark.hazard(35)
def test_masked_tokens_may_hold_anything():
    router = make_router(bx, "hash", jax.random.key(0))
    hidden_states = jnp.ones((2, HIDDEN)).at[1].set(jnp.nan)
    routing = router(hidden_states, jnp.asarray([1, -100]), mask=jnp.asarray([True, False]))
    assert np.isfinite(np.asarray(routing.weights)).all()
    assert not np.asarray(routing.weights[1]).any()
    assert routing.indices[1].tolist() == [EXPERTS] * SLOTS  # nobody
    assert np.isfinite(np.asarray(routing.logits)).all()


CONSTRUCTION_ERRORS = [
    ({"num_experts_per_token": 0}, ValueError, "num_experts_per_token"),
    ({"num_experts_per_token": 6}, ValueError, "num_experts=5. Got 6"),
    ({"num_experts": 0}, ValueError, "num_experts"),
    ({"hidden_size": 2.5}, TypeError, "hidden_size"),
    ({"score_function": "sigmoid"}, TypeError, "score_function"),
    ({"scaling_factor": float("nan")}, ValueError, "scaling_factor"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"normalize": "false"}, TypeError, "normalize"),
    ({"num_groups": 2}, ValueError, "num_groups"),
    ({"num_experts": 6, "num_groups": 6}, ValueError, "at least 2"),
    ({"num_experts": 6, "num_groups": 3, "num_selected_groups": 4}, ValueError, "1 and 3. Got 4"),
    ({"num_experts": 6, "num_groups": 3, "num_selected_groups": 1}, ValueError, "1 \\* 2"),
    ({"num_groups": 1, "group_score": "sum"}, ValueError, "'top2' or 'max'. Got 'sum'"),
    ({"dtype": jnp.int32}, TypeError, "dtype"),
]


@pytest.mark.hazard(1, "sizes below 1, or more experts per token than experts: ValueError")
@pytest.mark.hazard(2, "an unknown score function: ValueError that lists the known ones")
@pytest.mark.hazard(8, "groups that do not divide, or hold too few experts: ValueError")
@pytest.mark.parametrize("options, error, text", CONSTRUCTION_ERRORS)
def test_construction_errors(options, error, text, unchecked):
    sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_token": SLOTS}
    with pytest.raises(error, match=text):
        bx.TopKRouter(**{**sizes, **options}, key=jax.random.key(0))
    if "num_groups" not in options:
        table = np.zeros((VOCAB, options.get("num_experts_per_token", SLOTS)), np.int32)
        with pytest.raises(error, match=text):
            bx.HashRouter(**{**sizes, **options}, table=table, key=jax.random.key(0))


@pytest.mark.hazard(5)
@pytest.mark.parametrize(
    "table, error, text",
    [
        (np.zeros((VOCAB, SLOTS)), TypeError, "integer"),
        (np.zeros((VOCAB, SLOTS), bool), TypeError, "integer"),
        (np.zeros((SLOTS, VOCAB), np.int32), ValueError, "num_experts_per_token=3"),
        (np.zeros(VOCAB, np.int32), ValueError, "\\(vocab"),
        (np.full((VOCAB, SLOTS), EXPERTS), ValueError, "5"),
        (np.full((VOCAB, SLOTS), -1), ValueError, "-1"),
        (np.full((VOCAB, SLOTS), 2**32 + 3, np.int64), ValueError, str(2**32 + 3)),
    ],
)
def test_table_errors(table, error, text, unchecked):
    with pytest.raises(error, match=text):
        bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table, key=jax.random.key(0))


def test_a_group_with_one_good_expert_beats_a_group_with_none():
    router = bx.TopKRouter(4, 4, 2, num_groups=2, num_selected_groups=1, key=jax.random.key(0))
    logits = jnp.asarray([-jnp.inf, -jnp.inf, 5.0, -jnp.inf])
    indices, _ = router.select(bx.sqrt_softplus(logits), logits, None, key=None)
    assert int(indices[0]) == 2


@pytest.mark.hazard(15)
def test_groups_without_tokens():
    router = bx.TopKRouter(HIDDEN, 8, 2, num_groups=4, num_selected_groups=2, key=jax.random.key(0))
    for batch in ((0,), (3, 0)):
        routing = router(jnp.zeros((*batch, HIDDEN)))
        assert routing.indices.shape == routing.weights.shape == (*batch, 2)
        assert bx.over_capacity(routing, 1).indices.shape == (*batch, 2)

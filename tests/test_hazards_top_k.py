"""Hazards 24 to 29: which experts are selected, to the last tie."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HIDDEN, ROUTERS, make_router
from hazard_inputs import by_hand, identity_router, route
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import braidax as bx

TOKENS, SIZE, CHOSEN = 8, 6, 3
tied_logits = arrays(np.float32, (TOKENS, SIZE), elements=st.integers(-2, 2).map(float))
logits_tables = arrays(np.float32, (TOKENS, SIZE), elements=st.floats(-5, 5, width=32))
biases = arrays(np.float32, SIZE, elements=st.floats(-4, 4, width=32))


def biased(bias, **options):
    router = identity_router("top_k", SIZE, CHOSEN, **options)
    return eqx.tree_at(lambda r: r.score_correction_bias, router, jnp.asarray(bias))


@eqx.filter_jit
def route_each(router, logits):
    return jax.vmap(router)(logits)


@pytest.mark.hazard(24, "ties go to the lower index: eager, jit and vmap")
@given(tied_logits)
def test_ties_go_to_the_lower_index_in_every_mode(logits):
    router = biased(np.zeros(SIZE, np.float32))
    want = np.argsort(-logits, axis=1, kind="stable")[:, :CHOSEN]
    for call in (router, lambda x: route(router, x), lambda x: route_each(router, x)):
        np.testing.assert_array_equal(np.asarray(call(jnp.asarray(logits)).indices), want)


@pytest.mark.hazard(25, "the selection is distinct, in range, and the best there is")
@given(logits_tables, biases)
def test_the_selection_is_distinct_in_range_and_the_best(logits, bias):
    routing = route(biased(bias), jnp.asarray(logits))
    corrected = np.asarray(routing.scores, np.float64) + bias
    for row, indices in zip(corrected, np.asarray(routing.indices), strict=True):
        assert len(set(indices)) == CHOSEN and 0 <= indices.min() <= indices.max() < SIZE
        best = max(
            row[list(chosen)].sum() for chosen in itertools.combinations(range(SIZE), CHOSEN)
        )
        assert row[indices].sum() >= best - 1e-5  # float32 rounding of score + bias, |sum| < 20


@pytest.mark.hazard(
    26, "the bias moves the selection only, a common bias nothing; its gradient is 0"
)
@given(logits_tables, biases, st.floats(-4, 4, width=32))
def test_a_common_bias_changes_nothing(logits, bias, constant):
    got = route(biased(bias), jnp.asarray(logits))
    shifted = route(biased(bias + np.float32(constant)), jnp.asarray(logits))
    corrected = np.sort(np.asarray(got.scores, np.float64) + bias, axis=1)
    # Rows whose choices are further apart than rounding to float32 moves them.
    gaps = np.diff(corrected, axis=1)[:, -CHOSEN:]
    decided = (gaps > 1e-5).all(axis=1)
    for name in ("indices", "weights", "scores"):
        a, b = np.asarray(getattr(got, name)), np.asarray(getattr(shifted, name))
        np.testing.assert_array_equal(a[decided], b[decided])


@pytest.mark.hazard(26)
@given(logits_tables, biases)
def test_weights_are_of_the_scores_alone(logits, bias):
    routing = route(biased(bias), jnp.asarray(logits))
    scores = np.asarray(routing.scores, np.float64)
    chosen = np.take_along_axis(scores, np.asarray(routing.indices), axis=1)
    want = chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(routing.weights), want, rtol=1e-5)


@pytest.mark.hazard(
    27, "bias and gate in float32 at the highest precision, bfloat16 parameters or not"
)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_gate_multiplies_in_float32_at_the_highest_precision(kind, dtype):
    router = make_router(bx, kind, jax.random.key(0), dtype=dtype)
    hidden_states, ids = jnp.zeros((2, HIDDEN), dtype), jnp.zeros(2, jnp.int32)
    jaxpr = jax.make_jaxpr(lambda x: router(x, ids).logits)(hidden_states)
    products = [equation for equation in eqx_equations(jaxpr.jaxpr) if "dot_general" in equation]
    assert len(products) == 1 and "HIGHEST" in products[0] and products[0].count(":f32[") >= 1


def eqx_equations(jaxpr):
    """Every equation as text, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        parameters = (getattr(p, "jaxpr", p) for p in jax.tree.leaves(equation.params))
        inner = [p for p in parameters if hasattr(p, "eqns")]
        if inner:
            for sub in inner:
                yield from eqx_equations(sub)
        else:
            yield str(equation)


@pytest.mark.hazard(
    28, "a NaN score of either sign: NaN for its token, no other row; -inf comes last"
)
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
@pytest.mark.parametrize("expert", [0, 4])
def test_one_nan_score_of_either_sign_poisons_its_row_only(nan, expert):
    router = biased(np.zeros(SIZE, np.float32))
    logits = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)
    scores = np.asarray(bx.sqrt_softplus(jnp.asarray(logits)))
    clean, defined = router.select(jnp.asarray(scores), jnp.asarray(logits), None, key=None)
    assert np.asarray(defined).all()
    broken = scores.copy()
    broken[1, expert] = np.copysign(np.float32(np.nan), nan)
    indices, defined = router.select(jnp.asarray(broken), jnp.asarray(logits), None, key=None)
    assert np.asarray(defined).tolist() == [True, False, True]
    assert expert in np.asarray(indices)[1]  # The answer does not hang on the sign.
    np.testing.assert_array_equal(np.asarray(indices)[[0, 2]], np.asarray(clean)[[0, 2]])


@pytest.mark.hazard(28)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_token_changes_no_other_row(kind, bad):
    router = make_router(bx, kind, jax.random.key(0))
    hidden_states = np.random.default_rng(0).normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    ids = jnp.arange(TOKENS)
    clean = route(router, jnp.asarray(hidden_states), ids)
    hidden_states[3, 2] = bad
    routing = route(router, jnp.asarray(hidden_states), ids)
    others = np.arange(TOKENS) != 3
    for name in ("indices", "weights", "scores", "logits"):
        a, b = np.asarray(getattr(routing, name)), np.asarray(getattr(clean, name))
        np.testing.assert_array_equal(a[others], b[others])
    if np.isnan(bad):
        assert np.isnan(np.asarray(routing.weights)[3]).all()


@pytest.mark.hazard(28)
@given(arrays(np.float32, (TOKENS, SIZE), elements=st.floats(-50, 50, width=32)))
def test_minus_infinity_is_never_selected_before_a_finite_logit(logits):
    router = biased(np.zeros(SIZE, np.float32))
    logits[:, [1, 4]] = -np.inf
    indices, defined = router.select(
        bx.sqrt_softplus(jnp.asarray(logits)), jnp.asarray(logits), None, key=None
    )
    assert np.asarray(defined).all() and not np.isin(np.asarray(indices), [1, 4]).any()


@pytest.mark.hazard(29, "groups left out score -inf and not 0")
def test_groups_with_negative_biased_scores():
    """All the bias below all the scores: the groups that are left out may still not win."""
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.07, 0.08])
    logits = np.log(scores / (1 - scores))
    options = {"score_function": jax.nn.sigmoid, "num_groups": 4, "num_selected_groups": 2}
    for bias in (-0.5, -3.0, -100.0):
        assert by_hand(logits, bias, k=4, **options).indices.tolist() == [3, 2, 1, 0]

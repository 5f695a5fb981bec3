"""`ExpertChoiceRouter` against its definition in plain numpy: experts take their best tokens."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EXPERTS, HIDDEN, INTERMEDIATE, assert_close, make_inputs

import braidax as bx

PER_TOKEN, LIMIT = 2, 0.4


def make_block(max_experts_per_token=None, dispatch=None, per_token=PER_TOKEN, **options):
    router = bx.ExpertChoiceRouter(
        HIDDEN,
        EXPERTS,
        per_token,
        max_experts_per_token=max_experts_per_token,
        key=jax.random.key(0),
        **options,
    )
    sizes, activation = (EXPERTS, HIDDEN, INTERMEDIATE), bx.activations.swiglu(LIMIT)
    experts = bx.Experts(*sizes, activation=activation, key=jax.random.key(1))
    return bx.RoutedMoE(router, experts, dispatch=dispatch or bx.SortedDispatch())


def of_logits(logits, **options):
    """Route logits directly: hidden states are the logits, the gate is the identity."""
    logits = jnp.asarray(logits, jnp.float32)
    size = logits.shape[-1]
    router = bx.ExpertChoiceRouter(size, size, key=jax.random.key(0), **options)
    router = eqx.tree_at(lambda r: r.gate.weight, router, jnp.eye(size))
    return router(logits)


def choices(scores, per_token, slots, mask=None):
    """`(indices, dropped)` for `(tokens, experts)`, one expert and then one token at a time."""
    tokens, experts = scores.shape
    real = [t for t in range(tokens) if mask is None or mask[t]]
    undefined = np.isnan(scores).any(axis=1)
    capacity = math.ceil(len(real) * per_token / experts)
    taken = [[] for _ in range(tokens)]
    for expert in range(experts):
        order = sorted(
            real, key=lambda t: (undefined[t], 0 if undefined[t] else -scores[t, expert], t)
        )
        for t in order[:capacity]:
            taken[t].append(expert)
    indices, dropped = np.full((tokens, slots), experts), 0
    for t, row in enumerate(taken):
        best = sorted(row, key=lambda e: (0 if undefined[t] else -scores[t, e], e))
        indices[t, : len(best[:slots])] = best[:slots]
        dropped += len(best[slots:])
    return indices, dropped


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("per_token, slots", [(1, EXPERTS), (2, EXPERTS), (2, 1)])
def test_values_and_all_gradients_by_the_definition(per_token, slots):
    """Choice, weights, output and every gradient, with the softmax differentiated by hand."""
    block, (hidden_states, _) = make_block(slots, per_token=per_token), make_inputs((13,))
    trained, static = eqx.partition(block, eqx.is_inexact_array)
    cotangent = jax.random.normal(jax.random.key(5), hidden_states.shape)

    @eqx.filter_jit
    def run(trained, hidden_states):
        apply = lambda trained, x: eqx.combine(trained, static)(x)  # noqa: E731
        output, vjp, routing = jax.vjp(apply, trained, hidden_states, has_aux=True)
        return output, routing, *vjp(cotangent)

    output, routing, d_block, d_hidden = run(trained, hidden_states)
    tokens, weight, gate_up, down, upstream = (
        np.asarray(array, np.float64)
        for array in (
            hidden_states,
            block.router.gate.weight,
            block.experts.gate_up,
            block.experts.down,
            cotangent,
        )
    )
    scores = softmax(tokens @ weight.T)
    indices, dropped = choices(scores, per_token, slots)
    np.testing.assert_array_equal(np.asarray(routing.indices), indices)
    assert int(routing.dropped) == dropped and (dropped > 0) == (slots < EXPERTS)
    assert (indices == EXPERTS).all(axis=1).any() == (per_token == 1)  # a token without an expert
    if slots == EXPERTS:
        assert bx.expert_load(routing).tolist() == [math.ceil(13 * per_token / EXPERTS)] * EXPERTS

    # Nobody as an expert of zeros.
    padded = np.pad(scores, ((0, 0), (0, 1)))
    weights = np.take_along_axis(padded, indices, axis=1)
    assert_close(routing.weights, weights)
    extended = (np.pad(a, ((0, 1), *[(0, 0)] * (a.ndim - 1))) for a in (gate_up, down))
    wanted = oracle.block_and_gradients(tokens, indices, weights, *extended, LIMIT, upstream)
    expected, d_tokens, d_weights, d_gate_up, d_down = wanted
    d_scores = np.zeros_like(padded)
    np.add.at(d_scores, (np.arange(13)[:, None], indices), d_weights)
    d_scores = d_scores[:, :-1]
    d_logits = scores * (d_scores - (scores * d_scores).sum(axis=1, keepdims=True))
    assert_close(output, expected)
    assert_close(d_hidden, d_tokens + d_logits @ weight)
    assert_close(d_block.router.gate.weight, d_logits.T @ tokens)
    assert_close(d_block.experts.gate_up, d_gate_up[:-1])
    assert_close(d_block.experts.down, d_down[:-1])


@pytest.mark.parametrize("per_token, slots", [(1, 6), (2, 3), (6, 6)])
def test_ties_are_won_by_the_lower_token(per_token, slots):
    """Scores of few values, so that most are tied: one order of comparisons, exactly."""
    logits = np.random.default_rng(0).integers(0, 2, (40, 6)).astype(np.float32)
    options = {"score_function": jax.nn.sigmoid, "max_experts_per_token": slots}
    routing = of_logits(logits, num_experts_per_token=per_token, **options)
    indices, dropped = choices(logits, per_token, slots)
    np.testing.assert_array_equal(np.asarray(routing.indices), indices)
    assert int(routing.dropped) == dropped


def test_scores_are_those_of_the_paper_by_default():
    gate = make_block().router.gate
    assert gate.score_function(jnp.zeros(4)).tolist() == [0.25] * 4 and not gate.normalize
    logits = np.random.default_rng(0).normal(size=(8, 4))
    routing = of_logits(logits, num_experts_per_token=2, normalize=True, scaling_factor=3.0)
    somebody = np.asarray(routing.indices < 4).any(axis=1)
    assert_close(routing.weights.sum(axis=1), np.where(somebody, 3.0, 0.0))


def test_padding_takes_no_place_and_changes_nothing():
    """The answer is that of the call without padding, capacity included, bit for bit."""
    block, (hidden_states, _) = make_block(), make_inputs((2, 9))
    mask = np.random.default_rng(0).random((2, 9)) < 0.6
    padded = jnp.where(mask[..., None], hidden_states, jnp.nan)
    output, routing = block(padded, mask=jnp.asarray(mask))
    alone, expected = block(hidden_states[mask])
    np.testing.assert_array_equal(np.asarray(routing.indices)[mask], np.asarray(expected.indices))
    np.testing.assert_array_equal(np.asarray(routing.weights)[mask], np.asarray(expected.weights))
    assert_close(output[mask], alone)
    assert (np.asarray(routing.indices)[~mask] == EXPERTS).all()
    assert not np.asarray(output)[~mask].any() and int(routing.dropped) == 0
    capacity = block.router.capacity(int(mask.sum()))
    assert bx.expert_load(routing).tolist() == [capacity] * EXPERTS


def test_padding_alone_and_no_tokens():
    block = make_block()
    output, routing = block(jnp.full((6, HIDDEN), jnp.nan), mask=jnp.zeros(6, bool))
    assert not np.asarray(output).any() and int(routing.dropped) == 0
    for batch in ((0,), (3, 0)):
        output, routing = block(jnp.zeros((*batch, HIDDEN)))
        assert output.shape == (*batch, HIDDEN) and int(routing.dropped) == 0


@pytest.mark.parametrize("per_token", [PER_TOKEN, EXPERTS])
def test_a_nan_token_comes_last_and_reaches_itself_only(per_token):
    """No expert has room for it, or every expert has."""
    block, (hidden_states, _) = make_block(per_token=per_token), make_inputs((9,))
    hidden_states = hidden_states.at[1].set(jnp.nan)
    output, routing = block(hidden_states)
    indices, dropped = choices(np.asarray(routing.scores, np.float64), per_token, EXPERTS)
    np.testing.assert_array_equal(np.asarray(routing.indices), indices)
    assert int(routing.dropped) == dropped == 0
    assert np.isnan(np.asarray(output)).any(axis=1).tolist() == [
        t == 1 and per_token == EXPERTS for t in range(9)
    ]
    assert np.isnan(np.asarray(routing.weights[1])).all() == (per_token == EXPERTS)
    assert not np.isnan(np.delete(routing.weights, 1, axis=0)).any()


def test_a_later_token_changes_an_earlier_one():
    """The leak that the documentation warns of: causal models must not choose this way."""
    block, (hidden_states, _) = make_block(), make_inputs((13,))
    output, _ = block(hidden_states)
    later, _ = block(hidden_states.at[-1].set(9 * block.router.gate.weight[0]))
    # Expert 0 takes the last token now, and leaves one that it took before.
    assert (later[:-1] != output[:-1]).any()


def test_batch_axes_are_one_batch_and_vmap_makes_one_of_each_example():
    block, (hidden_states, _) = make_block(), make_inputs((3, 6))
    flat, _ = block(hidden_states.reshape(18, HIDDEN))
    native, routing = block(hidden_states)
    assert_close(native, flat.reshape(native.shape))
    assert (
        bx.expert_load(routing).tolist() == [block.router.capacity(18)] * EXPERTS == [8] * EXPERTS
    )
    mapped, routings = jax.vmap(block)(hidden_states)
    assert bx.expert_load(routings).tolist() == [[3] * EXPERTS] * 3
    for example, alone, indices in zip(hidden_states, mapped, routings.indices, strict=True):
        expected, routing = block(example)
        assert_close(alone, expected)
        np.testing.assert_array_equal(np.asarray(indices), np.asarray(routing.indices))
    assert not (mapped == native).all()


def test_a_token_alone_is_taken_by_every_expert():
    for hidden_states in (jnp.ones(HIDDEN), jnp.ones((1, HIDDEN))):
        _, routing = make_block()(hidden_states)
        assert sorted(routing.indices.ravel().tolist()) == list(range(EXPERTS))


@pytest.mark.parametrize("slots", [EXPERTS, 1])
def test_a_replay_counts_as_the_router_does(slots):
    """An unused slot is not a drop; what a capacity takes away is one."""
    block, (hidden_states, _) = make_block(slots), make_inputs((13,))
    mask = jnp.arange(13) != 4
    output, routing = block(hidden_states, mask=mask)
    replayed, again = block(hidden_states, routing=routing)
    np.testing.assert_array_equal(np.asarray(replayed), np.asarray(output))
    assert int(again.dropped) == int(routing.dropped)
    capped = bx.over_capacity(routing, 2)
    _, again = block(hidden_states, routing=capped)
    load = np.asarray(bx.expert_load(routing))
    assert int(again.dropped) == int(capped.dropped)
    assert int(capped.dropped) - int(routing.dropped) == np.maximum(load - 2, 0).sum() > 0


def test_it_exports_with_a_symbolic_number_of_tokens(unchecked):
    block = make_block()
    (tokens,) = jax.export.symbolic_shape("tokens")
    shape = jax.ShapeDtypeStruct((tokens, HIDDEN), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: block(x)[0]))(shape)
    hidden_states, _ = make_inputs((7,))
    assert_close(exported.call(hidden_states), block(hidden_states)[0])


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"num_experts_per_token": 0}, ValueError, "num_experts_per_token"),
        ({"num_experts_per_token": 6}, ValueError, "num_experts=5. Got 6"),
        ({"max_experts_per_token": 0}, ValueError, "`max_experts_per_token` .* 1 and 5. Got 0"),
        ({"max_experts_per_token": 6}, ValueError, "`max_experts_per_token` .* 1 and 5. Got 6"),
        ({"max_experts_per_token": 2.0}, TypeError, "`max_experts_per_token`"),
        ({"score_function": "softmax"}, TypeError, "score_function"),
    ],
)
def test_construction_errors(options, error, text, unchecked):
    sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_token": 2}
    with pytest.raises(error, match=text):
        bx.ExpertChoiceRouter(**{**sizes, **options}, key=jax.random.key(0))


def test_what_a_summary_says():
    assert "expert choice" in str(bx.summary(make_block()))

"""Capacity: which assignments an expert keeps, what is dropped, and the memory that it bounds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EXPERTS, HIDDEN, INTERMEDIATE, SLOTS, assert_close, make_block, make_inputs
from routings import one_routing

import braidax as bx

LIMIT, TOKENS = 0.4, 16


def random_routing(seed=0, mask=None):
    """Experts that a token may name twice, and weights of few values, so that most are tied."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, EXPERTS, (TOKENS, SLOTS))
    weights = rng.integers(1, 5, (TOKENS, SLOTS)) / 4
    return one_routing(indices, weights, mask=mask, experts=EXPERTS)


def recount(routing, capacity, by):
    """`(indices, dropped)`: assignments in the order of their claim, each while there is room."""
    indices, weights = np.array(routing.indices), np.array(routing.weights)
    real = np.ones(TOKENS, bool) if routing.mask is None else np.asarray(routing.mask)
    indices[~real] = EXPERTS
    claims = list(np.ndindex(*indices.shape))
    if by == "weight":
        claims.sort(key=lambda claim: (np.isnan(weights[claim]), -np.nan_to_num(weights[claim])))
    room, dropped = np.full(EXPERTS, capacity), 0
    for claim in claims:
        expert = indices[claim]
        if expert == EXPERTS:
            continue
        if room[expert]:
            room[expert] -= 1
        else:
            indices[claim], dropped = EXPERTS, dropped + 1
    return indices, dropped


@pytest.mark.parametrize("by", ["position", "weight"])
@pytest.mark.parametrize("capacity", [0, 3, 8, 100])
def test_what_is_left_out_against_a_recount(capacity, by):
    """Masked tokens take no room, although they have the highest weights, and NaN comes last."""
    mask = jnp.arange(TOKENS) % 5 != 1
    routing = random_routing(mask=mask)
    weights = jnp.where(mask[:, None], routing.weights, 9.0).at[2].set(jnp.nan)
    routing = eqx.tree_at(lambda r: r.weights, routing, weights)
    capped = bx.over_capacity(routing, capacity, by=by)
    indices, dropped = recount(routing, capacity, by)
    np.testing.assert_array_equal(np.asarray(capped.indices), indices)
    kept = np.where(indices == EXPERTS, 0, np.asarray(routing.weights))
    real = np.asarray(mask)
    np.testing.assert_array_equal(np.asarray(capped.weights)[real], kept[real])
    assert int(capped.dropped) == dropped
    assert bx.expert_load(capped).max() <= capacity
    if capacity == 3:
        other = "weight" if by == "position" else "position"
        assert dropped > 0 and (recount(routing, capacity, other)[0] != indices).any()


@pytest.mark.parametrize("by", ["position", "weight"])
def test_stacked_routings_have_the_capacity_each(by):
    one, other = random_routing(0), random_routing(1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    capped = bx.over_capacity(stacked, 3, by=by)
    for layer, routing in enumerate((one, other)):
        indices, dropped = recount(routing, 3, by)
        np.testing.assert_array_equal(np.asarray(capped.indices[layer]), indices)
        assert int(capped.dropped[layer]) == dropped > 0


@pytest.mark.parametrize("by", ["weights", None])
def test_by_what_is_one_of_two(by, unchecked):
    with pytest.raises(ValueError, match="`by` must be 'position' or 'weight'. Got"):
        bx.over_capacity(random_routing(), 3, by=by)


@eqx.filter_jit
def output_and_vjp(block, tokens, routing, cotangent):
    """Output, routing, and the gradients of tokens, weights and both matrices of the experts."""

    def apply(tokens, weights, gate_up, down):
        block_ = eqx.tree_at(lambda b: (b.experts.gate_up, b.experts.down), block, (gate_up, down))
        return block_(tokens, routing=eqx.tree_at(lambda r: r.weights, routing, weights))

    operands = (tokens, routing.weights, block.experts.gate_up, block.experts.down)
    output, vjp, routing = jax.vjp(apply, *operands, has_aux=True)
    return output, routing, vjp(cotangent)


# Fewer rows than assignments, as many as there are, and more.
CAPACITIES = [2, 5, 40]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_dispatch_leaves_out_what_is_over_its_capacity(capacity, remat):
    """Output, all gradients and drops against the oracle on the assignments that are left."""
    options = {"capacity": capacity, "remat": remat}
    block = make_block(bx, "top_k", "blocks").routed
    dispatch = bx.SortedDispatch(bx.matmul.Blocks(), **options)
    block = eqx.tree_at(lambda b: b.dispatch, block, dispatch)
    mask = jnp.arange(TOKENS) != 4
    routing, (hidden_states, _) = random_routing(mask=mask), make_inputs((TOKENS,))
    cotangent = jax.random.normal(jax.random.key(5), (TOKENS, HIDDEN))
    tokens = hidden_states.at[4].set(jnp.nan)
    output, returned, got = output_and_vjp(block, tokens, routing, cotangent)
    indices, dropped = recount(routing, capacity, "position")
    assert int(returned.dropped) == dropped and (dropped > 0) == (capacity < 40)
    # The returned assignment is what the router asked for.
    np.testing.assert_array_equal(
        np.asarray(returned.indices), np.where(mask[:, None], routing.indices, EXPERTS)
    )
    # Nobody as an expert of zeros.
    extended = (
        np.pad(np.asarray(array, np.float64), ((0, 1), *[(0, 0)] * (array.ndim - 1)))
        for array in (block.experts.gate_up, block.experts.down)
    )
    weights = np.where(indices == EXPERTS, 0, np.asarray(routing.weights, np.float64))
    hidden_states, cotangent = (np.asarray(a, np.float64) for a in (hidden_states, cotangent))
    expected, *gradients = oracle.block_and_gradients(
        hidden_states, indices, weights, *extended, LIMIT, cotangent
    )
    assert_close(output, expected)
    wanted = (*gradients[:2], *(gradient[:-1] for gradient in gradients[2:]))
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)


def test_examples_of_a_vmap_have_the_capacity_each():
    block = make_block(bx, "top_k", "blocks").routed
    block = eqx.tree_at(lambda b: b.dispatch, block, bx.SortedDispatch(capacity=2))
    hidden_states, _ = make_inputs((3, 6))
    output, routings = jax.vmap(block)(hidden_states)
    for example, alone, dropped in zip(hidden_states, output, routings.dropped, strict=True):
        expected, routing = block(example)
        assert_close(alone, expected)
        assert (
            int(dropped)
            == int(routing.dropped)
            == 6 * SLOTS - np.minimum(np.asarray(bx.expert_load(routing)), 2).sum()
        )


def test_a_token_without_an_answer_and_without_room_gets_zeros():
    """Its weights still say so, and a check raises."""
    block, (hidden_states, _) = make_block(bx, "top_k", "blocks").routed, make_inputs((TOKENS,))
    indices = jnp.zeros((TOKENS, 1), jnp.int32).at[-1].set(-1)
    dispatch = bx.SortedDispatch(capacity=2)
    block = eqx.tree_at(lambda b: b.dispatch, block, dispatch)
    output, routing = block(hidden_states, indices=indices)
    assert not np.asarray(output[-1]).any() and jnp.isnan(routing.weights[-1]).all()
    assert int(routing.dropped) == TOKENS - 2
    checked = bx.RoutedMoE(block.router, block.experts, dispatch=dispatch, checks=True)
    with pytest.raises(RuntimeError, match="A token has no experts"):
        jax.block_until_ready(checked(hidden_states, indices=indices))


@pytest.mark.parametrize("capacity, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_capacity_is_a_positive_integer(capacity, error, unchecked):
    with pytest.raises(error, match="`capacity` must be"):
        bx.SortedDispatch(capacity=capacity)


@pytest.mark.optimized
def test_a_capacity_bounds_memory():
    """Without one every slot has a row. The experts choose one slot in eight."""
    experts, hidden, tokens = 8, 64, 512
    router = bx.ExpertChoiceRouter(hidden, experts, 1, key=jax.random.key(0))
    networks = bx.Experts(experts, hidden, INTERMEDIATE, key=jax.random.key(1))

    def temporary_bytes(capacity):
        dispatch = bx.SortedDispatch(bx.matmul.Blocks(), capacity=capacity)
        block = bx.RoutedMoE(router, networks, dispatch=dispatch)
        shape = jax.ShapeDtypeStruct((tokens, hidden), jnp.float32)
        program = jax.jit(lambda tokens: block(tokens)[0]).lower(shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    # One matrix of all rows at least, which fall from tokens * experts to tokens.
    saved = temporary_bytes(None) - temporary_bytes(router.capacity(tokens))
    assert saved > tokens * (experts - 1) * hidden * 4

"""The block against the oracle: values, gradients, and who may touch whom."""

import dataclasses
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    ASSIGNMENTS,
    BACKENDS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    ROUTERS,
    SLOTS,
    assert_close,
    make_block,
    make_dispatch,
    make_inputs,
)

import braidax as bx

LIMIT = 0.4
BACKEND_NAMES = [case.name for case in BACKENDS]
every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)


# Compiled with what is around it, once for all tests.
@eqx.filter_jit
def call(block, *inputs, **options):
    return block(*inputs, **options)


def replay(indices, weights, mask=None):
    """A routing that says exactly this."""
    scores = jnp.zeros((*indices.shape[:-1], EXPERTS))
    return bx.Routing(
        jnp.asarray(indices), jnp.asarray(weights), scores, scores, mask, jnp.zeros((), jnp.int32)
    )


@eqx.filter_jit
def output_and_vjp(block, tokens, routing, cotangent):
    def apply(tokens, weights, gate_up, down):
        block_ = eqx.tree_at(lambda b: (b.experts.gate_up, b.experts.down), block, (gate_up, down))
        routing_ = eqx.tree_at(lambda r: r.weights, routing, weights)
        return block_(tokens, routing=routing_)[0]

    experts = block.experts
    output, vjp = jax.vjp(apply, tokens, routing.weights, experts.gate_up, experts.down)
    return output, *vjp(cotangent)


def problem(indices, seed=0):
    rng = np.random.default_rng(seed)
    tokens = 1.5 * rng.normal(size=(len(indices), HIDDEN))
    weights = rng.uniform(0.1, 1, indices.shape)
    gate_up = 0.4 * rng.normal(size=(EXPERTS, 2, INTERMEDIATE, HIDDEN))
    down = 0.4 * rng.normal(size=(EXPERTS, INTERMEDIATE, HIDDEN))
    cotangent = rng.normal(size=tokens.shape)
    as_float32 = [a.astype(np.float32) for a in (tokens, weights, gate_up, down, cotangent)]
    return [a.astype(np.float64) for a in as_float32]


# Every assignment on every backend, and one with recomputed pre-activations.
ORACLE_CASES = [(name, "blocks", False) for name in ASSIGNMENTS]
ORACLE_CASES += [
    pytest.param(name, backend, False, marks=() if name == "random" else pytest.mark.slow)
    for name in ASSIGNMENTS
    for backend in BACKEND_NAMES[1:]
]
ORACLE_CASES += [("random", backend, True) for backend in BACKEND_NAMES if backend != "dense"]


@pytest.mark.hazard(30)
@pytest.mark.parametrize("name, backend, remat", ORACLE_CASES)
def test_values_and_all_gradients_against_the_oracle(name, backend, remat):
    indices = ASSIGNMENTS[name]
    options = {"remat": True} if remat else {}
    tokens, weights, gate_up, down, cotangent = problem(indices)
    experts = bx.Experts(
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
        activation=bx.activations.swiglu(LIMIT),
        key=jax.random.key(0),
    )
    router = bx.TopKRouter(HIDDEN, EXPERTS, SLOTS, key=jax.random.key(0))
    f32 = [jnp.asarray(a, jnp.float32) for a in (gate_up, down)]
    experts = eqx.tree_at(lambda e: (e.gate_up, e.down), experts, tuple(f32))
    block = bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, backend, **options))
    got = output_and_vjp(
        block,
        jnp.asarray(tokens, jnp.float32),
        replay(indices, jnp.asarray(weights, jnp.float32)),
        jnp.asarray(cotangent, jnp.float32),
    )
    want = oracle.block_and_gradients(tokens, indices, weights, gate_up, down, LIMIT, cotangent)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    unused = sorted(set(range(EXPERTS)) - set(indices.reshape(-1).tolist()))
    for gradient in got[3:]:
        assert not np.asarray(gradient)[unused].any()  # exactly 0, not only small


@every_backend
@pytest.mark.parametrize("kind", ROUTERS)
def test_routed_and_shared_against_the_oracle(kind, backend):
    block = make_block(bx, kind, backend)
    hidden_states, input_ids = make_inputs()
    output, routing = call(block, hidden_states, input_ids)
    tokens = np.asarray(hidden_states, np.float64).reshape(-1, HIDDEN)
    weights = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (block.routed.experts, block.shared)
    )
    experts, shared = weights
    want = oracle.routed(
        tokens,
        np.asarray(routing.indices).reshape(-1, SLOTS),
        np.asarray(routing.weights, np.float64).reshape(-1, SLOTS),
        experts.gate_up,
        experts.down,
        LIMIT,
    )
    want += [oracle.swiglu(token, shared.gate_up, shared.down, LIMIT) for token in tokens]
    assert_close(output, want.reshape(output.shape))
    assert output.dtype == hidden_states.dtype


@pytest.mark.hazard(15)
@every_backend
def test_zero_tokens(backend):
    block = make_block(bx, "top_k", backend)
    hidden_states = jnp.zeros((0, HIDDEN))

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(block):
        output, routing = block(hidden_states)
        return jnp.sum(output), (output, routing)

    (_, (output, routing)), gradient = run(block)
    assert output.shape == (0, HIDDEN)
    assert bx.expert_load(routing).tolist() == [0] * EXPERTS
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.hazard(16)
@every_backend
def test_one_expert_and_all_experts(backend):
    hidden_states = jax.random.normal(jax.random.key(0), (5, HIDDEN))
    for experts, slots in ((1, 1), (3, 3)):
        router = bx.TopKRouter(HIDDEN, experts, slots, key=jax.random.key(1))
        stack = bx.Experts(experts, HIDDEN, INTERMEDIATE, key=jax.random.key(2))
        output, routing = call(
            bx.RoutedMoE(router, stack, dispatch=make_dispatch(bx, backend)), hidden_states
        )
        want = oracle.routed(
            np.asarray(hidden_states, np.float64),
            np.asarray(routing.indices),
            np.asarray(routing.weights, np.float64),
            np.asarray(stack.gate_up, np.float64),
            np.asarray(stack.down, np.float64),
            None,
        )
        assert_close(output, want)


@pytest.mark.hazard(33)
@pytest.mark.parametrize("backend", ["blocks", "ragged"])
def test_a_nan_token_reaches_itself_and_its_experts_only(backend):
    indices = np.array([[0, 1, 2], [0, 1, 0], [2, 3, 1], [3, 2, 3]], np.int32)
    tokens, weights, *_, cotangent = (jnp.asarray(a, jnp.float32) for a in problem(indices))
    block = make_block(bx, "top_k", backend).routed
    routing = replay(indices, weights)
    clean = output_and_vjp(block, tokens.at[1].set(0), routing, cotangent)
    dirty = output_and_vjp(block, tokens.at[1].set(jnp.nan), routing, cotangent)
    others = [0, 2, 3]
    for k in (0, 1):  # output and gradient of the tokens, bit for bit
        np.testing.assert_array_equal(np.asarray(dirty[k])[others], np.asarray(clean[k])[others])
    assert np.isnan(np.asarray(dirty[0][1])).all()
    for gradient in dirty[3:]:
        assert np.isfinite(np.asarray(gradient)[[2, 3, 4]]).all()


@pytest.mark.hazard(34)
@pytest.mark.parametrize("case", BACKENDS, ids=BACKEND_NAMES)
def test_a_nan_in_one_expert_reaches_its_tokens_only(case):
    indices = np.array([[0, 1, 2], [0, 2, 0], [2, 3, 1], [3, 2, 3]], np.int32)
    tokens, weights, *_, cotangent = (jnp.asarray(a, jnp.float32) for a in problem(indices))
    block = make_block(bx, "top_k", case.name).routed
    block = eqx.tree_at(
        lambda b: b.experts.gate_up, block, block.experts.gate_up.at[1, 0, 2, 3].set(jnp.nan)
    )
    got = output_and_vjp(block, tokens, replay(indices, weights), cotangent)
    clean = all(np.isfinite(np.asarray(a)[[1, 3]]).all() for a in got[:3])
    clean &= all(np.isfinite(np.asarray(a)[[0, 2, 3, 4]]).all() for a in got[3:])
    assert clean == case.isolates_expert_nan
    assert np.isnan(np.asarray(got[0])[[0, 2]]).any(axis=1).all()


@pytest.mark.hazard(35)
@every_backend
def test_a_masked_token_reaches_nothing(backend):
    block = make_block(bx, "hash", backend)
    hidden_states, input_ids = make_inputs((6,))
    mask = jnp.asarray([True, True, False, True, False, True])
    dirty = hidden_states.at[2].set(jnp.nan).at[4].set(jnp.inf)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(inputs, input_ids):
        block, hidden_states = inputs
        output, routing = block(hidden_states, input_ids, mask=mask)
        return jnp.sum(jnp.sin(output)), (output, routing)

    (_, (output, routing)), gradients = run((block, dirty), input_ids.at[2].set(-1))
    gradient, token_gradient = gradients
    kept = np.flatnonzero(np.asarray(mask))
    alone, _ = call(block, hidden_states[kept], input_ids[kept])
    assert_close(output[kept], alone)
    assert not np.asarray(output)[[2, 4]].any() and not np.asarray(token_gradient)[[2, 4]].any()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))
    assert int(bx.expert_load(routing).sum()) == 4 * SLOTS


def test_an_unknown_id_changes_no_other_token():
    block = make_block(bx, "hash", "blocks")
    hidden_states, input_ids = make_inputs((6,))
    clean, _ = call(block, hidden_states, input_ids)
    output, _ = call(block, hidden_states, input_ids.at[3].set(10_000))
    assert np.isnan(np.asarray(output[3])).all()
    others = [0, 1, 2, 4, 5]
    # Different assignments share blocks with other rows, which must not show in a single bit.
    np.testing.assert_array_equal(np.asarray(output)[others], np.asarray(clean)[others])


@pytest.mark.hazard(31)
def test_an_expert_named_twice_counts_twice():
    tokens, weights, *_ = (jnp.asarray(a, jnp.float32) for a in problem(np.zeros((4, 2), np.int32)))
    block = make_block(bx, "top_k", "blocks").routed
    twice = replay(np.full((4, 2), 2, np.int32), weights)
    once = replay(np.full((4, 1), 2, np.int32), weights.sum(axis=1, keepdims=True))
    assert_close(call(block, tokens, routing=twice)[0], call(block, tokens, routing=once)[0])


@pytest.mark.hazard(36)
def test_permuting_tokens_and_splitting_batches_changes_nothing():
    block = make_block(bx, "hash", "blocks")
    hidden_states, input_ids = make_inputs((24,))
    output, _ = call(block, hidden_states, input_ids)
    order = np.random.default_rng(0).permutation(24)
    shuffled, _ = call(block, hidden_states[order], input_ids[order])
    assert_close(shuffled, output[order])
    halves = [call(block, hidden_states[s], input_ids[s])[0] for s in (slice(0, 7), slice(7, 24))]
    assert_close(jnp.concatenate(halves), output)


def test_layer_zero_routes_by_id_alone_and_layer_three_by_hidden_state():
    config = bx.MoEConfig(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, vocab_size=50, num_hash_layers=3)
    hidden_states, input_ids = make_inputs()
    other_states, other_ids = hidden_states[::-1] * 2, (input_ids + 7) % 50
    for layer_idx, by_id in ((0, True), (1, True), (2, True), (3, False)):
        block = bx.RoutedAndSharedMoE.from_config(config, layer_idx, key=jax.random.key(layer_idx))
        indices = call(block, hidden_states, input_ids)[1].indices
        same_ids = call(block, other_states, input_ids)[1].indices
        same_states = call(block, hidden_states, other_ids)[1].indices
        assert bool((indices == same_ids).all()) == by_id
        assert bool((indices == same_states).all()) == (not by_id)
        if by_id:
            table = bx.hash_tables.md5(50, EXPERTS, SLOTS, salt=layer_idx)
            np.testing.assert_array_equal(np.asarray(indices), table[np.asarray(input_ids)])


CALL_ERRORS = [
    ("hash", (2, 6, HIDDEN), None, ValueError, "input_ids"),
    ("hash", (2, 6, HIDDEN), jnp.zeros((1,), jnp.int32), ValueError, r"\(2, 6\)"),
    ("hash", (2, 6, HIDDEN), jnp.zeros((6, 2), jnp.int32), ValueError, r"\(6, 2\)"),
    ("hash", (2, 6, HIDDEN), jnp.zeros((12,), jnp.int32), ValueError, r"\(12,\)"),
    ("hash", (2, 6, HIDDEN), jnp.zeros((2, 6)), TypeError, "integer"),
    ("hash", (2, 6, HIDDEN), jnp.zeros((2, 6), bool), TypeError, "integer"),
    ("top_k", (2, 6, HIDDEN + 1), None, ValueError, "hidden=12"),
    ("top_k", (), None, ValueError, "hidden=12"),
]


@pytest.mark.hazard(10)
@pytest.mark.hazard(11)
@pytest.mark.hazard(13)
@pytest.mark.parametrize("kind, shape, ids, error, text", CALL_ERRORS)
def test_call_errors(kind, shape, ids, error, text, unchecked):
    block = make_block(bx, kind, "blocks")
    for function in (block, eqx.filter_jit(block)):
        with pytest.raises(error, match=text):
            function(jnp.zeros(shape), ids)


def test_replay_errors(unchecked):
    block = make_block(bx, "top_k", "blocks")
    hidden_states, _ = make_inputs()
    _, routing = block(hidden_states)
    again, _ = block(hidden_states, routing=routing)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(block(hidden_states)[0]))
    with pytest.raises(ValueError, match="`mask`"):
        block(hidden_states, mask=jnp.ones((2, 6), bool), routing=routing)
    with pytest.raises(ValueError, match="`routing.indices`"):
        block(hidden_states[:1], routing=routing)


def test_what_is_no_dispatch_or_kernel(unchecked):
    block = make_block(bx, "top_k", "blocks").routed
    with pytest.raises(TypeError, match="`dispatch`"):
        bx.RoutedMoE(block.router, block.experts, dispatch="blocks")
    for kernel in ("blocks", bx.matmul.Dense()):
        with pytest.raises(TypeError, match="`matmul`"):
            bx.SortedDispatch(kernel)


def test_a_kernel_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ImportError, match=r'pip install "braidax\[kernels\]"'):
        bx.matmul.Tokamax()


def test_an_activation_that_is_not_finite_at_0_stays_finite():
    """Rows of neighbours are 0 inside of a block: their slopes must not reach a gradient."""

    def activation(gate, up):
        return jnp.sqrt(jnp.abs(gate)) * up

    experts = bx.Experts(EXPERTS, HIDDEN, 4, activation=activation, key=jax.random.key(0))
    router = bx.TopKRouter(HIDDEN, EXPERTS, SLOTS, key=jax.random.key(1))
    hidden_states, _ = make_inputs((70,))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(block):
        return jnp.sum(jnp.sin(block(hidden_states)[0]))

    got, want = (
        gradient(bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, name)))
        for name in ("blocks", "dense")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)


def test_functions_and_halves_of_a_block_can_be_replaced():
    block = make_block(bx, "top_k", "blocks").routed
    hidden_states, _ = make_inputs()
    smaller = eqx.tree_at(lambda b: b.experts.activation, block, bx.activations.swiglu(1e-3))
    output, clamped = (call(b, hidden_states)[0] for b in (block, smaller))
    assert np.abs(np.asarray(clamped)).max() < np.abs(np.asarray(output)).max() / 50
    scored = eqx.tree_at(lambda b: b.router.gate.score_function, block, jax.nn.sigmoid)
    _, routing = call(scored, hidden_states)
    np.testing.assert_allclose(routing.scores, jax.nn.sigmoid(routing.logits), rtol=1e-6)
    _, rest = eqx.partition(block, eqx.is_inexact_array)
    assert dataclasses.replace(rest, dispatch=bx.DenseDispatch()).dispatch == bx.DenseDispatch()
    unequal = eqx.tree_at(lambda b: b.dispatch.matmul, block, bx.matmul.Dense())
    with pytest.raises(TypeError, match="`matmul`"):
        unequal(hidden_states)


def test_a_block_and_its_gradient_take_another_dispatch():
    block = make_block(bx, "top_k", "dense").routed
    hidden_states, _ = make_inputs()
    replaced = dataclasses.replace(block, dispatch=bx.SortedDispatch())
    assert_close(call(replaced, hidden_states)[0], call(block, hidden_states)[0])
    gradient = eqx.filter_grad(lambda b: jnp.sum(call(b, hidden_states)[0]))(block)
    gradient = eqx.tree_at(lambda b: b.dispatch, gradient, replaced.dispatch)
    assert jax.tree.structure(gradient) == jax.tree.structure(
        eqx.filter(replaced, eqx.is_inexact_array)
    )


def test_optional_packages_are_not_imported_with_the_library():
    code = "import sys, braidax; sys.exit(any(m in sys.modules for m in ('tokamax', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_no_shared_expert_is_an_error():
    config = bx.MoEConfig(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, num_shared_experts=0)
    with pytest.raises(ValueError, match="num_shared_experts"):
        bx.RoutedAndSharedMoE.from_config(config, 0, key=jax.random.key(0))


@pytest.mark.hazard(14)
@every_backend
@pytest.mark.parametrize("bad", [-1, EXPERTS + 1, 99])
def test_replaying_an_index_of_no_expert_poisons_its_token_only(bad, backend):
    block = make_block(bx, "top_k", backend).routed
    hidden_states, _ = make_inputs((6,))
    _, routing = call(block, hidden_states)
    clean, _ = call(block, hidden_states, routing=routing)
    broken = eqx.tree_at(lambda r: r.indices, routing, routing.indices.at[2, 1].set(bad))
    output, _ = call(block, hidden_states, routing=broken)
    assert np.isnan(np.asarray(output[2])).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(np.asarray(output)[others], np.asarray(clean)[others])


@pytest.mark.parametrize("dtype, experts", [("uint8", 256), ("int8", 128)])
def test_replaying_narrow_indices_of_as_many_experts_as_they_have_values(dtype, experts, unchecked):
    router = bx.TopKRouter(HIDDEN, experts, SLOTS, key=jax.random.key(0))
    stack = bx.Experts(experts, HIDDEN, INTERMEDIATE, key=jax.random.key(1))
    block = bx.RoutedMoE(router, stack)
    hidden_states, _ = make_inputs((6,))
    output, routing = block(hidden_states)
    narrow = eqx.tree_at(lambda r: r.indices, routing, routing.indices.astype(dtype))
    replayed, again = block(hidden_states, routing=narrow)
    np.testing.assert_array_equal(np.asarray(replayed), np.asarray(output))
    assert again.indices.dtype == jnp.int32


@pytest.mark.hazard(35)
@every_backend
def test_an_assignment_to_nobody_is_left_out(backend):
    """Against the same token with fewer experts: no row, no weight, no load, finite gradients."""
    indices = np.array([[0, EXPERTS, 2], [EXPERTS] * 3, [2, 3, EXPERTS], [4, 4, 1]], np.int32)
    tokens, weights, *_, cotangent = (jnp.asarray(a, jnp.float32) for a in problem(indices))
    tokens = tokens.at[1].set(jnp.nan)  # nobody's token may hold anything
    block = make_block(bx, "top_k", backend).routed
    output, *gradients = output_and_vjp(block, tokens, replay(indices, weights), cotangent)
    experts = block.experts
    gate_up, down = (np.asarray(a, np.float64) for a in (experts.gate_up, experts.down))
    for t, row in enumerate(indices):
        somebody = row < EXPERTS
        token, weight = np.asarray(tokens[t], np.float64), np.asarray(weights[t], np.float64)
        case = (token[None], row[None, somebody], weight[None, somebody], gate_up, down, LIMIT)
        assert_close(output[t], oracle.routed(*case)[0] if somebody.any() else np.zeros(HIDDEN))
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    assert not np.asarray(gradients[1])[indices == EXPERTS].any()
    _, routing = call(block, tokens, routing=replay(indices, weights))
    assert bx.expert_load(routing).tolist() == [1, 1, 2, 1, 2]
    assert int(routing.dropped) == 5


class LeavesAnything(bx.matmul.Blocks):
    """A kernel that writes NaN wherever its contract lets it: rows of nobody, groups without
    rows."""

    clears_empty_groups = False

    def multiply(self, rows, weight, group_sizes, **options):
        product = super().multiply(rows, weight, group_sizes, **options)
        owned = jnp.arange(len(rows)) < group_sizes.sum()
        return jnp.where(owned[:, None], product, jnp.nan)

    def outer(self, left, right, group_sizes, **options):
        product = super().outer(left, right, group_sizes, **options)
        return jnp.where(group_sizes[:, None, None] > 0, product, jnp.nan)


@pytest.mark.hazard(35)
def test_what_a_kernel_leaves_is_cleared():
    """Two groups, the second empty, and two rows of nobody, which hold NaN themselves."""
    rows = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 1.0], [1.0, jnp.nan]])
    weight = jnp.array([[[1.0, 10.0], [0.5, 2.0]], [[7.0, 7.0], [7.0, 7.0]]])
    sizes = jnp.array([2, 0], jnp.int32)
    product = bx.GroupedMatmul(LeavesAnything())
    output, vjp = jax.vjp(lambda *o: product(*o, sizes), rows, weight)
    assert output.tolist() == [[2, 14], [5, 38], [0, 0], [0, 0]]
    d_rows, d_weight = vjp(jnp.array([[1.0, 1.0], [1.0, -1.0], [jnp.nan] * 2, [1.0, 1.0]]))
    assert d_rows.tolist() == [[11, 2.5], [-9, -1.5], [0, 0], [0, 0]]
    assert d_weight.tolist() == [[[4, -2], [6, -2]], [[0, 0], [0, 0]]]


@pytest.mark.hazard(35)
@every_backend
def test_a_masked_row_stops_nan_in_both_directions(backend):
    block = make_block(bx, "top_k", backend).routed
    hidden_states, _ = make_inputs((6,))
    mask = jnp.arange(6) != 2
    _, routing = call(block, hidden_states, mask=mask)
    dirty = eqx.tree_at(lambda r: r.weights, routing, routing.weights.at[2].set(jnp.nan))
    assert not np.asarray(call(block, hidden_states, routing=dirty)[0][2]).any()

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(block):
        factor = jnp.where(mask, 1.0, jnp.nan)[:, None]
        return jnp.sum(factor * block(hidden_states, mask=mask)[0])

    leaves = jax.tree.leaves(gradient(block))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


@pytest.mark.hazard(9)
def test_parts_of_different_sizes_are_refused():
    block = make_block(bx, "top_k", "blocks")
    key = jax.random.key(0)
    for experts, hidden in ((EXPERTS - 1, HIDDEN), (EXPERTS, HIDDEN + 1)):
        with pytest.raises(ValueError, match="`experts`"):
            bx.RoutedMoE(block.routed.router, bx.Experts(experts, hidden, INTERMEDIATE, key=key))
    with pytest.raises(ValueError, match="`shared`"):
        bx.RoutedAndSharedMoE(block.routed, bx.FeedForward(HIDDEN + 1, INTERMEDIATE, key=key))


# gate -> silu(min(gate, 10)) and its slope; at the limit itself the slope is the full one.
CLAMPED_GATES = [
    (-np.inf, 0.0, 0.0),
    (-3e38, 0.0, 0.0),
    (10.0, 9.99954602, 1.00040855),
    (10.01, 9.99954602, 0.0),
    (np.inf, 9.99954602, 0.0),
]


@pytest.mark.hazard(38)
@pytest.mark.parametrize("gate, value, slope", CLAMPED_GATES)
def test_clamped_gate(gate, value, slope):
    swiglu = bx.activations.swiglu(10.0)
    got = jax.value_and_grad(swiglu)(jnp.float32(gate), jnp.float32(1.0))
    np.testing.assert_allclose(got, (value, slope), rtol=1e-6, atol=0)


@pytest.mark.hazard(38)
@pytest.mark.parametrize(
    "up, value, slope", [(10, 10, 1), (-10, -10, 1), (11, 10, 0), (-11, -10, 0)]
)
def test_clamped_up(up, value, slope):
    silu = 1 / (1 + np.exp(-1.0))
    swiglu = bx.activations.swiglu(10.0)
    got = jax.value_and_grad(swiglu, argnums=1)(jnp.float32(1.0), jnp.float32(up))
    np.testing.assert_allclose(got, (value * silu, slope * silu), rtol=1e-6, atol=0)


@pytest.mark.parametrize("experts", [EXPERTS, 2**28])
def test_assignments_in_the_order_of_their_experts(experts):
    """In one number, or as pairs where 32 bits do not hold both."""
    from braidax._dispatch.rows import _sort

    indices = np.random.default_rng(0).integers(0, 6, 40).astype(np.int32) * (experts // 5)
    got = _sort(jnp.asarray(indices), jnp.arange(40, dtype=jnp.int32), experts)
    order = np.argsort(indices, kind="stable")
    np.testing.assert_array_equal(np.asarray(got), [indices[order], order])


def test_numpy_input_gives_what_the_same_jax_array_gives():
    # A process of its own: here the annotations, which name jax arrays, are checked.
    program = (
        "import braidax as bx, jax, numpy as np\n"
        "block = bx.RoutedMoE.from_config(bx.MoEConfig.tiny(), 3, key=jax.random.key(0))\n"
        "given = np.random.default_rng(0).standard_normal((4, 32), np.float32)\n"
        "ours, _ = block(given)\n"
        "assert np.array_equal(ours, block(jax.numpy.asarray(given))[0]), ours\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

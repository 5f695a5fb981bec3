"""Replaying chosen experts: the weights are those of the present gate, which has its gradient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    BACKENDS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    ROUTERS,
    SLOTS,
    VOCAB,
    as_float64,
    assert_close,
    make_block,
    make_inputs,
    slow_but_one,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import braidax as bx

LIMIT, SCALE, TOKENS = 0.4, 1.5, 9  # LIMIT and SCALE are those of `make_block`
NOBODY = EXPERTS


class Worst(bx.AbstractRouter):
    """A router of a user."""

    gate: bx.Gate
    num_experts_per_token: int = eqx.field(static=True, default=SLOTS)

    def select(self, scores, logits, input_ids, *, key):
        indices = jax.lax.top_k(-scores, SLOTS)[1]
        return indices, jnp.ones(scores.shape[:-1], bool)


def make(kind, backend="blocks"):
    """The same gate, experts and shared expert with each router."""
    if kind != "worst":
        return make_block(bx, kind, backend)
    block = make_block(bx, "top_k", backend)
    return eqx.tree_at(lambda b: b.routed.router, block, Worst(block.routed.router.gate))


def random_indices(slots, nobody=True):
    """Some experts twice, and some slots of nobody."""
    high = EXPERTS + nobody
    return np.random.default_rng(slots).integers(0, high, (TOKENS, slots)).astype(np.int32)


@eqx.filter_jit
def call(block, *inputs, **options):
    return block(*inputs, **options)


@eqx.filter_jit
def output_and_vjp(block, hidden_states, cotangent, options):
    """Output, routing, and the gradients of the block and of its hidden states."""
    parameters, static = eqx.partition(block, eqx.is_inexact_array)

    def apply(parameters, hidden_states):
        return eqx.combine(parameters, static)(hidden_states, **options)

    output, vjp, routing = jax.vjp(apply, parameters, hidden_states, has_aux=True)
    return output, routing, *vjp(cotangent)


def by_hand(tokens, indices, gate, experts, cotangent):
    """Output and gradients in float64, of tokens, gate and experts, by the chain rule."""
    logits = tokens @ gate.T
    scores = oracle.SCORES["sqrtsoftplus"](logits)
    somebody = indices < EXPERTS
    within = np.where(somebody, indices, 0)
    chosen = np.where(somebody, np.take_along_axis(scores, within, axis=1), 0)
    total = chosen.sum(axis=1, keepdims=True)
    total[total == 0] = 1  # nobody at all
    weights = SCALE * chosen / total
    case = (tokens, within, weights, experts.gate_up, experts.down, LIMIT, cotangent)
    output, d_tokens, d_weights, d_gate_up, d_down = oracle.block_and_gradients(*case)
    d_weights = np.where(somebody, d_weights, 0)
    mean = (d_weights * chosen).sum(axis=1, keepdims=True) / total
    d_chosen = np.where(somebody, SCALE * (d_weights - mean) / total, 0)
    d_scores = np.zeros_like(scores)
    for (t, slot), expert in np.ndenumerate(within):
        d_scores[t, expert] += d_chosen[t, slot]
    d_logits = d_scores / (1 + np.exp(-logits)) / (2 * scores)
    return output, weights, d_tokens + d_logits @ gate, d_logits.T @ tokens, d_gate_up, d_down


NAMES = [case.name for case in BACKENDS]
REPLAYED = [(kind, 4, "blocks") for kind in (*ROUTERS, "worst")]
REPLAYED += [pytest.param("top_k", 1, name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("kind, slots, backend", REPLAYED)
def test_output_and_all_gradients_against_the_oracle(kind, slots, backend):
    """With another number of experts for a token than the router's own."""
    block, indices = make(kind, backend).routed, random_indices(slots)
    hidden_states, _ = make_inputs((TOKENS,))
    cotangent = jax.random.normal(jax.random.key(3), hidden_states.shape)
    options = {"indices": jnp.asarray(indices)}
    output, routing, gradient, d_tokens = output_and_vjp(block, hidden_states, cotangent, options)
    exact = as_float64((hidden_states, block.router.gate.weight, block.experts, cotangent))
    tokens, gate, experts, d_output = exact
    want = by_hand(tokens, indices, gate, experts, d_output)
    got = (output, routing.weights, d_tokens, gradient.router.gate.weight)
    for one, other in zip(got, want, strict=False):
        assert_close(one, other)
    assert_close(gradient.experts.gate_up, want[4])
    assert_close(gradient.experts.down, want[5])
    assert np.abs(want[3]).max() > 1e-2 or slots == 1  # a weight alone is always the scale
    np.testing.assert_array_equal(np.asarray(routing.indices), indices)
    assert int(routing.dropped) == (indices == NOBODY).sum() > 0
    load = [(indices == expert).sum() for expert in range(EXPERTS)]
    assert bx.expert_load(routing).tolist() == load


@pytest.mark.parametrize("kind", ROUTERS)
def test_what_a_router_chose_itself_gives_its_answer(kind):
    """Outputs, losses and all gradients; a hash layer needs no ids then. The gate learns by the
    indices, and by a replayed routing it does not."""
    block, (hidden_states, input_ids) = make(kind), make_inputs((TOKENS,))
    cotangent = jax.random.normal(jax.random.key(3), hidden_states.shape)
    case = (block, hidden_states, cotangent)
    routed = output_and_vjp(*case, {"input_ids": input_ids})
    replayed = output_and_vjp(*case, {"indices": routed[1].indices})
    frozen = output_and_vjp(*case, {"routing": routed[1]})
    for got, want in zip(jax.tree.leaves(replayed), jax.tree.leaves(routed), strict=True):
        assert_close(got, want)
    assert_close(frozen[0], routed[0])
    assert np.abs(np.asarray(replayed[2].routed.router.gate.weight)).max() > 1e-2
    assert not np.asarray(frozen[2].routed.router.gate.weight).any()


def test_scores_and_losses_are_those_of_the_present_gate():
    block, (hidden_states, _) = make("top_k"), make_inputs((TOKENS,))
    other = eqx.tree_at(lambda b: b.routed.router.gate.weight, block, replace_fn=lambda w: -w)
    _, recorded = call(other, hidden_states)
    _, own = call(block, hidden_states)
    _, routing = call(block, hidden_states, indices=recorded.indices)
    assert (routing.indices != own.indices).any()
    for name in ("scores", "logits"):
        np.testing.assert_array_equal(getattr(routing, name), getattr(own, name))
    assert bx.router_z_loss(routing) == bx.router_z_loss(own)


def test_experts_that_compute_nothing_and_a_projection_are_replayed():
    keys = jax.random.split(jax.random.key(0), 3)
    router = bx.TopKRouter(HIDDEN, EXPERTS + 2, SLOTS, key=keys[0])
    options = {"latent": bx.LatentProjection(HIDDEN, 4, key=keys[2]), "num_identity_experts": 2}
    block = bx.RoutedMoE(router, bx.Experts(EXPERTS, 4, INTERMEDIATE, key=keys[1]), **options)
    hidden_states, _ = make_inputs((TOKENS,))
    cotangent = jnp.ones_like(hidden_states)
    routed = output_and_vjp(block, hidden_states, cotangent, {})
    assert (routed[1].indices >= EXPERTS).any()
    replayed = output_and_vjp(block, hidden_states, cotangent, {"indices": routed[1].indices})
    for got, want in zip(jax.tree.leaves(replayed), jax.tree.leaves(routed), strict=True):
        assert_close(got, want)


def test_a_choice_by_experts_is_replayed():
    """Its unused slots are nobody's, and are no drops; one choice fewer is one."""
    block, (hidden_states, _) = make("top_k").routed, make_inputs((TOKENS,))
    router = bx.ExpertChoiceRouter(HIDDEN, EXPERTS, 2, key=jax.random.key(0))
    block = eqx.tree_at(lambda b: b.router, block, router)
    cotangent = jnp.ones_like(hidden_states)
    routed = output_and_vjp(block, hidden_states, cotangent, {})
    indices = routed[1].indices
    assert (indices == NOBODY).any() and int(routed[1].dropped) == 0
    replayed = output_and_vjp(block, hidden_states, cotangent, {"indices": indices})
    for got, want in zip(jax.tree.leaves(replayed), jax.tree.leaves(routed), strict=True):
        assert_close(got, want)
    _, fewer = call(block, hidden_states, indices=jnp.where(indices == 3, NOBODY, indices))
    assert int(fewer.dropped) == router.capacity(TOKENS) == 4


# --- odd indices --------------------------------------------------------------------------------

any_int32 = st.integers(-(2**31), 2**31 - 1)
indices_in_and_out = arrays(np.int32, (TOKENS, 2), elements=st.integers(0, NOBODY) | any_int32)


@pytest.mark.hazard(14)
@given(indices_in_and_out)
def test_an_index_of_no_expert_poisons_its_token_only(indices):
    block, (hidden_states, _) = make("top_k"), make_inputs((TOKENS,))
    known = ((indices >= 0) & (indices <= NOBODY)).all(axis=1)
    clean, _ = call(block, hidden_states, indices=jnp.asarray(np.where(known[:, None], indices, 0)))
    output, routing = call(block, hidden_states, indices=jnp.asarray(indices))
    assert np.isnan(np.asarray(output)[~known]).all()
    np.testing.assert_array_equal(np.asarray(output)[known], np.asarray(clean)[known])
    assert int(routing.indices.min()) >= 0 and int(routing.indices.max()) <= NOBODY


@pytest.mark.hazard(35)
@pytest.mark.parametrize("backend", slow_but_one(NAMES))
def test_a_masked_token_may_have_any_index(backend):
    """And be NaN: the others are as alone, and no gradient comes back through it."""
    block, (hidden_states, _) = make("top_k", backend), make_inputs((TOKENS,))
    indices, mask = random_indices(2), np.arange(TOKENS) % 3 != 1
    kept = np.flatnonzero(mask)
    alone, _ = call(block, hidden_states[kept], indices=jnp.asarray(indices[kept]))
    dirty = jnp.where(mask[:, None], hidden_states, jnp.nan)
    broken = jnp.asarray(np.where(mask[:, None], indices, -7))
    options = {"indices": broken, "mask": jnp.asarray(mask)}
    output, routing, *gradients = output_and_vjp(block, dirty, jnp.ones_like(dirty), options)
    assert_close(output[kept], alone)
    assert not np.asarray(output)[~mask].any() and not np.asarray(gradients[1])[~mask].any()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))
    assert int(routing.dropped) == (indices[mask] == NOBODY).sum() > 0


@pytest.mark.hazard(33)
def test_a_nan_token_reaches_itself_alone():
    block, (hidden_states, _) = make("top_k"), make_inputs((TOKENS,))
    indices = jnp.asarray(random_indices(2, nobody=False))
    clean, _ = call(block, hidden_states, indices=indices)
    output, _ = call(block, hidden_states.at[4].set(jnp.nan), indices=indices)
    others = np.arange(TOKENS) != 4
    assert np.isnan(np.asarray(output[4])).all()
    np.testing.assert_array_equal(np.asarray(output)[others], np.asarray(clean)[others])


@pytest.mark.slow
@pytest.mark.hazard(12)
@pytest.mark.hazard(14)
def test_every_integer_type_names_the_same_experts(unchecked):
    block, (hidden_states, _) = make("top_k"), make_inputs((TOKENS,))
    indices = random_indices(2, nobody=False)
    want = np.asarray(block(hidden_states, indices=jnp.asarray(indices))[0])
    for dtype in ("int8", "uint8", "int16", "uint32"):
        output, routing = block(hidden_states, indices=jnp.asarray(indices.astype(dtype)))
        np.testing.assert_array_equal(np.asarray(output), want, err_msg=dtype)
        assert routing.indices.dtype == jnp.int32
    # As numpy they are whole when the block is called: 2**32 + 1 is not expert 1.
    for dtype in ("int64", "uint64"):
        wide = indices.astype(dtype)
        np.testing.assert_array_equal(np.asarray(block(hidden_states, indices=wide)[0]), want)
        wide[3, 1] += 2**32
        output = np.asarray(block(hidden_states, indices=wide)[0])
        assert (np.isnan(output).all(axis=1) == (np.arange(TOKENS) == 3)).all(), dtype
    # 256 does not fit uint8, and is nobody of 256 experts.
    router = bx.TopKRouter(HIDDEN, 256, SLOTS, key=jax.random.key(0))
    narrow = router(hidden_states, indices=jnp.full((TOKENS, 1), 255, jnp.uint8))
    assert (narrow.indices == 255).all() and not jnp.isnan(narrow.weights).any()


INDICES = np.zeros((2, 6, 2), np.int32)
REFUSED = {
    "floats": (INDICES * 1.0, TypeError, "`indices` must have an integer dtype. Got float"),
    "bools": (INDICES > 0, TypeError, "`indices` must have an integer dtype. Got bool"),
    "a list": (INDICES.tolist(), TypeError, "`indices` must be an array. Got a list"),
    "no slots": (INDICES[..., :0], ValueError, r"at least one expert for a token. Got \(2, 6, 0\)"),
    "a row a token": (INDICES[..., 0], ValueError, r"\(2, 6, 'experts_per_token'\).*Got \(2, 6\)"),
    "to broadcast": (INDICES[:1], ValueError, r"\(2, 6, 'experts_per_token'\).*Got \(1, 6, 2\)"),
    "flat": (INDICES.reshape(12, 2), ValueError, r"Got \(12, 2\)"),
}


@pytest.mark.hazard(14)
@pytest.mark.parametrize("indices, error, text", REFUSED.values(), ids=REFUSED)
def test_what_is_no_choice_of_experts_is_refused(indices, error, text, unchecked):
    block, hidden_states = make("hash"), jnp.zeros((2, 6, HIDDEN))
    for function in (block, eqx.filter_jit(block), block.routed, block.routed.router):
        with pytest.raises(error, match=text):
            function(hidden_states, indices=indices)
    routing = block.routed.router(hidden_states, indices=INDICES)
    routing = eqx.tree_at(lambda r: r.indices, routing, indices, is_leaf=eqx.is_array)
    with pytest.raises(error, match=text.replace("`indices`", "`routing.indices`")):
        block(hidden_states, routing=routing)


def test_indices_beside_a_routing_are_refused(unchecked):
    block, (hidden_states, _) = make("top_k"), make_inputs()
    _, routing = block(hidden_states)
    for layer in (block, block.routed):
        with pytest.raises(ValueError, match="`indices` must be None when `routing` is given"):
            layer(hidden_states, routing=routing, indices=routing.indices)
    with pytest.raises(ValueError, match=r"`indices`.*Got \(\)"):  # of one token
        block(hidden_states[0, 0], indices=jnp.asarray(3))


@pytest.mark.hazard(14)
@pytest.mark.parametrize("kind", ROUTERS)
def test_checks_raise_for_an_index_of_no_expert(kind):
    block, (hidden_states, _) = make(kind), make_inputs((TOKENS,))
    checked = bx.RoutedMoE(block.routed.router, block.routed.experts, checks=True)
    checked = bx.RoutedAndSharedMoE(checked, block.shared)
    indices = jnp.asarray(random_indices(2))
    want, _ = call(block, hidden_states, indices=indices)
    assert_close(call(checked, hidden_states, indices=indices)[0], want)  # nobody is an answer
    for index in (-1, EXPERTS + 1):
        broken = indices.at[2, 1].set(index)
        with pytest.raises(RuntimeError, match="A token has no experts: .*`indices`"):
            jax.block_until_ready(call(checked, hidden_states, indices=broken))
        mask = jnp.arange(TOKENS) != 2
        assert np.isfinite(call(checked, hidden_states, indices=broken, mask=mask)[0]).all()


# --- transforms ---------------------------------------------------------------------------------


def test_a_batch_mapped_and_compiled_once(caplog):
    block, (hidden_states, _) = make("top_k"), make_inputs((3, TOKENS))
    indices = jnp.asarray(np.stack([random_indices(slots=2)] * 3))
    with jax.log_compiles():
        want, _ = block(hidden_states, indices=indices)
        block(hidden_states, indices=(indices + 1) % EXPERTS)  # other values, the same program
    messages = [record.getMessage() for record in caplog.records]
    assert sum(m.startswith("Finished XLA compilation of jit(__call__)") for m in messages) == 1
    mapped, routing = jax.jit(jax.vmap(lambda h, i: block(h, indices=i)))(hidden_states, indices)
    assert_close(mapped, want)
    assert routing.stacked == (3,)


def test_stacked_layers_take_stacked_indices():
    """Recorded by one scan and replayed by another, with the gradient of a loop over layers."""
    keys, (hidden_states, input_ids) = (
        jax.random.split(jax.random.key(1), 3),
        make_inputs((TOKENS,)),
    )
    layers = [make_block(bx, "hash", "blocks", key=key) for key in keys]
    stacked = jax.tree.map(lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0], *layers)

    def scanned(stacked, hidden_states, extra):
        arrays, static = eqx.partition(stacked, eqx.is_array)

        def body(hidden_states, layer):
            arrays, extra = layer
            output, routing = eqx.combine(arrays, static)(hidden_states, **extra)
            return hidden_states + output, routing.indices

        return jax.lax.scan(body, hidden_states, (arrays, extra))

    def looped(layers, hidden_states):
        for layer in layers:
            hidden_states = hidden_states + layer(hidden_states, input_ids)[0]
        return jnp.sum(jnp.sin(hidden_states))

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def replayed(stacked, hidden_states):
        ids = jnp.broadcast_to(input_ids, (3, TOKENS))
        _, indices = scanned(stacked, hidden_states, {"input_ids": ids})
        output, _ = scanned(stacked, hidden_states, {"indices": indices})
        return jnp.sum(jnp.sin(output)), indices

    (value, indices), gradient = replayed(stacked, hidden_states)
    table = np.asarray(stacked.routed.router.table)
    assert table.shape == (3, VOCAB, SLOTS)
    np.testing.assert_array_equal(np.asarray(indices), table[:, np.asarray(input_ids)])
    want, wanted = eqx.filter_jit(eqx.filter_value_and_grad(looped))(layers, hidden_states)
    assert_close(value, want)
    leaves = zip(*map(jax.tree.leaves, wanted), strict=True)
    for got, parts in zip(jax.tree.leaves(gradient), leaves, strict=True):
        assert_close(got, jnp.stack(parts))

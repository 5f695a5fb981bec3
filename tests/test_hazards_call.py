"""Hazards 10 to 13: calls refused at trace time, with one message, eager and under jit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BACKENDS, EXPERTS, HIDDEN, ROUTERS, SLOTS, make_inputs
from hazard_inputs import layer, route

import braidax as bx


class Tensor:
    """Of torch: it has a shape and a dtype, which JAX cannot interpret."""

    shape, dtype = (2, 6, HIDDEN), "torch.float32"


IDS = jnp.zeros((2, 6), jnp.int32)
HIDDEN_STATES = jnp.zeros((2, 6, HIDDEN))
# What the two kinds of router refuse alike, then what only a router that looks at ids does.
ANY_ROUTER = {
    "a wrong width": ((HIDDEN_STATES[..., 1:], IDS), {}, ValueError, r"hidden=12\).*11\)"),
    "no axis": ((jnp.zeros(()), IDS), {}, ValueError, r"hidden=12\). Got \(\)"),
    "a list": (
        (HIDDEN_STATES.tolist(), IDS),
        {},
        TypeError,
        "`hidden_states` must be an array.*list",
    ),
    "an array of torch": (
        (Tensor(), IDS),
        {},
        TypeError,
        "`hidden_states` must be an array. Got a Tensor: .*from_dlpack",
    ),
    "integers": ((HIDDEN_STATES.astype(jnp.int32), IDS), {}, TypeError, "floating-point.*int32"),
    "a mask of numbers": (
        (HIDDEN_STATES, IDS),
        {"mask": jnp.ones((2, 6))},
        TypeError,
        "`mask` must have dtype bool. Got float32",
    ),
    "a list as mask": (
        (HIDDEN_STATES, IDS),
        {"mask": [[True] * 6] * 2},
        TypeError,
        "`mask` must be an array. Got a list",
    ),
    "a transposed mask": (
        (HIDDEN_STATES, IDS),
        {"mask": jnp.ones((6, 2), bool)},
        ValueError,
        r"`mask`.*\(2, 6\). Got \(6, 2\)",
    ),
    "a mask to broadcast": (
        (HIDDEN_STATES, IDS),
        {"mask": jnp.ones((2, 1), bool)},
        ValueError,
        r"`mask`.*Got \(2, 1\)",
    ),
}
HASH_ROUTER = {
    "no ids": ((HIDDEN_STATES,), {}, ValueError, "`input_ids` must be given to a `HashRouter`"),
    "one id": ((HIDDEN_STATES, IDS[0, :1]), {}, ValueError, r"\(2, 6\). Got \(1,\)"),
    "ids to broadcast": ((HIDDEN_STATES, IDS[:, :1]), {}, ValueError, r"\(2, 6\). Got \(2, 1\)"),
    "transposed ids": ((HIDDEN_STATES, IDS.T), {}, ValueError, r"\(2, 6\). Got \(6, 2\)"),
    "flat ids": ((HIDDEN_STATES, IDS.reshape(-1)), {}, ValueError, r"\(2, 6\). Got \(12,\)"),
    "an axis too many": ((HIDDEN_STATES, IDS[..., None]), {}, ValueError, r"Got \(2, 6, 1\)"),
    "a list of ids": (
        (HIDDEN_STATES, IDS.tolist()),
        {},
        TypeError,
        "`input_ids` must be an array. Got a list",
    ),
    "float ids": ((HIDDEN_STATES, IDS * 1.0), {}, TypeError, "integer dtype. Got float32"),
    "bool ids": ((HIDDEN_STATES, IDS > 0), {}, TypeError, "integer dtype. Got bool"),
}
REFUSED = [
    *((kind, *case) for kind in ROUTERS for case in ANY_ROUTER.values()),
    *(("hash", *case) for case in HASH_ROUTER.values()),
]


@pytest.mark.hazard(
    10, "a hash layer without ids: ValueError; a layer that selects by score ignores ids"
)
@pytest.mark.hazard(11, "ids of any other shape than the tokens: ValueError, never broadcast")
@pytest.mark.hazard(12, "float or bool ids: TypeError; every integer type gives the same rows")
@pytest.mark.hazard(13, "hidden states of another width, of integers or without an axis: an error")
@pytest.mark.parametrize("kind, arguments, options, error, text", REFUSED)
def test_a_call_is_refused_alike_eager_and_under_jit(
    kind, arguments, options, error, text, unchecked
):
    block = layer(kind)
    messages = []
    for call in (block, eqx.filter_jit(block), eqx.filter_jit(layer(kind, "dense"))):
        with pytest.raises(error, match=text) as caught:
            call(*arguments, **options)
        messages.append(str(caught.value).splitlines()[0])
    assert len(set(messages)) == 1


@pytest.mark.hazard(9)
@pytest.mark.parametrize("kind", ROUTERS)
def test_layers_stacked_for_a_scan_are_not_called_as_one(kind, unchecked):
    block = layer(kind)
    routing = block(HIDDEN_STATES, IDS)[1]
    stacked = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * 3) if eqx.is_array(leaf) else leaf, block
    )
    text = (
        rf"`router.gate.weight` must have shape \(experts, hidden\). Got \(3, {EXPERTS}, {HIDDEN}\)"
    )
    for call in (stacked, eqx.filter_jit(stacked), stacked.routed.router):
        with pytest.raises(ValueError, match=text):
            call(HIDDEN_STATES, IDS)
    with pytest.raises(ValueError, match=text):
        stacked(HIDDEN_STATES, routing=routing)


@pytest.mark.hazard(11)
def test_a_single_token_may_have_a_number_as_its_id(unchecked):
    router = layer("hash").routed.router
    assert router(HIDDEN_STATES[0, 0], 3).indices.tolist() == router.table[3].tolist()


@pytest.mark.hazard(10)
@pytest.mark.parametrize("backend", [case.name for case in BACKENDS])
def test_a_router_by_score_ignores_ids(backend):
    block = eqx.filter_jit(layer("top_k", backend))
    hidden_states, input_ids = make_inputs((4,))
    wanted = block(hidden_states)[0]
    for ids in (input_ids, input_ids - 100):
        np.testing.assert_array_equal(np.asarray(block(hidden_states, ids)[0]), np.asarray(wanted))


@pytest.mark.hazard(12)
def test_narrow_ids_of_a_large_vocabulary():
    """127 < vocab: a comparison in int8 would overflow."""
    table = bx.hash_tables.md5(1000, EXPERTS, SLOTS)
    router = bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table, key=jax.random.key(0))
    hidden_states = jnp.ones((3, HIDDEN))
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16):
        routing = route(router, hidden_states, jnp.asarray([0, 100, 127], dtype))
        np.testing.assert_array_equal(np.asarray(routing.indices), table[[0, 100, 127]])


@pytest.mark.hazard(12)
def test_wide_ids_are_not_wrapped_into_the_vocabulary(unchecked):
    """2**32 + 5 is 5 in 32 bits."""
    table = bx.hash_tables.md5(1000, EXPERTS, SLOTS)
    router = bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table, key=jax.random.key(0))
    ids = np.array([7, 2**32 + 5, 999], np.int64)
    with jax.enable_x64(True):
        routing = eqx.filter_jit(router)(jnp.ones((3, HIDDEN), jnp.float32), jnp.asarray(ids))
        assert routing.indices.dtype == jnp.int32
    # As numpy, and not through a jit of the caller, they are whole when the router is called.
    routings = [routing, router(jnp.ones((3, HIDDEN)), ids)]
    routings += [router(jnp.ones((3, HIDDEN)), ids.astype(np.uint64))]
    for got in routings:
        np.testing.assert_array_equal(np.asarray(got.indices)[[0, 2]], table[[7, 999]])
        assert np.isnan(np.asarray(got.weights)).all(axis=1).tolist() == [False, True, False]
    for number in (2**32 + 5, 2**70, -1 - 2**31):
        assert np.isnan(np.asarray(router(jnp.ones(HIDDEN), number).weights)).all()


@pytest.mark.hazard(14)
def test_wide_indices_are_not_wrapped_into_the_experts(unchecked):
    """Replayed from a file that numpy read."""
    block, (hidden_states, input_ids) = layer("top_k"), make_inputs((4,))
    output, routing = block(hidden_states, input_ids)
    indices = np.asarray(routing.indices, np.int64)
    again = eqx.tree_at(lambda r: r.indices, routing, indices)
    np.testing.assert_array_equal(
        np.asarray(block(hidden_states, routing=again)[0]), np.asarray(output)
    )
    indices[1, 0] += 2**32
    again = eqx.tree_at(lambda r: r.indices, routing, indices)
    broken = np.asarray(block(hidden_states, routing=again)[0])
    assert np.isnan(broken).all(axis=1).tolist() == [False, True, False, False]

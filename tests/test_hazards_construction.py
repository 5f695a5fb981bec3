"""Hazards 1 to 9: what cannot be built, and what was replaced by something that does not fit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    BACKENDS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    ROUTERS,
    SLOTS,
    VOCAB,
    make_block,
    make_inputs,
)
from hazard_inputs import layer

import braidax as bx

KEY = jax.random.key(0)
EXPERT_ERRORS = [
    ({"num_experts": 0}, ValueError, "`num_experts` must be at least 1. Got 0"),
    ({"num_experts": 2.0}, TypeError, "`num_experts` must be an integer. Got 2.0"),
    ({"hidden_size": -1}, ValueError, "`hidden_size` must be at least 1. Got -1"),
    ({"hidden_size": 10**400}, ValueError, "`hidden_size` must be between 1 and 2147483647"),
    ({"intermediate_size": 2**31}, ValueError, "`intermediate_size` must be between 1 and"),
    ({"intermediate_size": True}, TypeError, "`intermediate_size` must be an integer. Got True"),
    ({"limit": 0.0}, ValueError, "`limit` must be finite and above 0. Got 0.0"),
    ({"limit": -1.0}, ValueError, "`limit` must be finite and above 0. Got -1.0"),
    ({"limit": float("nan")}, ValueError, "`limit` must be finite and above 0. Got nan"),
    ({"limit": float("inf")}, ValueError, "`limit` must be finite and above 0. Got inf"),
    ({"limit": "10"}, TypeError, "`limit` must be a number. Got '10'"),
    ({"dtype": jnp.int8}, TypeError, "`dtype` must be a floating-point dtype of 16 bits"),
    ({"activation": "silu"}, TypeError, "`activation` must be a hashable function.*Got 'silu'"),
    ({"activation": lambda a, b, c: a}, TypeError, "`activation` must be a hashable function"),
    ({"use_bias": 1}, TypeError, "`use_bias` must be a bool. Got 1"),
]


@pytest.mark.hazard(1)
@pytest.mark.hazard(3)
@pytest.mark.parametrize("options, error, text", EXPERT_ERRORS)
def test_experts_that_make_no_sense(options, error, text, unchecked):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}

    def build(make, limit=None, **options):
        return make(**{"activation": bx.activations.swiglu(limit), **options}, key=KEY)

    with pytest.raises(error, match=text):
        build(bx.Experts, **{"num_experts": EXPERTS, **sizes, **options})
    if "num_experts" not in options:
        with pytest.raises(error, match=text):
            build(bx.FeedForward, **{**sizes, **options})


@pytest.mark.hazard(
    3, "a scaling factor, limit or rate that is not finite, or not above 0: ValueError"
)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -1.5])
def test_a_scaling_factor_that_is_not_finite_and_positive(kind, value):
    with pytest.raises(ValueError, match="`scaling_factor` must be finite and above 0. Got"):
        make_block(bx, kind, "blocks", scaling_factor=value)


@pytest.mark.hazard(3)
def test_no_limit_is_no_clamp():
    """By the field, and by an up of 1e6 with a gate whose silu is itself."""
    for activation in (bx.Experts(1, 1, 1, key=KEY).activation, bx.activations.swiglu()):
        assert activation.limit is None
        assert activation(jnp.float32(1e3), jnp.float32(-1e6)) == np.float32(-1e9)


@pytest.mark.hazard(5, "a table of another shape, or transposed: ValueError with both shapes")
@pytest.mark.hazard(6, "a float or bool table: TypeError; any integers are stored as int32")
@pytest.mark.hazard(7, "a table entry of no expert: ValueError with its row, column and value")
@pytest.mark.parametrize(
    "table, error, text",
    [
        (np.zeros((VOCAB, SLOTS)), TypeError, "`table`: .*integer dtype. Got float64"),
        (np.zeros((VOCAB, SLOTS), bool), TypeError, "`table`: .*integer dtype. Got bool"),
        (
            np.zeros((SLOTS, VOCAB), np.int32),
            ValueError,
            rf"`table` must have shape \(vocab, num_experts_per_token=3\). Got \(3, {VOCAB}\)",
        ),
        (
            np.pad(np.full((1, 1), -1), ((4, 15), (2, 0))),
            ValueError,
            "`table`: .*Got -1 at row 4, column 2",
        ),
        (
            np.pad(np.full((1, 1), 2**31), ((1, 18), (1, 1))),
            ValueError,
            "`table`: .*Got 2147483648 at row 1, column 1",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_named(table, error, text, unchecked):
    with pytest.raises(error, match=text):
        bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table, key=KEY)


@pytest.mark.hazard(6)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64])
def test_a_table_of_any_integers_is_stored_as_int32(dtype):
    table = bx.hash_tables.md5(VOCAB, EXPERTS, SLOTS)
    router = bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table.astype(dtype), key=KEY)
    assert router.table.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(router.table), table)


bias = lambda b: b.routed.router.score_correction_bias  # noqa: E731
table = lambda b: b.routed.router.table  # noqa: E731
gate_up = lambda b: b.routed.experts.gate_up  # noqa: E731
down = lambda b: b.routed.experts.down  # noqa: E731

REPLACED = {
    "a bias of one": (
        "top_k",
        bias,
        lambda a: a[:1],
        ValueError,
        r"`score_correction_bias` must have shape \(experts=5,\). Got \(1,\)",
    ),
    "a bias with an axis more": ("top_k", bias, lambda a: a[None], ValueError, r"Got \(1, 5\)"),
    "a trained bias of one": (
        "hash",
        lambda b: b.routed.router.gate.bias,
        lambda a: jnp.zeros(1),
        ValueError,
        r"`bias` must have the \(experts,\) of `weight`, \(5,\). Got \(1,\)",
    ),
    "an integer bias": (
        "top_k",
        bias,
        lambda a: a.astype(jnp.int32),
        TypeError,
        "`score_correction_bias` must have a floating-point dtype. Got int32",
    ),
    "an averaged table": (
        "hash",
        table,
        lambda a: 0.5 * a,
        TypeError,
        "`table` must have an integer dtype. Got float32",
    ),
    "transposed experts": (
        "top_k",
        down,
        lambda a: jnp.swapaxes(a, 1, 2),
        ValueError,
        r"`down` must have shape \(5, 7, 12\), .*`gate_up` \(5, 2, 7, 12\). Got \(5, 12, 7\)",
    ),
    "a gate without an up": (
        "top_k",
        gate_up,
        lambda a: a[:, :-1],
        ValueError,
        r"`gate_up` must have shape \(\*, 2, intermediate, hidden\), .*Got \(5, 1, 7, 12\)",
    ),
    "a narrower gate and up": (
        "top_k",
        gate_up,
        lambda a: a[:, :, :-1],
        ValueError,
        r"`down` must have shape \(5, 6, 12\), .*Got \(5, 7, 12\)",
    ),
    "transposed shared experts": (
        "hash",
        lambda b: b.shared.down,
        lambda a: a.T,
        ValueError,
        r"`down` must have shape \(7, 12\), .*Got \(12, 7\)",
    ),
}


@pytest.mark.hazard(
    4, "a selection bias of another shape or dtype, or not finite in a file: an error"
)
@pytest.mark.hazard(6)
@pytest.mark.hazard(9, "expert weights that do not fit together or the router: ValueError")
@pytest.mark.parametrize("name", REPLACED)
def test_arrays_replaced_by_something_that_does_not_fit(name, unchecked):
    kind, where, change, error, text = REPLACED[name]
    block = layer(kind)
    broken = eqx.tree_at(where, block, change(where(block)), is_leaf=lambda leaf: leaf is None)
    for call in (broken, eqx.filter_jit(broken)):
        with pytest.raises(error, match=text):
            call(*make_inputs((4,)))


@pytest.mark.hazard(9)
@pytest.mark.parametrize("case", BACKENDS, ids=lambda case: case.name)
def test_fewer_experts_than_the_router_has(case, unchecked):
    block = layer("top_k", case.name)
    where = lambda b: (gate_up(b), down(b))  # noqa: E731
    broken = eqx.tree_at(where, block, (gate_up(block)[:-1], down(block)[:-1]))
    with pytest.raises(ValueError, match="`gate_up` must hold 5 experts.*Got 4"):
        broken(*make_inputs((4,)))


@pytest.mark.hazard(14)
@pytest.mark.parametrize("name", ["checks", "remat"])
def test_options_that_are_bools(name, unchecked):
    block = layer("top_k").routed
    build = {
        "checks": lambda: bx.RoutedMoE(block.router, block.experts, checks="yes"),
        "remat": lambda: bx.SortedDispatch(remat="yes"),
    }[name]
    with pytest.raises(TypeError, match=f"`{name}` must be a bool. Got 'yes'"):
        build()

"""Layers as named arrays: the released names and shapes, there and back, and what is refused."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braidax as bx

CONFIG = bx.MoEConfig(
    5, 3, num_experts=4, num_experts_per_token=2, vocab_size=6, num_hash_layers=1, swiglu_limit=7.0
)
HASHED, LEARNED = 0, 1
KINDS = pytest.mark.parametrize("layer_idx", [HASHED, LEARNED])
# By hand from the reference's modules: E=4 experts, H=5, I=3, V=6, K=2.
FEED_FORWARD_SHAPES = {
    "experts.gate_up_proj": (4, 6, 5),
    "experts.down_proj": (4, 5, 3),
    "shared_experts.gate_proj.weight": (3, 5),
    "shared_experts.up_proj.weight": (3, 5),
    "shared_experts.down_proj.weight": (5, 3),
}
SHAPES = {
    HASHED: {"gate.weight": (4, 5), "gate.tid2eid": (6, 2), **FEED_FORWARD_SHAPES},
    LEARNED: {
        "gate.weight": (4, 5),
        "gate.e_score_correction_bias": (4,),
        **FEED_FORWARD_SHAPES,
    },
}


def numbered(layer_idx):
    """Tensors in which every entry is another number."""
    rng = np.random.default_rng(layer_idx)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES[layer_idx].items()
    }
    if layer_idx == HASHED:
        tensors["gate.tid2eid"] = np.array([[0, 1], [2, 3], [3, 3], [1, 0], [2, 0], [3, 1]])
    return tensors


@pytest.mark.hazard(45)
@KINDS
def test_there_and_back_bit_for_bit(layer_idx):
    tensors = numbered(layer_idx)
    block = bx.from_state_dict(CONFIG, layer_idx, tensors)
    back = bx.to_state_dict(block)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].flags.c_contiguous, name
        assert back[name].flags.writeable, name
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@KINDS
def test_the_layer_owns_its_arrays(layer_idx):
    tensors = {}
    for name, tensor in numbered(layer_idx).items():
        # XLA shares the memory of arrays that are aligned to 64 bytes, unless told not to.
        raw = np.empty(tensor.nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        tensors[name] = raw[start : start + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
        tensors[name][...] = tensor
    block = bx.from_state_dict(CONFIG, layer_idx, tensors)
    for tensor in tensors.values():
        tensor[...] = 99
    for name, tensor in numbered(layer_idx).items():
        np.testing.assert_array_equal(bx.to_state_dict(block)[name], tensor, err_msg=name)


@KINDS
def test_the_same_structure_as_from_config(layer_idx):
    block = bx.from_state_dict(CONFIG, layer_idx, numbered(layer_idx))
    built = bx.RoutedAndSharedMoE.from_config(CONFIG, layer_idx, key=jax.random.key(0))
    assert jax.tree.structure(block) == jax.tree.structure(built)
    for ours, theirs in zip(jax.tree.leaves(block), jax.tree.leaves(built), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert isinstance(ours, jax.Array)
    assert block.routed.experts.limit == block.shared.limit == 7.0


def test_each_row_means_what_its_name_says():
    """One token through one expert, by the reference's own formula on the named tensors."""
    tensors = {name: np.float64(array) for name, array in numbered(LEARNED).items()}
    block = bx.from_state_dict(CONFIG, LEARNED, tensors)
    token = np.linspace(-1, 1, 5)
    gate_up = tensors["experts.gate_up_proj"]

    def swiglu(gate, up, down):
        return down @ ((gate @ token) / (1 + np.exp(-(gate @ token))) * (up @ token))

    experts = [
        swiglu(gate_up[e, :3], gate_up[e, 3:], tensors["experts.down_proj"][e]) for e in range(4)
    ]
    shared = swiglu(
        *(tensors[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
    )
    scores = np.sqrt(np.log1p(np.exp(tensors["gate.weight"] @ token)))
    chosen = np.argsort(-(scores + tensors["gate.e_score_correction_bias"]))[:2]
    weights = scores[chosen] / scores[chosen].sum()
    want = shared + sum(w * experts[e] for w, e in zip(weights, chosen, strict=True))
    output, routing = block(jnp.asarray(token, jnp.float32))
    assert routing.indices.tolist() == chosen.tolist()
    np.testing.assert_allclose(np.asarray(output), want, rtol=1e-5, atol=1e-5)


@KINDS
def test_gradients_have_the_names_of_what_is_trained(layer_idx):
    block = bx.from_state_dict(CONFIG, layer_idx, numbered(layer_idx))
    tokens, ids = jnp.ones((3, 5)), jnp.arange(3)
    gradient = eqx.filter_grad(lambda block: jnp.sum(block(tokens, ids)[0]))(block)
    named = bx.to_state_dict(gradient)
    shapes = {name: array.shape for name, array in named.items()}
    assert shapes == {k: v for k, v in SHAPES[layer_idx].items() if k != "gate.tid2eid"}
    np.testing.assert_array_equal(
        named["experts.down_proj"], np.swapaxes(gradient.routed.experts.down, 1, 2)
    )
    frozen = eqx.filter(gradient, bx.trainable(block))
    assert "gate.e_score_correction_bias" not in bx.to_state_dict(frozen)


@pytest.mark.hazard(44)
@KINDS
def test_bfloat16_keeps_the_bias_and_the_table(layer_idx):
    block = bx.from_state_dict(CONFIG, layer_idx, numbered(layer_idx), dtype=jnp.bfloat16)
    kept = {"gate.tid2eid": np.int64, "gate.e_score_correction_bias": np.float32}
    for name, array in bx.to_state_dict(block).items():
        assert array.dtype == kept.get(name, jnp.bfloat16), name


def test_stacked_layers_keep_their_axis():
    blocks = [bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED)) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    shapes = {name: array.shape for name, array in bx.to_state_dict(stacked).items()}
    assert shapes == {name: (3, *shape) for name, shape in SHAPES[LEARNED].items()}


def test_two_shared_experts_are_one_wider():
    config = dataclasses.replace(CONFIG, num_shared_experts=2)
    tensors = numbered(LEARNED)
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"shared_experts.{part}_proj.weight"
        tensors[name] = np.concatenate([tensors[name]] * 2, axis)
    assert bx.from_state_dict(config, LEARNED, tensors).shared.gate_up.shape == (12, 5)


def changed(**tensors):
    return lambda given: {**given, **{k.replace("__", "."): v for k, v in tensors.items()}}


def without(name):
    return lambda given: {key: value for key, value in given.items() if key != name}


BIAS, TABLE = np.zeros(4, np.float32), np.zeros((6, 2), np.int64)
REFUSED = {
    "nothing": (LEARNED, lambda given: {}, ValueError, "Missing: experts.down_proj, experts.g"),
    "a missing tensor": (HASHED, without("gate.tid2eid"), ValueError, "Missing: gate.tid2eid"),
    "an unknown tensor": (LEARNED, changed(gate__bias=BIAS), ValueError, "Unknown: gate.bias"),
    "a prefix": (
        LEARNED,
        lambda given: {f"mlp.{key}": value for key, value in given.items()},
        ValueError,
        "Unknown: mlp.experts.down_proj",
    ),
    "a table where there is none": (
        LEARNED,
        changed(gate__tid2eid=TABLE),
        ValueError,
        "Unknown: gate.tid2eid",
    ),
    "a transposed weight": (
        LEARNED,
        changed(experts__down_proj=np.zeros((4, 3, 5), np.float32)),
        ValueError,
        r"`experts.down_proj` must have shape \(4, 5, 3\). Got \(4, 3, 5\)",
    ),
    "a long table": (
        HASHED,
        changed(gate__tid2eid=np.zeros((7, 2), np.int64)),
        ValueError,
        r"`gate.tid2eid` must have shape \(6, 2\). Got \(7, 2\)",
    ),
    "an expert out of range": (
        HASHED,
        changed(gate__tid2eid=TABLE + 4),
        ValueError,
        r"`gate.tid2eid`: .*\[0, num_experts=4\). Got 4 at row 0, column 0",
    ),
    "an id that wraps": (HASHED, changed(gate__tid2eid=TABLE + 2**32), ValueError, "4294967296"),
    "a float table": (
        HASHED,
        changed(gate__tid2eid=TABLE.astype(np.float32)),
        TypeError,
        "`gate.tid2eid`: .*integer",
    ),
    "integer weights": (
        LEARNED,
        changed(gate__weight=np.zeros((4, 5), np.int8)),
        TypeError,
        "`gate.weight` .* Got int8",
    ),
    "quantised weights": (
        LEARNED,
        changed(experts__gate_up_proj=np.zeros((4, 6, 5), jnp.float8_e4m3fn)),
        TypeError,
        "`experts.gate_up_proj` .* Got float8_e4m3fn",
    ),
    "a weight too large": (
        LEARNED,
        changed(experts__down_proj=np.full((4, 5, 3), 1e300)),
        ValueError,
        r"`experts.down_proj` must fit float32. Got 1e\+300",
    ),
    "a bias too large": (
        LEARNED,
        changed(gate__e_score_correction_bias=np.full(4, 1e300)),
        ValueError,
        "`gate.e_score_correction_bias` must fit float32",
    ),
    "a NaN bias": (
        LEARNED,
        changed(gate__e_score_correction_bias=np.array([0, np.nan, 0, 0], np.float32)),
        ValueError,
        "`gate.e_score_correction_bias` must be finite",
    ),
}


@pytest.mark.hazard(4)
@pytest.mark.hazard(5)
@pytest.mark.hazard(45)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_tensors(case):
    layer_idx, change, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        bx.from_state_dict(CONFIG, layer_idx, change(numbered(layer_idx)))


def test_refused_modules(unchecked):
    block = bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED))
    with pytest.raises(TypeError, match="`moe` must be a `RoutedAndSharedMoE`. Got RoutedMoE"):
        bx.to_state_dict(block.routed)
    with pytest.raises(TypeError, match="`moe.shared` must be a `SwiGLU`"):
        bx.to_state_dict(eqx.tree_at(lambda b: b.shared, block, eqx.nn.Identity()))
    with pytest.raises(TypeError, match="`moe` must hold arrays, .* Got bool for gate.weight"):
        bx.to_state_dict(bx.trainable(block))


def test_refused_arguments(unchecked):
    for dtype in (jnp.int32, jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype of 16 bits"):
            bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED), dtype=dtype)
    with pytest.raises(ValueError, match="`dtype` must be enabled: float64 needs jax_enable_x64"):
        bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED), dtype=jnp.float64)
    with pytest.raises(TypeError, match="`tensors` must be a mapping of names. Got NoneType"):
        bx.from_state_dict(CONFIG, LEARNED, None)
    with pytest.raises(ValueError, match="Unknown: 3"):
        bx.from_state_dict(CONFIG, LEARNED, {**numbered(LEARNED), 3: np.zeros(1)})
    with pytest.raises(TypeError, match="`gate.weight` must be an array that numpy can read"):
        bx.from_state_dict(CONFIG, LEARNED, {**numbered(LEARNED), "gate.weight": Unreadable()})


class Unreadable:
    """As a torch tensor in bfloat16 answers."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")

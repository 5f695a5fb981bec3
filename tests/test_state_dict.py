"""Layers as named arrays: the released names and shapes, there and back, and what is refused."""

import dataclasses

import checkpoints
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
    assert block.routed.experts.activation == bx.activations.swiglu(7)
    assert block.shared.activation == bx.activations.swiglu(7)


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
    assert bx.from_state_dict(config, LEARNED, tensors).shared.gate_up.shape == (2, 6, 5)


def test_released_names_and_quantized_numbers(tmp_path):
    """What a file may hold, the mapping may: here all of a file's tensors, in FP4 and FP8."""
    tensors, numbers = checkpoints.layer_tensors(checkpoints.Layout(), 2)
    given = {name.removeprefix("layers.2.ffn."): tensor for name, tensor in tensors.items()}
    config = checkpoints.config(bx)
    block = bx.from_state_dict(config, 2, given, dtype=jnp.bfloat16)
    wanted = numbers["down"].astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(block.routed.experts.down, wanted)
    packed = bx.from_state_dict(config, 2, given, dtype="packed").routed.experts
    assert packed.down.payload.dtype == np.uint8 and packed.gate_up.shape == (4, 2, 128, 256)
    with pytest.raises(TypeError, match="Got PackedMatrices for experts.gate_up"):
        bx.to_state_dict(eqx.tree_at(lambda block: block.routed.experts, block, packed))


def changed(**tensors):
    return lambda given: {**given, **{k.replace("__", "."): v for k, v in tensors.items()}}


def without(name):
    return lambda given: {key: value for key, value in given.items() if key != name}


BIAS, TABLE = np.zeros(4, np.float32), np.zeros((6, 2), np.int64)
REFUSED = {
    "nothing": (LEARNED, lambda given: {}, "`gate.weight` must be there, .* Got nothing"),
    "a missing tensor": (
        HASHED,
        without("gate.tid2eid"),
        "`gate.tid2eid` must be there, .* as .* num_hash_layers=1. Got 6 other",
    ),
    "an unknown tensor": (LEARNED, changed(gate__scale=BIAS), "`gate.scale` .* a known meaning"),
    "one tensor twice": (LEARNED, changed(gate__bias=BIAS), "`gate.bias` must be the only one"),
    "a prefix": (
        LEARNED,
        lambda given: {f"mlp.{key}": value for key, value in given.items()},
        "`gate.weight` must be there, .* mlp.experts.down_proj",
    ),
    "a table where there is none": (
        LEARNED,
        changed(gate__tid2eid=TABLE),
        "`gate.tid2eid` must not be there",
    ),
    "a transposed weight": (
        LEARNED,
        changed(experts__down_proj=np.zeros((4, 3, 5), np.float32)),
        r"`experts.down_proj` must have .* shape \(4, 5, 3\). Got \(4, 3, 5\)",
    ),
    "a long table": (
        HASHED,
        changed(gate__tid2eid=np.zeros((7, 2), np.int64)),
        r"`gate.tid2eid` must have .* shape \(6, 2\). Got \(7, 2\)",
    ),
    "an expert out of range": (
        HASHED,
        changed(gate__tid2eid=TABLE + 4),
        r"`gate.tid2eid` .*\[0, num_experts=4\). Got 4 at row 0, column 0",
    ),
    "an id that wraps": (HASHED, changed(gate__tid2eid=TABLE + 2**32), "4294967296"),
    "a float table": (
        HASHED,
        changed(gate__tid2eid=TABLE.astype(np.float32)),
        "`gate.tid2eid` must be integers",
    ),
    "integer weights": (
        LEARNED,
        changed(gate__weight=np.zeros((4, 5), np.int8)),
        "`gate.weight` .* Got I8",
    ),
    "integer experts": (
        LEARNED,
        changed(experts__down_proj=np.zeros((4, 5, 3), np.int32)),
        "`experts.down_proj` .* Got I32",
    ),
    "quantized weights without scales": (
        LEARNED,
        changed(experts__gate_up_proj=np.zeros((4, 6, 5), jnp.float8_e4m3fn)),
        "`experts.gate_up_proj` must have a scale beside it. Got F8_E4M3",
    ),
    "a weight too large": (
        LEARNED,
        changed(experts__down_proj=np.full((4, 5, 3), 1e300)),
        r"`experts.down_proj` must fit float32. Got numbers beyond",
    ),
    "a bias too large": (
        LEARNED,
        changed(gate__e_score_correction_bias=np.full(4, 1e300)),
        "`gate.e_score_correction_bias` must fit float32",
    ),
    "a NaN bias": (
        LEARNED,
        changed(gate__e_score_correction_bias=np.array([0, np.nan, 0, 0], np.float32)),
        "`gate.e_score_correction_bias` must be finite",
    ),
}


@pytest.mark.hazard(4)
@pytest.mark.hazard(5)
@pytest.mark.hazard(45)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_tensors(case):
    layer_idx, change, text = REFUSED[case]
    with pytest.raises(ValueError, match=f"tensors: .*{text}"):
        bx.from_state_dict(CONFIG, layer_idx, change(numbered(layer_idx)))


def test_refused_modules(unchecked):
    block = bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED))
    with pytest.raises(TypeError, match="`moe` must be a `RoutedMoE` or .* Got TopKRouter"):
        bx.to_state_dict(block.routed.router)
    with pytest.raises(TypeError, match="`moe.shared` must be `FeedForward`"):
        bx.to_state_dict(eqx.tree_at(lambda b: b.shared, block, eqx.nn.Identity()))
    with pytest.raises(TypeError, match="`moe` must hold arrays, .* Got bool for gate.weight"):
        bx.to_state_dict(bx.trainable(block))
    others = {
        "router.gate.bias` must be None in a deepseek_v4 layer": bx.TopKRouter(
            5, 4, 2, use_bias=True, key=jax.random.key(0)
        ),
        "experts.gate_up_bias` must be None": bx.Experts(
            4, 5, 3, use_bias=True, key=jax.random.key(0)
        ),
        "experts` must be `Experts` of SwiGLU": bx.Experts(
            4, 5, 3, activation=jax.nn.silu, key=jax.random.key(0)
        ),
    }
    for name, other in others.items():
        where = lambda b: b.routed.router if "router" in name else b.routed.experts  # noqa: E731, B023
        with pytest.raises(TypeError, match=f"`moe.routed.{name}"):
            bx.to_state_dict(eqx.tree_at(where, block, other))


def test_refused_arguments(unchecked):
    for dtype in (jnp.int32, jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype of 16 bits"):
            bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED), dtype=dtype)
    with pytest.raises(ValueError, match="`dtype` must be enabled: float64 needs jax_enable_x64"):
        bx.from_state_dict(CONFIG, LEARNED, numbered(LEARNED), dtype=jnp.float64)
    with pytest.raises(TypeError, match="`tensors` must map names to arrays. Got NoneType"):
        bx.from_state_dict(CONFIG, LEARNED, None)
    with pytest.raises(TypeError, match="`tensors` must map names to arrays. Got the name 3"):
        bx.from_state_dict(CONFIG, LEARNED, {**numbered(LEARNED), 3: np.zeros(1)})
    with pytest.raises(
        TypeError, match="`gate.weight` must be an array that numpy or DLPack can read"
    ):
        bx.from_state_dict(CONFIG, LEARNED, {**numbered(LEARNED), "gate.weight": Unreadable()})


class Lent:
    """As torch's bfloat16: numpy cannot read it, DLPack can."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_that_only_dlpack_can_read():
    tensors = numbered(LEARNED)
    lent = {name: Lent(jnp.asarray(tensor, jnp.bfloat16)) for name, tensor in tensors.items()}
    found = bx.to_state_dict(bx.from_state_dict(CONFIG, LEARNED, lent))
    for name, tensor in tensors.items():
        wanted = tensor.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


class Unreadable:
    """As a torch tensor in bfloat16 answers."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")

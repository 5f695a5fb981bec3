"""Experts kept in 4 or 8 bits: the same outputs and gradients as the decoded block; saving."""

import json

import checkpoints
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from checkpoints import EXPERTS, HASH_LAYERS, HIDDEN, LAYOUTS, SLOTS, VOCAB, Layout

import braidax as bx
from braidax._checkpoint.index import StoredTensors
from braidax._checkpoint.safetensors_writer import write_safetensors
from braidax._experts.packed import PackedMatrices

SCORED = HASH_LAYERS
PACKABLE = {
    name: layout for name, layout in LAYOUTS.items() if layout.payload not in ("F32", "F16", "BF16")
}


def write(folder, layout, layer_idx, change=None):
    tensors, _ = checkpoints.layer_tensors(layout, layer_idx)
    if change is not None:
        change(tensors)
    path = folder / "model.safetensors"
    write_safetensors(path, tensors)
    (folder / "config.json").write_text(json.dumps(checkpoints.config_json()))
    return path


def inputs(tokens=13):
    hidden_states = jax.random.normal(jax.random.key(0), (tokens, HIDDEN))
    return hidden_states, jax.random.randint(jax.random.key(1), (tokens,), 0, VOCAB)


@eqx.filter_jit
def run(moe, hidden_states, input_ids):
    return moe(hidden_states, input_ids)


@pytest.mark.parametrize("layout", PACKABLE.values(), ids=PACKABLE)
def test_each_matrix_is_the_decoded_one(tmp_path, layout):
    """Bit for bit, as the array that it stands for and as the kernels see it."""
    path = write(tmp_path, layout, SCORED)
    packed, decoded = (
        bx.load_moe(path, SCORED, dtype=dtype).routed.experts for dtype in ("packed", "float32")
    )
    merged = decoded.gate_up.reshape(EXPERTS, -1, HIDDEN)
    for found, whole, wanted in (
        (packed.gate_up, decoded.gate_up, merged),
        (packed.down, decoded.down, decoded.down),
    ):
        assert isinstance(found, PackedMatrices)
        assert (found.shape, found.ndim, found.dtype) == (whole.shape, whole.ndim, whole.dtype)
        assert found.merged().shape == wanted.shape
        for group in range(EXPERTS):
            matrix = found.merged().of_group(jnp.int32(group), jnp.float32)
            assert np.array_equal(matrix, wanted[group])


@pytest.mark.parametrize("name", ["V4-Flash and Pro", "V4 Base", "FP8 E5M2"])
def test_outputs_are_those_of_the_decoded_block(tmp_path, name):
    path = write(tmp_path, LAYOUTS[name], SCORED)
    packed, decoded = bx.load_moe(path, SCORED, dtype="packed"), bx.load_moe(path, SCORED)
    (output, routing), (wanted, wanted_routing) = (run(moe, *inputs()) for moe in (packed, decoded))
    assert np.array_equal(routing.indices, wanted_routing.indices)
    assert_close(output, wanted)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The same layer packed and decoded."""
    path = write(tmp_path_factory.mktemp("blocks"), Layout(), SCORED)
    return bx.load_moe(path, SCORED, dtype="packed"), bx.load_moe(path, SCORED)


@pytest.mark.parametrize("assignment", ["one expert", "last expert", "all", "none"])
@pytest.mark.parametrize("tokens", [1, 130, pytest.param(5, marks=pytest.mark.slow)])
def test_any_split_of_the_rows(blocks, assignment, tokens):
    """Blocks of 8, 64 and 256 rows, full and not, at both ends of the rows."""
    packed, decoded = (moe.routed.experts for moe in blocks)
    if assignment == "none":
        sizes = np.zeros(EXPERTS, np.int32)
    elif assignment == "all":
        sizes = np.bincount(np.arange(tokens) ** 2 % EXPERTS, minlength=EXPERTS)
    else:
        sizes = np.zeros(EXPERTS, np.int32)
        sizes[0 if assignment == "one expert" else -1] = tokens - tokens // 3
    rows = jax.random.normal(jax.random.key(0), (tokens, HIDDEN))
    sizes = jnp.asarray(sizes, jnp.int32)
    matmul = bx.GroupedMatmul(bx.matmul.Auto())
    found, wanted = (experts(rows, sizes, matmul) for experts in (packed, decoded))
    assert found.dtype == jnp.float32
    assert_close(found, wanted)
    assert not np.asarray(found[int(sizes.sum()) :]).any()


def test_blocks_cut_off_by_the_edges(tmp_path):
    """FP8 whose sizes are no multiples of its blocks: decoded, packed, and saved again."""
    tensors, _ = checkpoints.layer_tensors(LAYOUTS["V4 Base"], SCORED, sizes=(160, 96, EXPERTS))
    write_safetensors(tmp_path / "a.safetensors", tensors)
    config = checkpoints.config(bx, hidden_size=160, intermediate_size=96)
    packed, decoded = (
        bx.load_moe(tmp_path / "a.safetensors", SCORED, config=config, dtype=dtype)
        for dtype in ("packed", "float32")
    )
    hidden_states = jax.random.normal(jax.random.key(0), (5, 160))
    assert_close(run(packed, hidden_states, None)[0], run(decoded, hidden_states, None)[0])
    bx.save_moe(tmp_path / "b.safetensors", packed, SCORED)
    again = bx.load_moe(tmp_path / "b.safetensors", SCORED, config=config, dtype="packed")
    assert eqx.tree_equal(again, packed)


def test_stacked_blocks_that_gate_and_up_share_cannot_stay_packed(tmp_path):
    layout = LAYOUTS["transformers, fused, FP8"]
    tensors, numbers = checkpoints.layer_tensors(layout, SCORED, sizes=(160, 96, EXPERTS))
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors)
    config = checkpoints.config(bx, hidden_size=160, intermediate_size=96)
    decoded = bx.load_moe(path, SCORED, config=config).routed.experts
    assert np.array_equal(decoded.gate_up, numbers["gate_up"].astype(np.float32))
    with pytest.raises(ValueError, match="a.safetensors: .*blocks of 128 rows .* size of 96"):
        bx.load_moe(path, SCORED, config=config, dtype="packed")


def test_unused_experts_are_not_decoded(blocks):
    """NaN in an expert without rows reaches nothing: it was not multiplied by."""
    packed, _ = blocks
    hidden_states, _ = inputs(1)
    wanted, routing = run(packed, hidden_states, None)
    used = np.unique(routing.indices)
    unused = np.setdiff1d(np.arange(EXPERTS), used)
    assert len(used) == SLOTS and len(unused) == EXPERTS - SLOTS
    where = lambda moe: (moe.routed.experts.gate_up.scale, moe.routed.experts.down.scale)  # noqa: E731
    poisoned = eqx.tree_at(where, packed, [s.at[unused].set(255) for s in where(packed)])
    assert np.array_equal(run(poisoned, hidden_states, None)[0], wanted)
    poisoned = eqx.tree_at(where, packed, [s.at[used].set(255) for s in where(packed)])
    assert np.isnan(run(poisoned, hidden_states, None)[0]).all()


def test_gradients_reach_the_rows_and_the_router(blocks):
    hidden_states, _ = inputs()

    @eqx.filter_jit
    def gradients(moe):
        def loss(arguments):
            moe, hidden_states = arguments
            return (moe(hidden_states)[0] ** 2).sum()

        gradient, by_input = eqx.filter_grad(loss)((moe, hidden_states))
        return by_input, gradient.routed.router.gate.weight, gradient.shared.gate_up

    for found, wanted in zip(*map(gradients, blocks), strict=True):
        assert_close(found, wanted)


def test_nothing_packed_is_trained(blocks):
    packed, _ = blocks
    trained = eqx.filter(packed, bx.trainable(packed))
    assert jax.tree.leaves(trained.routed.experts) == []
    assert jax.tree.leaves(trained.shared) != []


@pytest.mark.slow
def test_vmap_and_per_example_gradients(blocks):
    packed, decoded = blocks
    hidden_states, _ = inputs(6)
    hidden_states = hidden_states.reshape(2, 3, HIDDEN)

    @eqx.filter_jit
    def both(moe):
        loss = lambda x: (moe(x)[0] ** 2).sum()  # noqa: E731
        return jax.vmap(lambda x: moe(x)[0])(hidden_states), jax.vmap(jax.grad(loss))(hidden_states)

    for found, wanted in zip(both(packed), both(decoded), strict=True):
        assert_close(found, wanted)


def test_vmap_over_layers(blocks, tmp_path):
    packed, _ = blocks
    other = bx.load_moe(write(tmp_path, Layout(), SCORED + 1), SCORED + 1, dtype="packed")
    hidden_states, _ = inputs(3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, other)
    found = eqx.filter_jit(eqx.filter_vmap(lambda moe: moe(hidden_states)[0]))(stacked)
    for layer, moe in enumerate((packed, other)):
        assert_close(found[layer], run(moe, hidden_states, None)[0])


def test_bfloat16_input(blocks):
    hidden_states, _ = inputs()
    outputs = [run(moe, hidden_states.astype(jnp.bfloat16), None)[0] for moe in blocks]
    assert outputs[0].dtype == jnp.bfloat16
    # One bit of bfloat16: both sum in float32, in another order, and round once.
    assert_close(*outputs, tolerance=2**-8)


def test_packing_takes_the_bytes_of_the_file(tmp_path):
    path = write(tmp_path, Layout(), SCORED)
    experts = bx.load_moe(path, SCORED, dtype="packed").routed.experts
    assert {leaf.dtype for leaf in jax.tree.leaves(experts)} == {jnp.dtype(jnp.uint8)}
    file = StoredTensors(path)
    w3 = f"layers.{SCORED}.ffn.experts.2.w3"
    half = experts.gate_up.payload.shape[1] // 2
    assert np.array_equal(experts.gate_up.payload[2, half:].ravel(), file[f"{w3}.weight"].raw())
    assert np.array_equal(experts.gate_up.scale[2, half:].ravel(), file[f"{w3}.scale"].raw())


@pytest.mark.parametrize(
    "layout, change, message",
    [
        (LAYOUTS["transformers, upstream names, bfloat16"], None, "must be FP4 or FP8 .* floating"),
        (
            Layout(),
            lambda tensors: tensors.update(
                {f"layers.{SCORED}.ffn.experts.1.w3.scale": np.ones((128, 8), np.float32)}
            ),
            "experts.1.w3.weight` must be stored as .*experts.0.w1.weight",
        ),
    ],
)
def test_what_cannot_stay_packed(tmp_path, layout, change, message):
    path = write(tmp_path, layout, SCORED, change)
    with pytest.raises(ValueError, match=f"model.safetensors: `.*{message}"):
        bx.load_moe(path, SCORED, dtype="packed")

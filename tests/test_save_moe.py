"""What `save_moe` writes, `load_moe` reads back, bit for bit."""

import json

import checkpoints
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, HASH_LAYERS, HIDDEN, INTERMEDIATE, LAYOUTS, Layout

import braidax as bx
from braidax._checkpoint.index import StoredTensors
from braidax._checkpoint.safetensors_writer import write_safetensors

SCORED = HASH_LAYERS


def load(path, layer_idx, dtype):
    return bx.load_moe(path, layer_idx, config=checkpoints.config(bx), dtype=dtype)


def written(path, layout, layer_idx):
    write_safetensors(path, checkpoints.layer_tensors(layout, layer_idx)[0])
    return path


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("layer_idx", [0, SCORED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "packed"])
def test_round_trip(tmp_path, layer_idx, dtype):
    moe = load(written(tmp_path / "a.safetensors", Layout(), layer_idx), layer_idx, dtype)
    bx.save_moe(tmp_path / "b.safetensors", moe, layer_idx)
    assert_same_bits(load(tmp_path / "b.safetensors", layer_idx, dtype), moe)


@pytest.mark.parametrize("name", ["V4 Base", "transformers, fused, FP8", "MXFP8", "FP8 E5M2"])
def test_packed_experts_of_other_kinds_round_trip(tmp_path, name):
    path = written(tmp_path / "a.safetensors", LAYOUTS[name], SCORED)
    moe = load(path, SCORED, "packed")
    bx.save_moe(tmp_path / "b.safetensors", moe, SCORED)
    assert_same_bits(load(tmp_path / "b.safetensors", SCORED, "packed"), moe)
    decoded = load(tmp_path / "b.safetensors", SCORED, "float32")
    assert_same_bits(decoded, load(path, SCORED, "float32"))


def test_a_release_is_written_back_in_its_own_names_and_bytes(tmp_path):
    path = written(tmp_path / "a.safetensors", Layout(), SCORED)
    bx.save_moe(tmp_path / "b.safetensors", load(path, SCORED, "packed"), SCORED)
    before, after = StoredTensors(path), StoredTensors(tmp_path / "b.safetensors")
    shared = [name for name in before.files if "shared" in name and name.endswith("scale")]
    assert after.files.keys() == before.files.keys() - set(shared)
    same = [name for name in after.files if ".experts." in name or name.endswith("gate.bias")]
    assert len(same) == 6 * EXPERTS + 1
    for name in same:
        assert after[name][2:4] == before[name][2:4]
        assert after[name].raw().tobytes() == before[name].raw().tobytes()


@pytest.mark.parametrize("quantization, dtype", [("fp4", "I8"), ("fp8", "F8_E4M3")])
def test_quantization(tmp_path, quantization, dtype):
    """Within half a step of the format, stored as the releases are, and then without loss."""
    moe = bx.RoutedAndSharedMoE.from_config(checkpoints.config(bx), SCORED, key=jax.random.key(0))
    path = tmp_path / "a.safetensors"
    bx.save_moe(path, moe, SCORED, quantization=quantization)
    file = StoredTensors(path)
    stem = f"layers.{SCORED}.ffn"
    assert file[f"{stem}.experts.0.w2.weight"].dtype == dtype
    assert file[f"{stem}.shared_experts.w2.weight"].dtype == "F8_E4M3"
    assert file[f"{stem}.experts.0.w2.scale"].dtype == "F8_E8M0"
    found = load(path, SCORED, "float32")
    # Relative to the largest of a block: FP4 steps by 2 of 4 to 6, FP8 by 32 of 256 to 448.
    bounds = {"I8": 1 / 4, "F8_E4M3": 16 / 256}
    for one, other, kind in (
        (found.routed.experts.down, moe.routed.experts.down, dtype),
        (found.shared.gate_up, moe.shared.gate_up, "F8_E4M3"),
    ):
        error = np.abs(np.asarray(one) - np.asarray(other)).max()
        assert 0 < error <= bounds[kind] * np.abs(np.asarray(other)).max()
    assert_same_bits(found.routed.router, moe.routed.router)
    bx.save_moe(tmp_path / "b.safetensors", found, SCORED, quantization=quantization)
    assert_same_bits(load(tmp_path / "b.safetensors", SCORED, "float32"), found)


def test_a_folder_of_saved_layers_is_a_checkpoint(tmp_path):
    layers = {}
    for layer_idx in (0, SCORED):
        key = jax.random.key(layer_idx)
        layers[layer_idx] = bx.RoutedAndSharedMoE.from_config(
            checkpoints.config(bx), layer_idx, key=key
        )
        bx.save_moe(tmp_path / f"{layer_idx}.safetensors", layers[layer_idx], layer_idx)
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config_json()))
    for layer_idx, moe in layers.items():
        assert_same_bits(bx.load_moe(tmp_path, layer_idx), moe)


def test_what_cannot_be_saved(tmp_path, unchecked):
    config = checkpoints.config(bx)
    moe = bx.RoutedAndSharedMoE.from_config(config, SCORED, key=jax.random.key(0))
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="`path` must end in .safetensors"):
        bx.save_moe(tmp_path / "folder", moe, SCORED)
    poisoned = eqx.tree_at(
        lambda m: m.routed.router.score_correction_bias,
        moe,
        moe.routed.router.score_correction_bias.at[0].set(jnp.nan),
    )
    path.write_bytes(b"good")
    with pytest.raises(ValueError, match="`moe` must have a finite selection bias"):
        bx.save_moe(path, poisoned, SCORED)
    assert path.read_bytes() == b"good"
    path.unlink()
    with pytest.raises(ValueError, match="`quantization` must be one of .* Got 'int8'"):
        bx.save_moe(path, moe, SCORED, quantization="int8")
    with pytest.raises(ValueError, match="`layer_idx` must be at least 0"):
        bx.save_moe(path, moe, -1)
    with pytest.raises(TypeError, match="`moe` must be a `RoutedMoE` or .* Got TopKRouter"):
        bx.save_moe(path, moe.routed.router, SCORED)
    with pytest.raises(TypeError, match="`moe.shared` must be `FeedForward`"):
        bx.save_moe(path, eqx.tree_at(lambda moe: moe.shared, moe, eqx.nn.Identity()), SCORED)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), moe)
    with pytest.raises(ValueError, match="`moe` must be one layer"):
        bx.save_moe(path, stacked, SCORED)
    infinite = eqx.tree_at(
        lambda moe: moe.routed.experts.down, moe, jnp.full((EXPERTS, INTERMEDIATE, HIDDEN), jnp.inf)
    )
    with pytest.raises(ValueError, match="experts.0.w2: `numbers` must be finite"):
        bx.save_moe(path, infinite, SCORED, quantization="fp4")
    packed = load(written(path, Layout(), SCORED), SCORED, "packed")
    with pytest.raises(ValueError, match="quantized already"):
        bx.save_moe(path, packed, SCORED, quantization="fp8")
    narrow = bx.RoutedAndSharedMoE.from_config(
        checkpoints.config(bx, hidden_size=48), SCORED, key=jax.random.key(0)
    )
    with pytest.raises(
        ValueError, match="layers.2.ffn.experts.0.w1: `numbers` .* whole groups of 32. Got 48"
    ):
        bx.save_moe(path, narrow, SCORED, quantization="fp4")
    # Nothing that failed has touched the file.
    assert_same_bits(load(path, SCORED, "packed"), packed)

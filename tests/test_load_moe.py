"""Every released layout becomes a block with the numbers that its bits say."""

import ast
import json
import os
import shutil
import subprocess
import sys

import checkpoints
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, HASH_LAYERS, HIDDEN, LAYOUTS, SLOTS, VOCAB, Layout

import braidax as bx
from braidax._checkpoint.safetensors_writer import write_safetensors

SCORED = HASH_LAYERS  # the first layer without a table


def write(folder, layout, layer_idx, change=None):
    """A checkpoint of one file; `change` edits its tensors first."""
    tensors, numbers = checkpoints.layer_tensors(layout, layer_idx)
    if change is not None:
        change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(checkpoints.config_json()))
    return numbers


def assert_equal_bits(moe, numbers, dtype):
    """Every leaf is the float64 number rounded once; exactly, by its bits."""
    leaves = {
        "weight": moe.routed.router.gate.weight,
        "gate_up": moe.routed.experts.gate_up,
        "down": moe.routed.experts.down,
        "shared_gate_up": moe.shared.gate_up,
        "shared_down": moe.shared.down,
    }
    for name, leaf in leaves.items():
        wanted = numbers[name].astype(np.float32).astype(dtype)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype), name
        bits = f"u{wanted.dtype.itemsize}"
        assert np.array_equal(np.asarray(leaf).view(bits), wanted.view(bits)), name
    router = moe.routed.router
    if isinstance(router, bx.HashRouter):
        assert router.table.dtype == jnp.int32
        assert np.array_equal(router.table, numbers["table"])
    else:
        assert router.score_correction_bias.dtype == jnp.float32
        assert np.array_equal(router.score_correction_bias, numbers["bias"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, layout):
    numbers = write(tmp_path, layout, SCORED)
    assert_equal_bits(bx.load_moe(tmp_path, SCORED), numbers, np.dtype(np.float32))
    moe = bx.load_moe(tmp_path / "model.safetensors", SCORED, dtype=jnp.bfloat16)
    assert_equal_bits(moe, numbers, np.dtype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["V4-Flash and Pro", "transformers, fused, FP8"])
def test_hash_layers(tmp_path, name):
    numbers = write(tmp_path, LAYOUTS[name], 1)
    moe = bx.load_moe(tmp_path, 1)
    assert isinstance(moe.routed.router, bx.HashRouter)
    assert_equal_bits(moe, numbers, np.dtype(np.float32))


def test_the_block_has_the_rules_of_the_configuration(tmp_path):
    write(tmp_path, Layout(), SCORED)
    moe = bx.load_moe(tmp_path, SCORED)
    like = bx.RoutedAndSharedMoE.from_config(checkpoints.config(bx), SCORED, key=jax.random.key(0))
    assert jax.tree.structure(moe) == jax.tree.structure(like)
    hidden_states = jnp.ones((3, HIDDEN))
    output, routing = moe(hidden_states)
    assert output.shape == (3, HIDDEN) and np.isfinite(output).all()
    assert routing.indices.shape == (3, SLOTS)


def test_a_layer_without_a_shared_expert(tmp_path):
    """It is the same layer less the shared expert: loaded, saved and loaded again."""

    def change(tensors):
        for name in [name for name in tensors if ".shared_experts." in name]:
            del tensors[name]

    write(tmp_path, Layout(), SCORED, change)
    config = checkpoints.config(bx, num_shared_experts=0)
    moe = bx.load_moe(tmp_path, SCORED, config=config)
    assert isinstance(moe, bx.RoutedMoE)
    write(tmp_path, Layout(), SCORED)
    assert eqx.tree_equal(moe, bx.load_moe(tmp_path, SCORED).routed)
    bx.save_moe(tmp_path / "model.safetensors", moe, SCORED)
    assert eqx.tree_equal(bx.load_moe(tmp_path, SCORED, config=config), moe)
    assert eqx.tree_equal(bx.from_state_dict(config, SCORED, bx.to_state_dict(moe)), moe)


def test_a_weight_and_its_scale_may_lie_in_different_shards(tmp_path):
    tensors, numbers = checkpoints.layer_tensors(Layout(), SCORED)
    other, _ = checkpoints.layer_tensors(Layout(), 0)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".scale")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in scales}
    shards = {"a.safetensors": weights, "b.safetensors": scales, "c.safetensors": other}
    folder = checkpoints.write_shards(tmp_path / "sharded", shards)
    (folder / "c.safetensors").unlink()  # not part of the layer: never opened
    for path in (folder, folder / "model.safetensors.index.json"):
        assert_equal_bits(bx.load_moe(path, SCORED), numbers, np.dtype(np.float32))


def test_a_folder_without_an_index_is_the_union_of_its_files(tmp_path):
    tensors, numbers = checkpoints.layer_tensors(Layout(), SCORED)
    other, _ = checkpoints.layer_tensors(Layout(), 0)
    write_safetensors(tmp_path / "two.safetensors", tensors)
    write_safetensors(tmp_path / "nought.safetensors", other)
    moe = bx.load_moe(tmp_path, SCORED, config=checkpoints.config(bx))
    assert_equal_bits(moe, numbers, np.dtype(np.float32))
    shutil.copy(tmp_path / "two.safetensors", tmp_path / "copy.safetensors")
    with pytest.raises(ValueError, match="must lie in one file only"):
        bx.load_moe(tmp_path, SCORED, config=checkpoints.config(bx))


def test_bias_beside_a_table_and_image_bias_are_left_out_with_a_warning(tmp_path):
    def add(tensors):
        tensors["layers.1.ffn.gate.bias"] = np.ones(EXPERTS, np.float32)
        tensors["layers.1.ffn.gate.bias_vl"] = np.ones(EXPERTS, np.float32)

    numbers = write(tmp_path, Layout(), 1, add)
    with pytest.warns(UserWarning) as caught:
        moe = bx.load_moe(tmp_path, 1)
    assert {str(warning.message).split("`")[1] for warning in caught} == {
        "layers.1.ffn.gate.bias",
        "layers.1.ffn.gate.bias_vl",
    }
    assert_equal_bits(moe, numbers, np.dtype(np.float32))


CALLS = """
import sys, warnings
import numpy as np
import braidax as bx

warnings.simplefilter("ignore")
tensors = bx.to_state_dict(bx.load_moe(sys.argv[1], 1)) | {"gate.bias": np.ones(4)}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    bx.load_moe(sys.argv[1], 1)
    bx.Checkpoint(sys.argv[1]).moe(1)
    bx.from_state_dict(bx.MoEConfig.from_hf(sys.argv[1]), 1, tensors, dtype="bfloat16")
print([(warning.filename, warning.lineno) for warning in caught])
"""


def test_a_warning_points_at_the_callers_line(tmp_path):
    """In a process of its own: the import hook of the tests puts frames between."""
    layout = LAYOUTS["transformers, upstream names, bfloat16"]._replace(prefix="")
    bias = np.ones(EXPERTS, np.float32)
    write(tmp_path, layout, 1, lambda tensors: tensors.update({"layers.1.ffn.gate.bias": bias}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CALLS, str(tmp_path)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    assert ast.literal_eval(output.decode()) == [("<string>", line) for line in (10, 11, 12)]


PREFIX = f"layers.{SCORED}.ffn."
W1 = f"{PREFIX}experts.0.w1"


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _set(name, value):
    return lambda tensors: tensors.update({name: value})


def _poison(tensors):
    tensors[f"{W1}.scale"].view(np.uint8)[3, 2] = 255


def _rename_bias_to_table(tensors):
    del tensors[f"{PREFIX}gate.bias"]
    tensors[f"{PREFIX}gate.tid2eid"] = np.zeros((VOCAB, SLOTS), np.int64)


MISTAKES = {
    "missing scale": (_drop(f"{W1}.scale"), f"{W1}.weight", "have a scale", "no scale"),
    "missing weight": (_drop(f"{W1}.weight"), f"{W1}.scale", "a weight that is there", "no such"),
    "missing expert": (
        lambda tensors: [tensors.pop(n) for n in list(tensors) if ".experts.3." in n],
        f"{PREFIX}experts.3.w2.weight",
        "be there, .* num_experts=4",
        "14 other",
    ),
    "one expert too many": (
        _set(f"{PREFIX}experts.4.w1.weight", np.zeros((128, 256), np.float32)),
        f"{PREFIX}experts.4.w1.weight",
        "not be there, .* num_experts=4",
        "it",
    ),
    "NaN scale": (_poison, f"{W1}.scale", "bytes up to 254", r"\[3, 2\]"),
    "infinite scale": (
        _set(f"{PREFIX}shared_experts.w1.scale", np.full((1, 2), np.inf, np.float32)),
        f"{PREFIX}shared_experts.w1.scale",
        "be finite",
        r"inf at \[0, 0\]",
    ),
    "scale of another shape": (
        _set(f"{W1}.scale", np.zeros((128, 4), np.uint8)),
        f"{W1}.scale",
        r"\(128, 8\) for 1x32",
        r"\(128, 4\)",
    ),
    "scale of another dtype": (
        _set(f"{W1}.scale", np.zeros((128, 8), np.int32)),
        f"{W1}.scale",
        "F8_E8M0, U8, F32",
        "I32",
    ),
    "weight of another shape": (
        _set(f"{W1}.weight", np.zeros((128, 96), np.int8)),
        f"{W1}.weight",
        r"shape \(128, 256\)",
        r"\(128, 192\)",
    ),
    "weight of another dtype": (
        _set(f"{W1}.weight", np.zeros((128, 256), np.int32)),
        f"{W1}.weight",
        "F8_E4M3",
        "I32",
    ),
    "integers of 8 bits that are not FP4": (
        _set(f"{W1}.weight", np.zeros((128, 256), np.int8)),
        f"{W1}.weight",
        r"shape \(128, 256\)",
        r"\(128, 512\), I8 \[128, 256\]",
    ),
    "FP4 in a scalar": (
        _set(f"{W1}.weight", np.array(1, np.int8)),
        f"{W1}.weight",
        "shape",
        r"\(\)",
    ),
    "no gate": (_drop(f"{PREFIX}gate.weight"), f"{PREFIX}gate.weight", "be there", "dense layer"),
    "no bias": (_drop(f"{PREFIX}gate.bias"), f"{PREFIX}gate.bias", "num_hash_layers=2", "16 other"),
    "bias of another shape": (
        _set(f"{PREFIX}gate.bias", np.zeros(5, np.float32)),
        f"{PREFIX}gate.bias",
        r"shape \(4,\)",
        r"\(5,\)",
    ),
    "NaN in the bias": (
        _set(f"{PREFIX}gate.bias", np.full(4, np.nan, np.float32)),
        f"{PREFIX}gate.bias",
        "be finite",
        "NaN",
    ),
    "gate of another dtype": (
        _set(f"{PREFIX}gate.weight", np.zeros((EXPERTS, HIDDEN), np.int8)),
        f"{PREFIX}gate.weight",
        "BF16",
        "I8",
    ),
    "table the configuration knows nothing of": (
        _rename_bias_to_table,
        f"{PREFIX}gate.bias",
        "num_hash_layers=2",
        "17 other",
    ),
    "another name for the same": (
        _set(f"{PREFIX}gate.e_score_correction_bias", np.zeros(4, np.float32)),
        "gate.",
        "the only one of its kind",
        "both",
    ),
    "experts stacked and one by one": (
        _set(f"{PREFIX}experts.gate_up_proj", np.zeros((4, 256, 256), np.float32)),
        f"{PREFIX}experts.0.w2.weight",
        "not be there, beside stacked experts",
        "it",
    ),
    "two prefixes": (
        _set(f"model.{PREFIX}gate.weight", np.zeros((4, 256), np.float32)),
        f"layers.{SCORED}",
        "have one prefix",
        "and",
    ),
    "unknown tensor": (
        _set(f"{W1}.input_scale", np.zeros(1, np.float32)),
        f"{W1}.input_scale",
        "known meaning",
        "no table",
    ),
    "no shared expert": (
        lambda tensors: [tensors.pop(n) for n in list(tensors) if ".shared_experts." in n],
        f"{PREFIX}shared_experts.w2.weight",
        "num_shared_experts=1",
        "14 other",
    ),
}


@pytest.mark.parametrize("change, name, must, got", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_file_tensor_expected_and_found(tmp_path, change, name, must, got):
    write(tmp_path, Layout(), SCORED, change)
    with pytest.raises(
        ValueError, match=f"model.safetensors: `.*{name}.* must .*{must}.*Got .*{got}"
    ):
        bx.load_moe(tmp_path, SCORED)


@pytest.mark.parametrize("entry, found", [(EXPERTS, "Got 4"), (-1, "Got -1")])
def test_table_out_of_range(tmp_path, entry, found):
    def change(tensors):
        tensors["layers.0.ffn.gate.tid2eid"][5, 1] = entry

    write(tmp_path, Layout(), 0, change)
    with pytest.raises(
        ValueError, match=rf"model.safetensors: `layers.0.ffn.gate.tid2eid`.*{found}"
    ):
        bx.load_moe(tmp_path, 0)


def test_table_of_another_vocabulary(tmp_path):
    write(tmp_path, Layout(), 0)
    with pytest.raises(
        ValueError, match=r"tid2eid` must have the configuration's shape \(65, 2\). Got \(64, 2\)"
    ):
        bx.load_moe(tmp_path, 0, config=checkpoints.config(bx, vocab_size=65))


@pytest.mark.parametrize("layer_idx", [SCORED + 1, 0])
def test_a_layer_that_does_not_exist(tmp_path, layer_idx):
    write(tmp_path, Layout(), SCORED)
    with pytest.raises(ValueError, match=f"`layers.{layer_idx}` must be .*Got the layers 2 to 2"):
        bx.load_moe(tmp_path, layer_idx)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 8}, r"gate.weight` must have .* shape \(8, 256\). Got \(4, 256\)"),
        ({"intermediate_size": 64}, r"experts.0.w1.weight` must .* \(64, 256\). Got \(128, 256\)"),
        ({"num_shared_experts": 2}, r"shared_experts.w1.weight` must .* \(256, 256\). Got \(128"),
        (
            {"num_shared_experts": 0},
            "shared_experts.w2.weight` must not be there, as .* num_shared_experts=0",
        ),
        ({"num_hash_layers": 3}, "gate.bias` must not be there, as .* num_hash_layers=3"),
    ],
)
def test_another_configuration(tmp_path, changes, message):
    write(tmp_path, Layout(), SCORED)
    with pytest.raises(ValueError, match=message):
        bx.load_moe(tmp_path, SCORED, config=checkpoints.config(bx, **changes))


@pytest.mark.parametrize("name", ["V4-Flash and Pro", "transformers, upstream names, float32"])
def test_numbers_that_float16_cannot_hold(tmp_path, name):
    def change(tensors):
        w3 = next(n for n in tensors if n.endswith("experts.1.w3.weight"))
        if name == "V4-Flash and Pro":
            tensors[w3.replace("weight", "scale")].view(np.uint8)[-1] = 150
        else:
            tensors[w3][-1, 0] = 65520.0  # halfway to the number after the largest

    write(tmp_path, LAYOUTS[name], SCORED, change)
    bx.load_moe(tmp_path, SCORED, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="experts.1.w3.weight` must fit float16. Got .* 65504"):
        bx.load_moe(tmp_path, SCORED, dtype=jnp.float16)


@pytest.mark.parametrize("end", ["gate.weight", "experts.1.w3.weight", "shared_experts.w2.weight"])
def test_numbers_that_float32_cannot_hold(tmp_path, end):
    def change(tensors):
        name = next(name for name in tensors if name.endswith(end))
        tensors[name] = np.full(tensors[name].shape, 1e300)

    write(tmp_path, LAYOUTS["transformers, upstream names, float32"], SCORED, change)
    with pytest.raises(ValueError, match=f"{end}` must fit float32"):
        bx.load_moe(tmp_path, SCORED)


def test_a_gate_that_float16_cannot_hold(tmp_path):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("gate.weight"))
        tensors[name] = np.full(tensors[name].shape, 1e6, np.float32)

    write(tmp_path, Layout(), SCORED, change)
    with pytest.raises(ValueError, match="gate.weight` must fit float16. Got 1000000.0"):
        bx.load_moe(tmp_path, SCORED, dtype=jnp.float16)


def test_dtypes_that_weights_cannot_have(tmp_path):
    write(tmp_path, Layout(), SCORED)
    for dtype in ("int32", jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
            bx.load_moe(tmp_path, SCORED, dtype=dtype)
    with pytest.raises(ValueError, match="float64 needs jax_enable_x64"):
        bx.load_moe(tmp_path, SCORED, dtype="float64")


def test_no_file_and_no_configuration(tmp_path):
    for path in (tmp_path, tmp_path / "no.safetensors", tmp_path / "no.safetensors.index.json"):
        with pytest.raises(FileNotFoundError):
            bx.load_moe(path, 0, config=checkpoints.config(bx))
    write(tmp_path, Layout(), SCORED)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config"):
        bx.load_moe(tmp_path, SCORED)


def test_truncated_file_and_absent_shard(tmp_path):
    tensors, _ = checkpoints.layer_tensors(Layout(), SCORED)
    folder = checkpoints.write_shards(tmp_path / "sharded", {"a.safetensors": tensors})
    path = folder / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="a.safetensors: `layers.*` must lie within"):
        bx.load_moe(folder, SCORED)
    path.unlink()
    with pytest.raises(ValueError, match="index.json: `layers.* must lie in the shard a.safetens"):
        bx.load_moe(folder, SCORED)

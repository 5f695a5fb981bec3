"""Families from their files, against what transformers computed: torch is not needed."""

import json
import re

import equinox as eqx
import golden
import jax
import numpy as np
import pytest
from families import as_released, load_moe, read_config

import braidax as bx
from braidax._checkpoint.safetensors_reader import read_header
from braidax._checkpoint.safetensors_writer import write_safetensors
from braidax._families import MODEL_TYPES

FAMILIES = sorted(path.stem for path in (golden.FOLDER / "families").glob("*.npz"))
every_family = pytest.mark.parametrize("model_type", FAMILIES)


@pytest.fixture
def folder(model_type, tmp_path):
    """A checkpoint of the golden layer, as transformers saved it, but in float16."""
    kept = golden.load(f"families/{model_type}")
    (tmp_path / "config.json").write_text(json.dumps(kept.config))
    write_safetensors(tmp_path / "model.safetensors", kept.tensors)
    return tmp_path


def test_the_files_are_here():
    # Of one table, some types differ in their defaults only, and in what transformers has.
    others = {"deepseek_v4", "deepseek_v41", "deepseek_v41_text"}
    assert set(MODEL_TYPES) ^ set(FAMILIES) == others | {"deepseek_v2_lite"}


@every_family
def test_the_output_of_transformers(model_type, folder):
    kept = golden.load(f"families/{model_type}")
    block = load_moe(folder, kept.layer_idx, dtype="float32")
    output, _ = block(kept.hidden_states)
    bound = 1e-5 * np.abs(kept.output).max()
    np.testing.assert_allclose(output, kept.output, rtol=0, atol=bound)


@every_family
def test_saved_and_loaded_again(model_type, folder, tmp_path):
    """Every array bit by bit, from the names of the release and from those of transformers."""
    kept = golden.load(f"families/{model_type}")
    config = read_config(folder)
    block = bx.load_moe(folder, kept.layer_idx, config=config, dtype="float32")
    path = tmp_path / "again" / "layer.safetensors"
    path.parent.mkdir()
    bx.save_moe(path, block, kept.layer_idx, model_type=config.model_type)
    unused = {name for name in kept.tensors if re.search(r"experts\.(8|9|10|11)\.", name)}
    assert read_header(path).keys() == kept.tensors.keys() - unused
    tensors = bx.to_state_dict(block, model_type=config.model_type)
    for again in (
        bx.load_moe(path, kept.layer_idx, config=config),
        bx.from_state_dict(config, kept.layer_idx, tensors),
    ):
        assert eqx.tree_equal(again, block)


@every_family
def test_summary_of_the_layer(model_type, folder):
    """All parameters are known by name, and the active ones counted."""
    kept = golden.load(f"families/{model_type}")
    summary = bx.Checkpoint(folder).summary()
    (layer,) = summary.layers
    assert layer.parameters == sum(tensor.size for tensor in kept.tensors.values())
    assert layer.active is not None and layer.active < layer.parameters


V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 8,
    "moe_intermediate_size": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "moe_intermediate_size": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
}
JAMBA = {"model_type": "jamba", "intermediate_size": 4, "num_hidden_layers": 5}
ERNIE = {
    "model_type": "ernie4_5_moe",
    "hidden_size": 8,
    "moe_intermediate_size": 4,
    "moe_num_experts": 8,
    "moe_k": 2,
    "num_hidden_layers": 8,
}
NEMOTRON = {**V3, "model_type": "nemotron_h"}
LLAMA4 = {
    "model_type": "llama4_text",
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 6,
}
# The rules of released configurations, and the layers of each that are mixtures.
LAYER_RULES = [
    (V3, [3, 4, 5]),
    ({**V3, "first_k_dense_replace": 1}, [1, 2, 3, 4, 5]),
    ({**V3, "mlp_layer_types": ["dense", "sparse"] * 3}, [1, 3, 5]),
    (QWEN, [0, 1, 2, 3, 4, 5]),
    ({**QWEN, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
    ({**QWEN, **JAMBA, "expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3]),
    ({**QWEN, **JAMBA, "expert_layer_period": 3, "expert_layer_offset": 0}, [0, 3]),
    ({**ERNIE, "moe_layer_start_index": 1, "moe_layer_end_index": 4}, [1, 2, 3, 4]),
    ({**ERNIE, "moe_layer_interval": 2, "moe_layer_end_index": -1}, [1, 3, 5, 7]),
    ({**NEMOTRON, "layers_block_type": ["mamba", "moe", "attention", "moe"] + ["mlp"] * 2}, [1, 3]),
    ({**NEMOTRON, "hybrid_override_pattern": "ME*EM-"}, [1, 3]),
    (LLAMA4, [0, 1, 2, 3, 4, 5]),
    ({**LLAMA4, "interleave_moe_layer_step": 2, "moe_layers": None}, [1, 3, 5]),
    ({**LLAMA4, "interleave_moe_layer_step": 2, "moe_layers": [4, 0]}, [0, 4]),
]


@pytest.mark.parametrize("raw, mixtures", LAYER_RULES)
def test_which_layers_are_mixtures(raw, mixtures):
    config = bx.MoEConfig.from_hf(raw)
    layers = range(raw.get("num_hidden_layers", 6))
    assert [number for number in layers if config.is_moe_layer(number)] == mixtures


WRONG = [
    ({**QWEN, "mlp_only_layers": 3}, "`mlp_only_layers` must be a list"),
    ({**QWEN, "decoder_sparse_step": 0}, "`decoder_sparse_step` must be between 1"),
    ({**ERNIE, "num_hidden_layers": None}, "`num_hidden_layers` must be an integer"),
    (NEMOTRON, "`layers_block_type` must be a list"),
    ({**LLAMA4, "moe_layers": 3}, "`moe_layers` must be a list"),
    ({**LLAMA4, "moe_layers": [-1]}, "`moe_layers` must be at least 0"),
    ({**QWEN, "hidden_act": "gelu"}, "`hidden_act` must be one of silu. Got 'gelu'"),
    ({**V3, "moe_layer_freq": 2}, "`moe_layer_freq` must be one of 1. Got 2"),
    ({**V3, "model_type": "deepseek_v2", "norm_topk_prob": True}, "must be one of False. Got True"),
    ({**QWEN, "num_experts_per_tok": [2, 4]}, "must be the same in every layer"),
]


@pytest.mark.parametrize("raw, message", WRONG)
def test_configurations_that_cannot_be(raw, message):
    with pytest.raises(ValueError, match=message):
        bx.MoEConfig.from_hf(raw)


def test_a_dense_layer_says_which_are_mixtures(tmp_path):
    kept = golden.load("families/qwen2_moe")
    (tmp_path / "config.json").write_text(json.dumps(kept.config))
    dense = {"model.layers.0.mlp.up_proj.weight": np.zeros((4, 8), np.float16)}
    write_safetensors(tmp_path / "model.safetensors", {**kept.tensors, **dense})
    with pytest.raises(ValueError, match=r"a dense layer: up_proj.weight; mixtures .* \[1\]"):
        bx.load_moe(tmp_path, 0)


def test_a_layer_that_is_not_ours_is_never_made(tmp_path):
    """Llama-4 multiplies the experts' input by the weight. What would not do so is an error."""
    kept = golden.load("families/llama4_text")
    (tmp_path / "config.json").write_text(json.dumps(kept.config))
    write_safetensors(tmp_path / "model.safetensors", kept.tensors)
    config, key = bx.MoEConfig.from_hf(tmp_path), jax.random.key(0)
    for make in (
        lambda: bx.load_moe(tmp_path, kept.layer_idx),
        lambda: bx.Checkpoint(tmp_path).moe(kept.layer_idx),
        lambda: bx.from_state_dict(config, kept.layer_idx, kept.tensors),
        lambda: bx.RoutedMoE.from_config(config, kept.layer_idx, key=key),
        lambda: bx.RoutedAndSharedMoE.from_config(config, kept.layer_idx, key=key),
    ):
        with pytest.raises(ValueError, match=r"`weighted_input` .* docs/guide/families.md .* Got"):
            make()
    experts = as_released(load_moe(tmp_path, kept.layer_idx)).routed.experts
    # As stored, (experts, size_in, size_out); the columns of gate come first.
    (name,) = (name for name in kept.tensors if name.endswith("experts.gate_up_proj"))
    gate, up = np.split(np.swapaxes(kept.tensors[name], 1, 2), 2, axis=1)
    np.testing.assert_array_equal(experts.gate_up, np.stack([gate, up], axis=1))


def test_the_type_of_the_whole_model_decides():
    """A release that reads images has another prefix than its text model alone."""
    nested = {**LLAMA4, "model_type": "llama4", "text_config": LLAMA4}
    assert bx.MoEConfig.from_hf(nested).model_type == "llama4"
    config = bx.MoEConfig.from_hf({**nested, "model_type": "unknown"})
    assert config.model_type == "llama4_text"
    untyped = {key: value for key, value in LLAMA4.items() if key != "model_type"}
    with pytest.raises(ValueError, match="`model_type` must be one of .* Got 'unknown'"):
        bx.MoEConfig.from_hf({"model_type": "unknown", "text_config": untyped})


def test_any_prefix_that_leads_to_the_layer(tmp_path):
    kept = golden.load("families/mixtral")
    (tmp_path / "config.json").write_text(json.dumps(kept.config))
    renamed = {f"language.{name}": tensor for name, tensor in kept.tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", renamed)
    bx.load_moe(tmp_path, kept.layer_idx)
    write_safetensors(tmp_path / "model.safetensors", {**kept.tensors, **renamed})
    with pytest.raises(ValueError, match="have one prefix. Got language.model.* and model"):
        bx.load_moe(tmp_path, kept.layer_idx)


def test_a_bias_of_selection_that_has_no_name(unchecked):
    """Saving it in a family without such a bias would lose it."""
    block = bx.top_k_moe(8, 4, 4, 2, key=jax.random.key(0))
    where = lambda b: b.router.score_correction_bias  # noqa: E731
    assert bx.to_state_dict(block, model_type="mixtral")
    block = eqx.tree_at(where, block, where(block) + 1)
    with pytest.raises(TypeError, match="score_correction_bias` must be None in a mixtral layer"):
        bx.to_state_dict(block, model_type="mixtral")


GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}


def mxfp4_layer():
    """A layer as the release of GPT-OSS has it, and its stacks decoded by hand, as stored."""
    rng = np.random.default_rng(0)
    codes = {"gate_up": rng.integers(0, 16, (2, 64, 64)), "down": rng.integers(0, 16, (2, 64, 32))}
    scales = {n: rng.integers(125, 130, (*c.shape[:2], c.shape[2] // 32)) for n, c in codes.items()}
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([values, -values])
    each = {name: np.repeat(scale.astype(float), 32, axis=2) for name, scale in scales.items()}
    numbers = {name: values[c] * 2.0 ** (each[name] - 127) for name, c in codes.items()}
    tensors = {
        "router.weight": rng.standard_normal((2, 64)).astype(np.float32),
        "router.bias": np.zeros(2, np.float32),
        "experts.gate_up_proj_bias": np.arange(128, dtype=np.float32).reshape(2, 64),
        "experts.down_proj_bias": np.zeros((2, 64), np.float32),
    }
    for name, c in codes.items():
        packed = (c[..., ::2] | c[..., 1::2] << 4).astype(np.uint8)
        tensors[f"experts.{name}_proj_blocks"] = packed.reshape(*scales[name].shape, 16)
        tensors[f"experts.{name}_proj_scales"] = scales[name].astype(np.uint8)
    return {f"model.layers.0.mlp.{name}": tensor for name, tensor in tensors.items()}, numbers


def test_mxfp4_as_gpt_oss_has_it(tmp_path):
    """Rows of gate and up take turns, and every 32 numbers share a scale."""
    config = bx.MoEConfig.from_hf(GPT_OSS)
    tensors, numbers = mxfp4_layer()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors)
    block = bx.load_moe(path, 0, config=config)
    experts = block.experts
    np.testing.assert_array_equal(experts.gate_up[:, 0], numbers["gate_up"][:, ::2])
    np.testing.assert_array_equal(experts.gate_up[:, 1], numbers["gate_up"][:, 1::2])
    np.testing.assert_array_equal(experts.down, np.swapaxes(numbers["down"], 1, 2))
    np.testing.assert_array_equal(experts.gate_up_bias[1, 1], np.arange(65, 128, 2))
    packed = bx.load_moe(path, 0, config=config, dtype="packed")
    hidden_states = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    bound = 1e-5 * np.abs(block(hidden_states)[0]).max()
    np.testing.assert_allclose(packed(hidden_states)[0], block(hidden_states)[0], 0, bound)
    # Two numbers a byte, and no parameter is a scale: 2 x (64 x 64 + 64 x 32), gate and biases.
    (layer,) = bx.Checkpoint(path).summary().layers
    assert layer.parameters == 12288 + 130 + 128 + 128


def test_mxfp4_is_written_as_gpt_oss_has_it(tmp_path):
    """Packed experts in their own bytes; numbers that FP4 has, without loss, in names and shapes
    of the release."""
    config = bx.MoEConfig.from_hf(GPT_OSS)
    tensors, _ = mxfp4_layer()
    first, again, encoded = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_safetensors(first, tensors)
    packed = bx.load_moe(first, 0, config=config, dtype="packed")
    bx.save_moe(again, packed, 0, model_type="gpt_oss")
    assert read_header(again).keys() == tensors.keys()
    for name, tensor in read_header(again).items():
        np.testing.assert_array_equal(tensor.read(), tensors[name], err_msg=name)
    block = bx.load_moe(first, 0, config=config, dtype="bfloat16")
    bx.save_moe(encoded, block, 0, model_type="gpt_oss", quantization="fp4")
    for name, tensor in read_header(encoded).items():
        assert tensor.shape == tensors[name].shape
        if name.endswith(("_blocks", "_scales")):
            assert tensor.dtype == "U8"
    assert eqx.tree_equal(bx.load_moe(encoded, 0, config=config, dtype="bfloat16"), block)


def test_what_cannot_be_written_in_4_bits(tmp_path):
    path = tmp_path / "layer.safetensors"
    narrow = bx.MoEConfig.from_hf({**GPT_OSS, "hidden_size": 48})
    narrow = bx.RoutedMoE.from_config(narrow, 0, key=jax.random.key(0))
    must = r"`quantization` must be one of \(None, 'fp4'\) for a gpt_oss. Got 'fp8'"
    with pytest.raises(ValueError, match=must):
        bx.save_moe(path, narrow, 0, quantization="fp8", model_type="gpt_oss")
    with pytest.raises(ValueError, match="0.mlp.experts.gate_up_proj: .* groups of 32. Got 48"):
        bx.save_moe(path, narrow, 0, quantization="fp4", model_type="gpt_oss")
    block = bx.top_k_moe(32, 32, 2, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be one of \(None,\) for a granitemoe. Got 'fp4'"):
        bx.save_moe(path, block, 0, quantization="fp4", model_type="granitemoe")
    bx.save_moe(path, block, 0, quantization="fp4")
    config = bx.MoEConfig(32, 32, 2, 1, num_shared_experts=0)
    packed = bx.load_moe(path, 0, config=config, dtype="packed")
    with pytest.raises(ValueError, match="not be packed, to be written as granitemoe. Got exp"):
        bx.save_moe(path, packed, 0, model_type="granitemoe")


def test_a_layer_of_prediction_is_no_layer_of_the_model(tmp_path):
    """As Qwen3-Next has it: `mtp.layers.0` beside `model.layers.0`."""
    kept = golden.load("families/qwen3_next")
    (tmp_path / "config.json").write_text(json.dumps(kept.config))
    predicting = {f"mtp.{name.removeprefix('model.')}": t for name, t in kept.tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", {**kept.tensors, **predicting})
    bx.load_moe(tmp_path, kept.layer_idx)
    summary = bx.Checkpoint(tmp_path).summary()
    assert [layer.name for layer in summary.layers] == ["layers.1", "mtp.1"]
    assert summary.active == summary.layers[0].active


def test_every_parameter_is_in_the_summary_of_the_block(tmp_path):
    for model_type in ("nemotron_h", "qwen2_moe"):
        kept = golden.load(f"families/{model_type}")
        config = bx.MoEConfig.from_hf(kept.config)
        block = bx.RoutedAndSharedMoE.from_config(config, 1, key=jax.random.key(0))
        leaves = jax.tree.leaves(eqx.filter(block, eqx.is_inexact_array))
        assert bx.summary(block).parameters == sum(leaf.size for leaf in leaves)

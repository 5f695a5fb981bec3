"""What `save_moe` writes in 4 bits for GPT-OSS, read by transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import braidax as bx

DTYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model, its mixtures written by us in MXFP4 and all else by transformers."""
    model, source = make_model("gpt_oss_mxfp4")
    folder = tmp_path_factory.mktemp("mxfp4")
    rest = load_file(source / "model.safetensors")
    rest = {name: tensor for name, tensor in rest.items() if ".mlp." not in name}
    save_file(rest, folder / "rest.safetensors", metadata={"format": "pt"})
    for layer_idx in range(len(model.model.layers)):
        bx.save_moe(
            folder / f"layer-{layer_idx}.safetensors",
            bx.load_moe(source, layer_idx),
            layer_idx,
            quantization="fp4",
            model_type="gpt_oss",
        )
    weight_map = {name: path.name for path in folder.iterdir() for name in load_file(path)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    config = json.loads((source / "config.json").read_text())
    config = {**config, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_decodes_the_same_numbers(saved, dtype):
    model, folder = saved
    for layer_idx, layer in enumerate(model.model.layers):
        file = load_file(folder / f"layer-{layer_idx}.safetensors")
        block = bx.load_moe(folder, layer_idx, dtype=DTYPES[dtype])
        ours = bx.to_state_dict(block, model_type="gpt_oss")
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            stem = f"model.layers.{layer_idx}.mlp.{name}"
            stored = file[f"{stem}_blocks"], file[f"{stem}_scales"]
            theirs = convert_moe_packed_tensors(*stored, dtype=dtype).float().numpy()
            np.testing.assert_array_equal(ours[name].astype(np.float32), theirs)
            # Rounded to the nearest: steps are at most a quarter of a group's largest number.
            before = layer.mlp.state_dict()[name].numpy()
            error = np.abs(theirs - before).max()
            assert 0 < error <= np.abs(before).max() / 4


def test_transformers_loads_the_whole_model(saved):
    _, folder = saved
    found, info = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    for layer_idx, layer in enumerate(found.model.layers):
        theirs = layer.mlp.state_dict()
        ours = bx.to_state_dict(bx.load_moe(folder, layer_idx), model_type="gpt_oss")
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)

"""Configurations and tensors as they pass between transformers, torch and braidax."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock
from transformers.models.deepseek_v32 import DeepseekV32Config

import braidax as bx

CLASSES = [DeepseekV2Config, DeepseekV3Config, DeepseekV32Config, DeepseekV4Config]
SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 16}


def make(kind, **changes):
    return kind(**{**SIZES, "num_experts_per_tok": 2, "num_hidden_layers": 4, **changes})


@pytest.mark.parametrize("kind", CLASSES)
def test_an_object_its_file_and_its_dictionary_are_one_configuration(tmp_path, kind):
    theirs = make(kind)
    theirs.save_pretrained(tmp_path)
    ours = bx.MoEConfig.from_hf(theirs)
    assert ours == bx.MoEConfig.from_hf(tmp_path) == bx.MoEConfig.from_hf(theirs.to_dict())
    assert (ours.hidden_size, ours.intermediate_size, ours.num_experts) == (32, 16, 16)


def test_the_default_configurations_are_the_presets():
    assert bx.MoEConfig.from_hf(DeepseekV3Config()) == bx.MoEConfig.deepseek_v3()
    v32 = dataclasses.replace(bx.MoEConfig.deepseek_v3(), model_type="deepseek_v32")
    assert bx.MoEConfig.from_hf(DeepseekV32Config()) == v32


@pytest.mark.parametrize("kind", CLASSES)
def test_a_missing_key_has_the_default_of_transformers(kind):
    """Only the sizes are given to either side."""
    silent = {"model_type": kind.model_type, **SIZES, "num_experts_per_tok": 2}
    silent["vocab_size"] = make(kind).vocab_size
    assert bx.MoEConfig.from_hf(silent) == bx.MoEConfig.from_hf(make(kind))


@pytest.mark.parametrize("kind", [DeepseekV2Config, DeepseekV3Config])
@pytest.mark.parametrize("key", ["norm_topk_prob", "n_group", "topk_group"])
def test_the_nulls_that_transformers_allows_are_read(kind, key):
    assert "None" in str(inspect.signature(kind).parameters[key].annotation)
    config = bx.MoEConfig.from_hf(make(kind, **{key: None}))
    assert (config.normalize, config.num_groups, config.num_selected_groups) == {
        "norm_topk_prob": (False, *((1, 1) if kind is DeepseekV2Config else (8, 4))),
        "n_group": (kind is DeepseekV3Config, 1, 1 if kind is DeepseekV2Config else 4),
        "topk_group": (kind is DeepseekV3Config, 1 if kind is DeepseekV2Config else 8, 1),
    }[key]


def test_bfloat16_to_torch_and_back():
    """By the lines of the guide, `docs/guide/checkpoints.md`."""
    config = make(DeepseekV4Config, num_hash_layers=0)
    moe = bx.RoutedAndSharedMoE.from_config(
        bx.MoEConfig.from_hf(config), 3, dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    tensors = bx.to_state_dict(moe)
    with pytest.raises(TypeError):
        torch.from_numpy(tensors["gate.weight"])
    wide = {
        name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in tensors.items()
    }
    module = DeepseekV4SparseMoeBlock(config, 3).to(torch.bfloat16)
    module.load_state_dict({name: torch.from_numpy(x) for name, x in wide.items()})
    again = bx.from_state_dict(
        bx.MoEConfig.from_hf(config), 3, module.state_dict(), dtype=jnp.bfloat16
    )
    for name, array in bx.to_state_dict(again).items():
        assert array.dtype == tensors[name].dtype and np.array_equal(array, tensors[name]), name


def test_hidden_states_of_torch(unchecked):
    moe = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
    hidden_states = torch.ones(4, 32)
    with pytest.raises(TypeError, match="`hidden_states` must be an array. Got a Tensor: .*dlpack"):
        moe(hidden_states)
    wanted, _ = moe(jnp.ones((4, 32)))
    for convert in (jnp.asarray, jnp.from_dlpack):
        np.testing.assert_array_equal(moe(convert(hidden_states))[0], wanted)

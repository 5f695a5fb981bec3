"""Tiny random models of transformers: one a family, with every part of its mixture of experts."""

import functools
import json
import pathlib
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from braidax._families import MODEL_TYPES

HIDDEN, VOCAB = 32, 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far above the usual 0.02: the logits of an untrained model hardly vary with it.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LOCAL = {"intermediate_size": 8, "num_local_experts": 8, "num_experts_per_tok": 3}
_QWEN = {
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 16,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 12,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_DEEPSEEK = {
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_LLAMA4 = {
    **_LOCAL,
    "intermediate_size_mlp": 24,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "interleave_moe_layer_step": 2,
}
_GROUPS = {"n_group": 4, "topk_group": 2}

# The name of each, and the numbers that differ from the family's own. The name is its `model_type`,
# unless it is of the `class` of another one.
TINY = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
    "qwen3_moe": {**_QWEN, "norm_topk_prob": True, "decoder_sparse_step": 2},
    "qwen3_next": {**_QWEN, **_LINEAR_ATTENTION},
    "qwen3_5_moe_text": {**_QWEN, **_LINEAR_ATTENTION},
    "qwen3_5_moe": {
        "text_config": {**_COMMON, **_QWEN, **_LINEAR_ATTENTION},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": HIDDEN,
        },
    },
    "olmoe": {"intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {**_LOCAL, "head_dim": 16, "swiglu_limit": 1.0},
    "deepseek_v2": {
        **_DEEPSEEK,
        **_LATENT_ATTENTION,
        **_GROUPS,
        "topk_method": "group_limited_greedy",
        "n_shared_experts": 2,
    },
    "deepseek_v2_lite": {
        **_DEEPSEEK,
        **_LATENT_ATTENTION,
        **_GROUPS,  # of which a greedy choice takes no notice
        "class": "deepseek_v2",
        "topk_method": "greedy",
        "n_shared_experts": 2,
    },
    "kimi_k2": {**_DEEPSEEK, **_LATENT_ATTENTION, "class": "deepseek_v3"},
    "deepseek_v3": {**_DEEPSEEK, **_LATENT_ATTENTION, **_GROUPS},
    "deepseek_v32": {**_DEEPSEEK, **_LATENT_ATTENTION, **_GROUPS},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 16},
    "minimax_m2": {**_LOCAL, "head_dim": 16},
    "granitemoe": _LOCAL,
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 12},
    "granitemoehybrid": {
        **_LOCAL,
        "shared_intermediate_size": 12,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
    },
    "hunyuan_v1_moe": {"intermediate_size": 8, "num_experts": 8, "moe_topk": 3, "head_dim": 16},
    "ernie4_5_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "dots1": {**_DEEPSEEK, "head_dim": 16},
    "jamba": {
        "intermediate_size": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "nemotron_h": {
        **_DEEPSEEK,
        "head_dim": 16,
        "moe_shared_expert_intermediate_size": 12,
        "moe_latent_size": 16,
        "layers_block_type": ["attention", "moe"],
    },
    "longcat_flash": {
        **_LATENT_ATTENTION,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 8,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 3,
        "head_dim": 8,
        "num_layers": 2,
    },
    "llama4_text": _LLAMA4,
    "llama4": {
        "text_config": {**_COMMON, **_LLAMA4},
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 1,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "image_size": 16,
            "patch_size": 8,
        },
    },
}


# Of tests of their own: the worked example of the guide, which has no table, and whole groups of 32
# numbers for MXFP4.
OTHERS = {
    "phimoe": {**_LOCAL, "num_experts_per_tok": 2},
    "gpt_oss_mxfp4": {**TINY["gpt_oss"], "class": "gpt_oss", "intermediate_size": 32},
}


@functools.cache
def make_model(model_type):
    """The model in float32, with random biases of selection, and the folder it was saved in."""
    torch.manual_seed(0)
    numbers = dict({**TINY, **OTHERS}[model_type])
    reads_images = "text_config" in numbers
    numbers = numbers if reads_images else {**_COMMON, **numbers}
    config = CONFIG_MAPPING[numbers.pop("class", model_type)](**numbers)
    auto = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for module in mixtures(model).values():
            for name, tensor in module.state_dict().items():
                # Large enough for a clamp, and for experts that differ. The golden files hold
                # these numbers in float16.
                tensor.normal_(std=0.1 if "correction_bias" in name else 0.4)
                tensor.copy_(tensor.half().float())
        for name, tensor in model.state_dict().items():
            if "shared_mlp" in name:  # Granite's stands beside the block
                tensor.copy_(tensor.half().float())
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{model_type}-"))
    model.save_pretrained(folder)
    # Kimi-K2 has the class of DeepSeek-V3, under a name of its own.
    if model_type in MODEL_TYPES:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
    return model, folder


def text_layers(model):
    """The layers that mixtures are in."""
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] == "layers"]
    return model.get_submodule(next(name for name in names if "vision" not in name))


def mixtures(model):
    """The modules with experts, by the number of their layer."""
    return {
        int(next(part for part in name.split(".") if part.isdecimal())): module
        for name, module in model.named_modules()
        if any(child == "experts" for child, _ in module.named_children())
    }

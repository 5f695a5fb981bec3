"""GPT-OSS.

**Source:** `models/gpt_oss` of transformers 5.23; the `model.safetensors.index.json` of the
release, whose experts are MXFP4.
"""

from .family import SIZES, STACKED_EXPERTS, Family

GPT_OSS = Family(
    model_types={
        "gpt_oss": {
            "num_shared_experts": 0,
            # Softmax over the chosen logits is the softmax over all of them, normalized.
            "score_function": "softmax",
            "normalize": True,
            "activation": "gpt_oss",
            "swiglu_limit": 7.0,
            "use_gate_bias": True,
            "use_expert_bias": True,
        }
    },
    keys={
        **SIZES,
        "intermediate_size": ("intermediate_size",),
        "num_experts": ("num_local_experts", "num_experts"),
        "num_experts_per_token": ("num_experts_per_tok", "experts_per_token"),
        "swiglu_limit": ("swiglu_limit",),
    },
    values={"hidden_act": {"silu": {}}, "swiglu_alpha": {1.702: {}}},
    blocks=("mlp",),
    spellings={
        "gate.weight": ("router.weight",),
        "gate.bias": ("router.bias",),
        **STACKED_EXPERTS,
        "experts.gate_up_bias": ("experts.gate_up_proj_bias",),
        "experts.down_bias": ("experts.down_proj_bias",),
    },
    stored_transposed=True,
    interleaved=True,
    quantizations=("fp4",),
)

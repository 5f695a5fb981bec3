"""DeepSeek-V2, V3, V3.2, V4 and V4.1, and Kimi-K2, which is a DeepSeek-V3.

**Source:** `config.json` and `model.safetensors.index.json` of each release;
`conversion_mapping.py` and `models/deepseek_v2`, `_v3`, `_v32` and `_v4` of transformers 5.23.
"""

from .family import Family

_V2 = {
    "num_shared_experts": 2,
    "score_function": "softmax",
    "normalize": False,
    "scaling_factor": 1.0,
}
_V3 = {
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "normalize": True,
    "scaling_factor": 2.5,
    "num_groups": 8,
    "num_selected_groups": 4,
}
_V4_1 = {
    "num_shared_experts": 1,
    "score_function": "sqrtsoftplus",
    "normalize": True,
    "scaling_factor": 1.5,
    "swiglu_limit": 10.0,
}

DEEPSEEK = Family(
    model_types={
        "deepseek_v2": _V2,
        "deepseek_v3": _V3,
        "deepseek_v32": _V3,
        "kimi_k2": _V3,
        "deepseek_v4": _V4_1 | {"num_hash_layers": 3},
        "deepseek_v41": _V4_1,
        "deepseek_v41_text": _V4_1,
    },
    keys={
        "hidden_size": ("hidden_size",),
        "intermediate_size": ("moe_intermediate_size",),
        "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
        "num_experts_per_token": ("num_experts_per_tok",),
        "vocab_size": ("vocab_size",),
        "num_shared_experts": ("n_shared_experts", "num_shared_experts"),
        "score_function": ("scoring_func",),
        "normalize": ("norm_topk_prob",),
        "scaling_factor": ("routed_scaling_factor",),
        "num_groups": ("n_group",),
        "num_selected_groups": ("topk_group",),
        "num_hash_layers": ("num_hash_layers", "mlp_layer_types"),
        "swiglu_limit": ("swiglu_limit",),
        "temperature": ("gate_temp",),
    },
    nulls={
        "vocab_size": None,
        "num_shared_experts": 0,
        "normalize": False,
        "num_groups": 1,
        "num_selected_groups": 1,
        "swiglu_limit": None,
    },
    supported={
        "scoring_func": ("sqrtsoftplus", "sigmoid", "softmax"),
        "hidden_act": ("silu",),
        "topk_method": ("noaux_tc", "greedy"),
    },
    prefixes=("", "model."),
    blocks=("ffn", "mlp"),
    spellings={
        "gate.weight": ("gate.weight",),
        "selection_bias": ("gate.bias", "gate.e_score_correction_bias"),
        "table": ("gate.tid2eid",),
        "experts.{}.gate": ("experts.{}.w1.weight", "experts.{}.gate_proj.weight"),
        "experts.{}.up": ("experts.{}.w3.weight", "experts.{}.up_proj.weight"),
        "experts.{}.down": ("experts.{}.w2.weight", "experts.{}.down_proj.weight"),
        "experts.gate_up": ("experts.gate_up_proj",),
        "experts.down": ("experts.down_proj",),
        "shared.gate": ("shared_experts.w1.weight", "shared_experts.gate_proj.weight"),
        "shared.up": ("shared_experts.w3.weight", "shared_experts.up_proj.weight"),
        "shared.down": ("shared_experts.w2.weight", "shared_experts.down_proj.weight"),
    },
    ignored={"gate.bias_vl": "it is for image tokens"},
    scale_endings=(".scale", ".weight_scale_inv", "_scale_inv"),
)

"""DeepSeek-V2 to V4.1, and the models with the layer of V3: Kimi-K2, GLM-4.5, dots.llm1.

**Source:** `config.json` and `model.safetensors.index.json` of each release;
`conversion_mapping.py` and `models/deepseek_v2`, `_v3`, `_v32`, `_v4`, `glm4_moe` and `dots1` of
transformers 5.23.
"""

import dataclasses

from .family import SIZES, STACKED_EXPERTS, Family
from .layer_rules import first_layers_dense

_V3 = {
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "normalize": True,
    "scaling_factor": 2.5,
    "num_groups": 8,
    "num_selected_groups": 4,
}
_GLM = _V3 | {"scaling_factor": 1.0, "num_groups": 1, "num_selected_groups": 1}
_V2 = {
    "num_shared_experts": 2,
    "score_function": "softmax",
    "normalize": False,
    "scaling_factor": 1.0,
}
_V4_1 = {
    "num_shared_experts": 1,
    "score_function": "sqrtsoftplus",
    "normalize": True,
    "scaling_factor": 1.5,
    "swiglu_limit": 10.0,
}
_WORDS = {"gate": "w1", "up": "w3", "down": "w2"}

DEEPSEEK = Family(
    model_types={
        "deepseek_v4": _V4_1 | {"num_hash_layers": 3},
        "deepseek_v41": _V4_1,
        "deepseek_v41_text": _V4_1,
    },
    keys={
        **SIZES,
        "intermediate_size": ("moe_intermediate_size",),
        "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
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
    values={
        "scoring_func": {None: {}, "sqrtsoftplus": {}, "sigmoid": {}, "softmax": {}},
        "hidden_act": {"silu": {}},
        "topk_method": {"noaux_tc": {}, "greedy": {}},
        "moe_layer_freq": {1: {}},
    },
    dense_layers=first_layers_dense(0),
    prefix="",
    blocks=("ffn", "mlp"),
    spellings={
        "gate.weight": ("gate.weight",),
        "selection_bias": ("gate.bias", "gate.e_score_correction_bias"),
        "table": ("gate.tid2eid",),
        **{
            f"{owner}.{part}": (f"{word}.{short}.weight", f"{word}.{part}_proj.weight")
            for owner, word in (("experts.{}", "experts.{}"), ("shared", "shared_experts"))
            for part, short in _WORDS.items()
        },
        **STACKED_EXPERTS,
    },
    ignored={"gate.bias_vl": "it is for image tokens"},
    quantizations=("fp8", "fp4"),
)

# These are released in the names of transformers' modules.
_AS_MODULES = {key: (names[-1], *names) for key, names in DEEPSEEK.spellings.items()}
DEEPSEEK_V3 = dataclasses.replace(
    DEEPSEEK,
    model_types={"deepseek_v3": _V3, "deepseek_v32": _V3, "kimi_k2": _V3},
    dense_layers=first_layers_dense(3),
    prefix="model.",
    blocks=("mlp", "ffn"),
    spellings=_AS_MODULES,
    scale_endings=(".weight_scale_inv", ".scale", "_scale_inv"),
    quantizations=(),
)
GLM = dataclasses.replace(
    DEEPSEEK_V3, model_types={"glm4_moe": _GLM}, dense_layers=first_layers_dense(1)
)
DOTS = dataclasses.replace(
    DEEPSEEK_V3,
    dense_layers=first_layers_dense(0),
    model_types={"dots1": _GLM | {"num_shared_experts": 0, "normalize": False}},
)

DEEPSEEK_V2 = dataclasses.replace(
    DEEPSEEK_V3,
    dense_layers=first_layers_dense(0),
    model_types={"deepseek_v2": _V2},
    values={
        "scoring_func": {"softmax": {}},
        "hidden_act": {"silu": {}},
        # V2-Lite has groups of which its greedy choice takes no notice.
        "topk_method": {
            "greedy": {"num_groups": 1, "num_selected_groups": 1},
            "group_limited_greedy": {"group_score": "max"},
        },
        # Two released codes disagree about what it would mean.
        "norm_topk_prob": {False: {}, None: {}},
        "moe_layer_freq": {1: {}},
    },
    spellings={
        key: names for key, names in _AS_MODULES.items() if key not in ("selection_bias", "table")
    },
)

"""LongCat-Flash.

**Source:** `models/longcat_flash` of transformers 5.23.
"""

from .family import EXPERTS, SIZES, Family

LONGCAT = Family(
    model_types={
        "longcat_flash": {
            "num_shared_experts": 0,
            "score_function": "softmax",
            "normalize": False,
            "scaling_factor": 6.0,
            "num_identity_experts": 256,
        }
    },
    keys={
        **SIZES,
        "intermediate_size": ("expert_ffn_hidden_size", "moe_intermediate_size"),
        "num_experts": ("n_routed_experts",),
        "num_experts_per_token": ("moe_topk", "num_experts_per_tok"),
        "scaling_factor": ("routed_scaling_factor",),
        "num_identity_experts": ("zero_expert_num",),
    },
    nulls={"num_identity_experts": 0},
    values={
        "hidden_act": {"silu": {}},
        "router_bias": {False: {}},
        "norm_topk_prob": {False: {}},
        "zero_expert_type": {"identity": {}},
    },
    blocks=("mlp",),
    spellings={
        "gate.weight": ("router.classifier.weight",),
        "selection_bias": ("router.e_score_correction_bias",),
        **EXPERTS,
    },
)

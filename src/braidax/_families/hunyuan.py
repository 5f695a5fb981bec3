"""Hunyuan-A13B.

**Source:** `models/hunyuan_v1_moe` of transformers 5.23.
"""

from .family import EXPERTS, SIZES, Family, shared_expert

HUNYUAN = Family(
    model_types={
        "hunyuan_v1_moe": {
            "num_shared_experts": 1,
            "score_function": "softmax",
            "normalize": True,
        }
    },
    keys={
        **SIZES,
        "intermediate_size": ("intermediate_size", "moe_intermediate_size"),
        "num_experts": ("num_experts",),
        "num_experts_per_token": ("moe_topk",),
    },
    blocks=("mlp",),
    spellings={
        "gate.weight": ("gate.wg.weight",),
        **EXPERTS,
        **shared_expert("shared_mlp"),
    },
)

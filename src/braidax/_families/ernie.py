"""ERNIE 4.5.

**Source:** `models/ernie4_5_moe` and `conversion_mapping.py` of transformers 5.23.
"""

from .family import EXPERTS, SIZES, Family, shared_expert
from .layer_rules import interval

ERNIE = Family(
    model_types={
        "ernie4_5_moe": {
            "num_shared_experts": 2,
            "score_function": "softmax",
            "normalize": True,
        }
    },
    keys={
        **SIZES,
        "intermediate_size": ("moe_intermediate_size",),
        "num_experts": ("moe_num_experts",),
        "num_experts_per_token": ("moe_k",),
        "num_shared_experts": ("moe_num_shared_experts",),
    },
    dense_layers=interval,
    blocks=("mlp",),
    spellings={
        "gate.weight": ("gate.weight",),
        "selection_bias": (
            "moe_statics.e_score_correction_bias",
            "gate.moe_statics.e_score_correction_bias",
        ),
        **EXPERTS,
        **shared_expert("shared_experts"),
    },
    selection_bias_rows=True,
)

"""Qwen2-MoE, Qwen3-MoE, Qwen3-Next and Qwen3.5, and OLMoE, which has their names.

**Source:** `models/qwen2_moe`, `qwen3_moe`, `qwen3_next`, `qwen3_5_moe` and `olmoe` of transformers
5.23.
"""

import dataclasses

from .family import EXPERTS, SIZES, Family, shared_expert
from .layer_rules import no_dense_layers, sparse_step

_QWEN3 = {"num_shared_experts": 0, "score_function": "softmax", "normalize": False}
_QWEN2 = _QWEN3 | {
    "num_shared_experts": 1,
    "shared_intermediate_size": 5632,
    "use_shared_gate": True,
}
_NEXT = _QWEN2 | {"shared_intermediate_size": 512, "normalize": True}

QWEN = Family(
    model_types={"qwen2_moe": _QWEN2, "qwen3_moe": _QWEN3, "qwen3_next": _NEXT},
    keys={
        **SIZES,
        "intermediate_size": ("moe_intermediate_size",),
        "num_experts": ("num_experts", "num_local_experts"),
        "normalize": ("norm_topk_prob",),
        "shared_intermediate_size": ("shared_expert_intermediate_size",),
    },
    nulls={"normalize": False},
    dense_layers=sparse_step,
    blocks=("mlp",),
    spellings={
        "gate.weight": ("gate.weight",),
        **EXPERTS,
        **shared_expert("shared_expert"),
        "shared_gate": ("shared_expert_gate.weight",),
    },
)

# Its weights are always normalized, whatever a configuration says.
QWEN3_5_TEXT = dataclasses.replace(
    QWEN,
    model_types={"qwen3_5_moe_text": _NEXT},
    keys={field: keys for field, keys in QWEN.keys.items() if field != "normalize"},
    dense_layers=no_dense_layers,
)

# A release has the text model beside that of images.
QWEN3_5 = dataclasses.replace(
    QWEN3_5_TEXT, model_types={"qwen3_5_moe": _NEXT}, prefix="model.language_model."
)

OLMOE = dataclasses.replace(
    QWEN,
    model_types={"olmoe": _QWEN3},
    keys={**QWEN.keys, "intermediate_size": ("intermediate_size",)},
    dense_layers=no_dense_layers,
)

"""Mixtral, and MiniMax-M2, which has its names.

**Source:** `models/mixtral`, `models/minimax_m2` and `conversion_mapping.py` of transformers 5.23.
"""

import dataclasses

from .family import SIZES, STACKED_EXPERTS, Family

MIXTRAL = Family(
    model_types={
        "mixtral": {"num_shared_experts": 0, "score_function": "softmax", "normalize": True}
    },
    keys={
        **SIZES,
        "intermediate_size": ("intermediate_size",),
        "num_experts": ("num_local_experts",),
    },
    blocks=("block_sparse_moe", "mlp"),
    spellings={
        "gate.weight": ("gate.weight",),
        "experts.{}.gate": ("experts.{}.w1.weight",),
        "experts.{}.up": ("experts.{}.w3.weight",),
        "experts.{}.down": ("experts.{}.w2.weight",),
        **STACKED_EXPERTS,
    },
)

MINIMAX_M2 = dataclasses.replace(
    MIXTRAL,
    model_types={
        "minimax_m2": {"num_shared_experts": 0, "score_function": "sigmoid", "normalize": True}
    },
    # transformers' code reads none of these keys.
    values={
        "hidden_act": {"silu": {}},
        "scoring_func": {"sigmoid": {}},
        "norm_topk_prob": {True: {}},
        "routed_scaling_factor": {1.0: {}},
        "shared_intermediate_size": {0: {}},
    },
    spellings={**MIXTRAL.spellings, "selection_bias": ("e_score_correction_bias",)},
)

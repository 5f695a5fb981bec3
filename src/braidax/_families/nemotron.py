"""Nemotron-H and Nemotron-3.

**Source:** `models/nemotron_h` of transformers 5.23.
"""

from .deepseek import DEEPSEEK
from .family import SIZES, Family
from .layer_rules import named_blocks

NEMOTRON = Family(
    model_types={
        "nemotron_h": {
            "num_shared_experts": 1,
            "shared_intermediate_size": 7688,
            "score_function": "sigmoid",
            "normalize": True,
            "activation": "relu_squared",
        }
    },
    keys={
        **SIZES,
        "intermediate_size": ("moe_intermediate_size",),
        "num_experts": ("n_routed_experts",),
        "normalize": ("norm_topk_prob",),
        "scaling_factor": ("routed_scaling_factor",),
        "num_groups": ("n_group",),
        "num_selected_groups": ("topk_group",),
        "shared_intermediate_size": ("moe_shared_expert_intermediate_size",),
        "latent_size": ("moe_latent_size",),
    },
    nulls={**DEEPSEEK.nulls, "latent_size": None},
    values={
        "mlp_hidden_act": {"relu2": {}},
        "mlp_bias": {False: {}},
    },
    dense_layers=named_blocks,
    prefix="backbone.",
    blocks=("mixer",),
    spellings={
        "gate.weight": ("gate.weight",),
        "selection_bias": ("gate.e_score_correction_bias",),
        "experts.{}.up": ("experts.{}.up_proj.weight",),
        "experts.{}.down": ("experts.{}.down_proj.weight",),
        "experts.gate_up": ("experts.up_proj",),
        "experts.down": ("experts.down_proj",),
        "shared.up": ("shared_experts.up_proj.weight",),
        "shared.down": ("shared_experts.down_proj.weight",),
        "latent.down": ("fc1_latent_proj.weight",),
        "latent.up": ("fc2_latent_proj.weight",),
    },
)

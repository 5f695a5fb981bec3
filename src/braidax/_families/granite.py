"""Granite: its mixtures, and those with a shared expert beside the block.

**Source:** `models/granitemoe`, `granitemoeshared` and `granitemoehybrid` of transformers 5.23.
"""

import dataclasses

from .family import SIZES, Family

# Softmax over the chosen logits is the softmax over all of them, normalized.
_GRANITE = {"num_shared_experts": 0, "score_function": "softmax", "normalize": True}
_SHARED = _GRANITE | {"num_shared_experts": 1}

GRANITE = Family(
    model_types={"granitemoe": _GRANITE},
    keys={
        **SIZES,
        "intermediate_size": ("intermediate_size",),
        "num_experts": ("num_local_experts",),
    },
    blocks=("block_sparse_moe",),
    spellings={
        "gate.weight": ("router.layer.weight", "router.weight"),
        "experts.gate_up": ("input_linear.weight", "experts.gate_up_proj"),
        "experts.down": ("output_linear.weight", "experts.down_proj"),
    },
)

# The names of these begin above the block: the shared expert stands beside it.
GRANITE_SHARED = dataclasses.replace(
    GRANITE,
    model_types={
        "granitemoeshared": _SHARED | {"shared_intermediate_size": 0},
        "granitemoehybrid": _SHARED | {"shared_intermediate_size": 1024},
    },
    keys={**GRANITE.keys, "shared_intermediate_size": ("shared_intermediate_size",)},
    blocks=(),
    spellings={
        **{
            key: tuple(f"block_sparse_moe.{name}" for name in names)
            for key, names in GRANITE.spellings.items()
        },
        "shared.gate_up": ("shared_mlp.input_linear.weight",),
        "shared.down": ("shared_mlp.output_linear.weight",),
    },
)

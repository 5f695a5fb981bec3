"""Jamba.

**Source:** `models/jamba` of transformers 5.23.
"""

from .family import EXPERTS, SIZES, Family
from .layer_rules import period_and_offset

JAMBA = Family(
    model_types={
        "jamba": {"num_shared_experts": 0, "score_function": "softmax", "normalize": False}
    },
    keys={
        **SIZES,
        "intermediate_size": ("intermediate_size",),
        "num_experts": ("num_experts",),
    },
    dense_layers=period_and_offset,
    blocks=("feed_forward",),
    spellings={"gate.weight": ("router.weight",), **EXPERTS},
)

"""Llama-4.

**Source:** `models/llama4` of transformers 5.23.
"""

import dataclasses

from .family import SIZES, STACKED_EXPERTS, Family, shared_expert
from .layer_rules import named_or_every

_LLAMA4 = {
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "normalize": False,
    "weighted_input": True,
}

LLAMA4_TEXT = Family(
    model_types={"llama4_text": _LLAMA4},
    keys={
        **SIZES,
        "intermediate_size": ("intermediate_size",),
        "num_experts": ("num_local_experts",),
    },
    dense_layers=named_or_every,
    blocks=("feed_forward",),
    spellings={
        "gate.weight": ("router.weight",),
        **STACKED_EXPERTS,
        **shared_expert("shared_expert"),
    },
    stored_transposed=True,
)

# A release has the text model beside that of images.
LLAMA4 = dataclasses.replace(
    LLAMA4_TEXT, model_types={"llama4": _LLAMA4}, prefix="language_model.model."
)

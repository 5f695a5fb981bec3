"""DeepSeek-V3, V4 and V4.1.

**Source:** the `model.safetensors.index.json` of each release; `conversion_mapping.py` and
`models/deepseek_v4` of transformers 5.23.
"""

from .family import Family

DEEPSEEK = Family(
    prefixes=("", "model."),
    blocks=("ffn", "mlp"),
    spellings={
        "gate.weight": ("gate.weight",),
        "selection_bias": ("gate.bias", "gate.e_score_correction_bias"),
        "table": ("gate.tid2eid",),
        "experts.{}.gate": ("experts.{}.w1.weight", "experts.{}.gate_proj.weight"),
        "experts.{}.up": ("experts.{}.w3.weight", "experts.{}.up_proj.weight"),
        "experts.{}.down": ("experts.{}.w2.weight", "experts.{}.down_proj.weight"),
        "experts.gate_up": ("experts.gate_up_proj",),
        "experts.down": ("experts.down_proj",),
        "shared.gate": ("shared_experts.w1.weight", "shared_experts.gate_proj.weight"),
        "shared.up": ("shared_experts.w3.weight", "shared_experts.up_proj.weight"),
        "shared.down": ("shared_experts.w2.weight", "shared_experts.down_proj.weight"),
    },
    ignored={"gate.bias_vl": "it is for image tokens"},
    scale_endings=(".scale", ".weight_scale_inv", "_scale_inv"),
)

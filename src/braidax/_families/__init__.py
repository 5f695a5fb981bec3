"""Tables of released models: one file a family."""

from . import (
    deepseek,
    ernie,
    gpt_oss,
    granite,
    hunyuan,
    jamba,
    llama,
    longcat,
    mixtral,
    nemotron,
    qwen,
)
from .family import Family as Family

FAMILIES = (
    deepseek.DEEPSEEK,
    deepseek.DEEPSEEK_V3,
    deepseek.DEEPSEEK_V2,
    deepseek.GLM,
    deepseek.DOTS,
    mixtral.MIXTRAL,
    mixtral.MINIMAX_M2,
    qwen.QWEN,
    qwen.QWEN3_5_TEXT,
    qwen.QWEN3_5,
    qwen.OLMOE,
    gpt_oss.GPT_OSS,
    granite.GRANITE,
    granite.GRANITE_SHARED,
    hunyuan.HUNYUAN,
    ernie.ERNIE,
    jamba.JAMBA,
    nemotron.NEMOTRON,
    longcat.LONGCAT,
    llama.LLAMA4_TEXT,
    llama.LLAMA4,
)
MODEL_TYPES = {name: family for family in FAMILIES for name in family.model_types}


def family_of(model_type: object) -> Family:
    """The family of a `model_type`. **Raises:** `ValueError` that lists the known ones."""
    family = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"`model_type` must be one of {known}. Got {model_type!r:.60}.")
    return family

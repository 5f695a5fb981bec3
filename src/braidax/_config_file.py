"""A released `config.json`: its keys, their spellings and what they say in our own names."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ._checks import one_line

# Our name -> spellings in a Hugging Face config.json. All spellings that are present must agree.
_REQUIRED_KEYS = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_intermediate_size",),
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "num_experts_per_token": ("num_experts_per_tok",),
    "score_function": ("scoring_func",),
}
_OPTIONAL_KEYS = {
    "vocab_size": ("vocab_size",),
    "num_shared_experts": ("n_shared_experts",),
    "normalize": ("norm_topk_prob",),
    "scaling_factor": ("routed_scaling_factor",),
    "num_groups": ("n_group",),
    "num_selected_groups": ("topk_group",),
    "temperature": ("gate_temp",),
}
# Keys that change the maths: only these values are what the library computes.
_SUPPORTED_VALUES = {"hidden_act": ("silu",), "topk_method": ("noaux_tc", "greedy")}


def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[str, Mapping[str, Any]]:
    """Where the configuration came from, for messages, and its content."""
    if isinstance(source, Mapping):
        return "config", source
    path = pathlib.Path(source)
    if os.path.isdir(path):
        path = path / "config.json"
    if not os.path.isfile(path):  # False, where pathlib raises, for a name that is too long
        raise FileNotFoundError(one_line(f"There is no configuration file at {path}."))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {one_line(str(error))}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object. Got {type(content).__name__}.")
    return one_line(str(path)), content


def fields_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `MoEConfig` that the keys of a `config.json` stand for."""
    if isinstance(raw.get("text_config"), Mapping):
        raw = {**raw, **raw["text_config"]}
    for key, supported in _SUPPORTED_VALUES.items():
        if raw.get(key, supported[0]) not in (*supported, None):
            raise ValueError(f"`{key}` must be one of {', '.join(supported)}. Got {raw[key]!r}.")
    fields = {}
    for name, keys in {**_REQUIRED_KEYS, **_OPTIONAL_KEYS}.items():
        value = _one_value(raw, keys)
        if value is not None:
            fields[name] = value
        elif name in _REQUIRED_KEYS:
            raise ValueError(f"the key {' or '.join(f'`{key}`' for key in keys)} is missing.")
    # DeepSeek's code keeps softmax scores, which share one unit among all experts.
    fields.setdefault("normalize", fields["score_function"] != "softmax")
    fields["num_hash_layers"] = _num_hash_layers(raw)
    limit = raw.get("swiglu_limit")
    no_clamp = isinstance(limit, int | float) and limit is not False and limit <= 0
    return {**fields, "swiglu_limit": None if no_clamp else limit}


def _one_value(raw: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    given = {key: raw[key] for key in keys if raw.get(key) is not None}
    value = next(iter(given.values()), None)
    if any(other != value for other in given.values()):
        spelled = ", ".join(f"`{key}` = {other!r}" for key, other in given.items())
        raise ValueError(f"conflicting spellings of one value: {spelled}.")
    return value


def _num_hash_layers(raw: Mapping[str, Any]) -> Any:
    """`num_hash_layers` as released, or counted in transformers' `mlp_layer_types`."""
    released, layer_types = raw.get("num_hash_layers"), raw.get("mlp_layer_types")
    if layer_types is None:
        return 0 if released is None else released
    if not isinstance(layer_types, list | tuple):
        raise ValueError(f"`mlp_layer_types` must be a list. Got {layer_types!r}.")
    count = sum(layer_type == "hash_moe" for layer_type in layer_types)
    if any(layer_type != "hash_moe" for layer_type in layer_types[:count]):
        raise ValueError("`mlp_layer_types` must list every hash_moe layer before all others.")
    return _one_value({**raw, "mlp_layer_types": count}, ("num_hash_layers", "mlp_layer_types"))

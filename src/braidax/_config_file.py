"""A released `config.json`: where it is read from, and what it says in our own names."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ._checks import one_line
from ._families import FAMILIES

_SIZES = ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_token")


def read_config(source: Any) -> tuple[str, Mapping[str, Any]]:
    """Where the configuration came from, for messages, and its content."""
    if hasattr(source, "to_dict"):
        source = source.to_dict()
    if isinstance(source, Mapping):
        return "config", source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "`source` must be a path, a dictionary or a configuration with `to_dict()`. "
            f"Got {one_line(repr(source))}."
        )
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
    raw = _with_counted_hash_layers(raw)
    model_type: Any = raw.get("model_type")
    # Tuples: what is no string may have no hash.
    family = next((each for each in FAMILIES if model_type in tuple(each.model_types)), None)
    if family is None:
        known = ", ".join(name for each in FAMILIES for name in each.model_types)
        raise ValueError(f"`model_type` must be one of {known}. Got {model_type!r:.60}.")
    for key, supported in family.supported.items():
        if raw.get(key, supported[0]) not in supported:
            raise ValueError(f"`{key}` must be one of {', '.join(supported)}. Got {raw[key]!r}.")
    fields = dict(family.model_types[model_type])
    for name, keys in family.keys.items():
        given = {key: raw[key] for key in keys if key in raw}
        values = [value for value in given.values() if value is not None]
        if any(value != values[0] for value in values[1:]):
            spelled = ", ".join(f"`{key}` = {value!r}" for key, value in given.items())
            raise ValueError(f"conflicting spellings of one value: {spelled}.")
        if given and not values and name not in family.nulls:
            raise ValueError(f"`{next(iter(given))}` must not be null.")
        if given:
            fields[name] = values[0] if values else family.nulls[name]
        elif name in _SIZES:
            raise ValueError(f"the key {' or '.join(f'`{key}`' for key in keys)} is missing.")
    limit = fields.get("swiglu_limit")
    if isinstance(limit, int | float) and limit is not False and limit <= 0:
        fields["swiglu_limit"] = None
    return fields


def _with_counted_hash_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the number of `hash_moe` in place of transformers' `mlp_layer_types`.

    To transformers a null here is the same as no key.
    """
    keys = ("num_hash_layers", "mlp_layer_types")
    raw = {key: value for key, value in raw.items() if key not in keys or value is not None}
    layer_types = raw.get("mlp_layer_types")
    if layer_types is None:
        return raw
    if not isinstance(layer_types, list | tuple):
        raise ValueError(f"`mlp_layer_types` must be a list. Got {layer_types!r}.")
    count = sum(layer_type == "hash_moe" for layer_type in layer_types)
    if any(layer_type != "hash_moe" for layer_type in layer_types[:count]):
        raise ValueError("`mlp_layer_types` must list every hash_moe layer before all others.")
    return {**raw, "mlp_layer_types": count}

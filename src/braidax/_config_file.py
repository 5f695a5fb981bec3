"""A released `config.json`: where it is read from, and what it says in our own names."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ._checks import one_line
from ._families import MODEL_TYPES, Family, family_of

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
    if isinstance(text := raw.get("text_config"), Mapping):
        # The type of the whole model says what stands before the names of its tensors.
        known = raw.get("model_type") in [*MODEL_TYPES]
        raw = {**raw, **text, **({"model_type": raw["model_type"]} if known else {})}
    family = family_of(raw.get("model_type"))
    dense_layers = family.dense_layers(raw)
    raw = _with_counted_hash_layers(raw)
    fields = dict(family.model_types[raw["model_type"]])
    for name, keys in family.keys.items():
        given = {key: raw[key] for key in keys if key in raw}
        values = [_for_every_layer(key, value) for key, value in given.items() if value is not None]
        if any(value != values[0] for value in values[1:]):
            spelled = ", ".join(f"`{key}` = {value!r}" for key, value in given.items())
            raise ValueError(f"conflicting spellings of one value: {spelled}.")
        if given and not values and name not in family.nulls:
            raise ValueError(f"`{next(iter(given))}` must not be null.")
        if given:
            fields[name] = values[0] if values else family.nulls[name]
        elif name in _SIZES:
            raise ValueError(f"the key {' or '.join(f'`{key}`' for key in keys)} is missing.")
    fields |= _by_words(raw, family)
    limit = fields.get("swiglu_limit")
    if isinstance(limit, int | float) and limit is not False and limit <= 0:
        fields["swiglu_limit"] = None
    if fields.get("shared_intermediate_size") == 0:  # Granite's word for none
        fields |= {"num_shared_experts": 0, "shared_intermediate_size": None}
    return {**fields, "model_type": raw["model_type"], "dense_layers": dense_layers}


def _for_every_layer(key: str, value: Any) -> Any:
    """A list with one value for all layers, as Hunyuan's, is that value."""
    if not isinstance(value, list | tuple) or not value:
        return value
    if any(other != value[0] for other in value):
        raise ValueError(f"`{key}` must be the same in every layer. Got {value!r:.60}.")
    return value[0]


def _by_words(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields that words stand for."""
    fields: dict[str, Any] = {}
    for key, words in family.values.items():
        word = raw.get(key, next(iter(words)))
        meanings = [meaning for known, meaning in words.items() if known == word]  # or no hash
        if not meanings:
            known = ", ".join(str(word) for word in words if word is not None)
            raise ValueError(f"`{key}` must be one of {known}. Got {word!r:.60}.")
        fields |= meanings[0]
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

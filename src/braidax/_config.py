"""`MoEConfig`: every number that fixes a mixture-of-experts layer, and the released presets."""

import dataclasses
import json
import numbers
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.core import Tracer

from ._checks import integer, one_line, positive_integer, positive_number

_POSITIVE_INTEGERS = (
    *("hidden_size", "intermediate_size", "num_experts", "num_experts_per_token", "vocab_size"),
    *("num_groups", "num_selected_groups"),
)
_POSITIVE_NUMBERS = ("scaling_factor", "swiglu_limit", "shared_swiglu_limit", "temperature")
_MAY_BE_NONE = ("vocab_size", "swiglu_limit", "shared_swiglu_limit")
_set = object.__setattr__  # the dataclass is frozen; only construction writes
KNOWN_SCORE_FUNCTIONS = ("sqrtsoftplus", "sigmoid", "softmax")


class _SameAsSwigluLimit:
    def __repr__(self) -> str:
        return "<same as swiglu_limit>"


# `None` already means "no clamp", so "not given" needs a value of its own.
_SAME_AS_SWIGLU_LIMIT: Any = _SameAsSwigluLimit()


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The numbers of one model's mixture-of-experts layers, validated at construction.

    Sizes are counts of features, experts, tokens or layers. `vocab_size` is needed only by hash
    layers, which are the first `num_hash_layers` layers. `swiglu_limit` clamps the routed experts'
    activations and `shared_swiglu_limit` the shared expert's (by default the same value, fixed at
    construction); `None` is no clamp. `temperature` divides the logits (`gate_temp` in
    DeepSeek-V4.1).

    Raises `TypeError` for a value of the wrong type and `ValueError` for one out of range.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    vocab_size: int | None = None
    num_shared_experts: int = 1
    score_function: str = "sqrtsoftplus"
    normalize: bool = True
    scaling_factor: int | float = 1.0  # beartype does not let `float` include int
    num_groups: int = 1
    num_selected_groups: int = 1
    num_hash_layers: int = 0
    swiglu_limit: int | float | None = None
    shared_swiglu_limit: int | float | None = _SAME_AS_SWIGLU_LIMIT
    temperature: int | float = 1.0

    def __post_init__(self):
        if self.shared_swiglu_limit is _SAME_AS_SWIGLU_LIMIT:
            _set(self, "shared_swiglu_limit", self.swiglu_limit)
        for name, value in vars(self).items():
            _check_size(name, value)
        checks = dict.fromkeys(_POSITIVE_INTEGERS, positive_integer)
        for name, check in {**checks, **dict.fromkeys(_POSITIVE_NUMBERS, positive_number)}.items():
            value = getattr(self, name)
            if not (value is None and name in _MAY_BE_NONE):
                _set(self, name, check(name, value))
        if not isinstance(self.normalize, bool):
            raise TypeError(f"`normalize` must be a bool. Got {self.normalize!r}.")
        for name in ("num_shared_experts", "num_hash_layers"):
            _set(self, name, integer(name, getattr(self, name), 0))
        self._check_combinations()

    def _check_combinations(self):
        known = self.score_function in KNOWN_SCORE_FUNCTIONS
        names = ", ".join(KNOWN_SCORE_FUNCTIONS)
        _require(known, "score_function", f"be one of {names}", repr(self.score_function))
        experts, per_token = self.num_experts, self.num_experts_per_token
        given = f"{per_token} and {experts}"
        _require(per_token <= experts, "num_experts_per_token", "be at most `num_experts`", given)
        has_ids = self.num_hash_layers == 0 or self.vocab_size is not None
        _require(has_ids, "vocab_size", "be given when `num_hash_layers` is above 0", "None")
        groups, selected = self.num_groups, self.num_selected_groups
        given = f"{groups} groups of {experts} experts"
        _require(experts % groups == 0, "num_groups", "divide `num_experts`", given)
        size = experts // groups
        # A group is ranked by the sum of its two best scores.
        _require(groups == 1 or size >= 2, "num_groups", "leave 2 or more experts a group", given)
        given = f"{selected} and {groups}"
        _require(selected <= groups, "num_selected_groups", "be at most `num_groups`", given)
        given = f"{per_token} and {selected} groups of {size}"
        fits = per_token <= selected * size
        _require(fits, "num_experts_per_token", "fit in the selected groups", given)

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "MoEConfig":
        """Read a Hugging Face `config.json`: its path, its folder, or the parsed dictionary.

        A nested `text_config` (DeepSeek-V4.1) wins over the keys around it. A `swiglu_limit` that
        is null or not positive is no clamp, and null groups are one group, as in DeepSeek's code.

        Raises `FileNotFoundError` for a missing file and `ValueError`, naming file and key, for
        anything in it that is missing, contradictory or not supported.
        """
        origin, raw = _read(source)
        try:
            return cls(**_fields_from_hf(raw))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{origin}: {one_line(str(error))}") from error

    # The presets' positional arguments are in the order of the fields above.

    @classmethod
    def deepseek_v3(cls) -> "MoEConfig":
        """DeepSeek-V3: 256 experts in 8 groups, sigmoid scores, no hash layers, no clamp."""
        return cls(7168, 2048, 256, 8, 129280, 1, "sigmoid", True, 2.5, 8, 4)

    @classmethod
    def deepseek_v4_flash(cls) -> "MoEConfig":
        """DeepSeek-V4-Flash: 256 experts, 6 a token, the first 3 layers hashed."""
        return cls(
            4096, 2048, 256, 6, 129280, scaling_factor=1.5, num_hash_layers=3, swiglu_limit=10.0
        )

    @classmethod
    def deepseek_v4_pro(cls) -> "MoEConfig":
        """DeepSeek-V4-Pro: 384 experts, 6 a token, the first 3 layers hashed."""
        return cls(
            7168, 3072, 384, 6, 129280, scaling_factor=2.5, num_hash_layers=3, swiglu_limit=10.0
        )

    @classmethod
    def deepseek_v4_1_flash(cls) -> "MoEConfig":
        """DeepSeek-V4.1-Flash: 384 experts, 6 a token, no hash layers."""
        return cls(5120, 2304, 384, 6, 129280, scaling_factor=1.5, swiglu_limit=10.0)

    @classmethod
    def tiny(cls) -> "MoEConfig":
        """A byte-sized DeepSeek-V4 for tests and examples: 8 experts, 2 a token, 2 hash layers."""
        return cls(32, 16, 8, 2, 256, scaling_factor=1.5, num_hash_layers=2, swiglu_limit=10.0)


def is_hash_layer(config: MoEConfig, layer_idx: int) -> bool:
    """Whether layer `layer_idx` (from 0) routes by token id: one of the first `num_hash_layers`.

    The answer decides which parameters exist, so `layer_idx` must be static, not traced.

    Raises `TypeError` for anything but an integer (traced, a bool) and `ValueError` below 0.
    """
    if isinstance(layer_idx, Tracer):
        raise TypeError(f"`layer_idx` must be static, not traced. Got {layer_idx}.")
    return integer("layer_idx", layer_idx, 0) < config.num_hash_layers


def _check_size(name: str, value: Any):
    power = 127 if name in _POSITIVE_NUMBERS else 31  # float32 and int32 on the device
    huge = isinstance(value, numbers.Real) and value >= 2**power
    _require(not huge, name, f"be finite and below 2**{power}", f"{value!r:.60}")


def _require(condition: bool, name: str, rule: str, given: str):
    if not condition:
        raise ValueError(f"`{name}` must {rule}. Got {given}.")


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


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
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


def _fields_from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
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

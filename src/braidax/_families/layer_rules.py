"""Which layers of a model are dense, as configurations spell it."""

from collections.abc import Callable, Mapping
from typing import Any

from .._checks import integer

# From a configuration to the layers that are no mixtures of experts.
LayerRule = Callable[[Mapping[str, Any]], tuple[int, ...]]


def no_dense_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """All layers are mixtures."""
    del raw
    return ()


def first_layers_dense(default: int) -> LayerRule:
    """`mlp_layer_types` names the dense layers, or they are the `first_k_dense_replace` first, of
    which there are `default`."""

    def dense(raw: Mapping[str, Any]) -> tuple[int, ...]:
        types = raw.get("mlp_layer_types")
        if isinstance(types, list | tuple):
            return tuple(number for number, kind in enumerate(types) if kind == "dense")
        return tuple(range(_integer(raw, "first_k_dense_replace", default)))

    return dense


def sparse_step(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Mixtures at every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    dense = _numbers("mlp_only_layers", raw.get("mlp_only_layers") or [])
    step = _integer(raw, "decoder_sparse_step", 1, 1)
    if step > 1:
        dense |= {number for number in _layers(raw) if (number + 1) % step}
    return tuple(sorted(dense))


def named_or_every(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Mixtures are the layers that `moe_layers` names, or else every
    `interleave_moe_layer_step`-th."""
    named, step = raw.get("moe_layers"), _integer(raw, "interleave_moe_layer_step", 1, 1)
    if named is None and step == 1:
        return ()
    layers = _layers(raw)
    if named is None:
        return tuple(number for number in layers if (number + 1) % step)
    return tuple(sorted(set(layers) - _numbers("moe_layers", named)))


def period_and_offset(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Mixtures where the number of a layer leaves `expert_layer_offset` in its period."""
    period = _integer(raw, "expert_layer_period", 2, 1)
    offset = _integer(raw, "expert_layer_offset", 1)
    return tuple(number for number in _layers(raw) if number % period != offset)


def interval(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Mixtures from `moe_layer_start_index` to `moe_layer_end_index`, at every interval."""
    layers = _layers(raw)
    every = _integer(raw, "moe_layer_interval", 1, 1)
    start = _integer(raw, "moe_layer_start_index", 1)
    end = raw.get("moe_layer_end_index", -1)
    end = len(layers) - 1 if end in (-1, None) else integer("moe_layer_end_index", end, 0)
    return tuple(n for n in layers if (n + 1) % every or not start <= n <= end)


def named_blocks(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """`layers_block_type` names the kind of each layer, or a letter of the pattern does."""
    kinds = raw.get("layers_block_type")
    if kinds is None and isinstance(pattern := raw.get("hybrid_override_pattern"), str):
        kinds = ["moe" if letter == "E" else letter for letter in pattern]
    if not isinstance(kinds, list | tuple):
        raise ValueError(f"`layers_block_type` must be a list. Got {kinds!r:.60}.")
    return tuple(number for number, kind in enumerate(kinds) if kind != "moe")


def _integer(raw: Mapping[str, Any], key: str, default: int, minimum: int = 0) -> int:
    value = raw.get(key)
    return default if value is None else integer(key, value, minimum, 2**20)


def _numbers(key: str, named: Any) -> set[int]:
    if not isinstance(named, list | tuple):
        raise ValueError(f"`{key}` must be a list. Got {named!r:.60}.")
    return {integer(key, number, 0) for number in named}


def _layers(raw: Mapping[str, Any]) -> range:
    return range(integer("num_hidden_layers", raw.get("num_hidden_layers"), 1, 2**20))

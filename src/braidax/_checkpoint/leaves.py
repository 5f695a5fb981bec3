"""The arrays of a block by the library's own names, and the tensors that files make of them.

The names of arrays are `gate.weight`, `gate.bias`, `selection_bias` or `table`, `experts.gate_up`,
`experts.down` and their biases, `latent.down`, `latent.up`, `shared.gate_up`, `shared.down` and
`shared_gate`; those of tensors are in `Family.spellings`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from .._checks import one_line
from .._config import MoEConfig, activation
from .._experts import Experts, FeedForward
from .._families import Family
from .._families.family import STACKED_EXPERTS
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .._router import AbstractRouter, HashRouter, TopKRouter

Block = RoutedMoE | RoutedAndSharedMoE
_ROUTERS: dict[type[AbstractRouter], tuple[str, str]] = {
    HashRouter: ("table", "router.table"),
    TopKRouter: ("selection_bias", "router.score_correction_bias"),
}
_EXPERTS = ("experts.gate_up", "experts.down", "experts.gate_up_bias", "experts.down_bias")
_TITLES = {"swiglu": "SwiGLU"}
MATRICES = ("experts.gate_up", "experts.down", "shared.gate_up", "shared.down")


def leaves(moe: Block, family: Family) -> dict[str, Callable[[Block], Any]]:
    """How to get at each array of `moe` that `family` has a name for. Biases may be None.

    **Raises:** `TypeError` unless `moe` is made of the parts that the family has names for."""
    if not isinstance(moe, Block):
        raise TypeError(
            f"`moe` must be a `RoutedMoE` or `RoutedAndSharedMoE`. Got {type(moe).__name__}."
        )
    routed, root = (moe, "") if isinstance(moe, RoutedMoE) else (moe.routed, "routed.")
    router = routed.router
    _require(type(router) in _ROUTERS, f"{root}router", "a `HashRouter` or `TopKRouter`", router)
    _require_network(f"{root}experts", routed.experts, Experts, family)
    own, path = _ROUTERS[type(router)]
    paths = {"gate.weight": "router.gate.weight", "gate.bias": "router.gate.bias", own: path}
    paths |= {name: name for name in _EXPERTS}
    if routed.latent is not None:
        paths |= {name: name for name in ("latent.down", "latent.up")}
    paths = {name: root + path for name, path in paths.items()}
    if not isinstance(moe, RoutedMoE):
        _require_network("shared", moe.shared, FeedForward, family)
        paths |= {name: name for name in ("shared.gate_up", "shared.down", "shared_gate")}
    for name in [name for name in paths if not (family.has(name) or family.parts(name))]:
        array = attrgetter(paths[name])(moe)
        # A selection bias of zeros selects as none does.
        is_nothing = array is None or (name == own and _is_zero(array))
        _require(is_nothing, paths.pop(name), f"None in a {family.model_type} layer", array)
    return {name: attrgetter(path) for name, path in paths.items()}


def skeleton(config: MoEConfig, layer_idx: int, dtype: DTypeLike | None) -> Block:
    """The layer with shapes in place of arrays: no random number is drawn."""
    # The configuration's own hash table takes seconds, and the given one replaces it.
    small = config if config.vocab_size is None else dataclasses.replace(config, vocab_size=1)
    block = RoutedAndSharedMoE if config.num_shared_experts else RoutedMoE
    build = partial(block.from_config, small, layer_idx, dtype=dtype)
    moe = eqx.filter_eval_shape(build, key=jax.random.key(0))
    router: Any = _routed(moe).router
    own = attrgetter(_ROUTERS[type(router)][1].removeprefix("router."))
    if isinstance(router, HashRouter):
        shape = (config.vocab_size, config.num_experts_per_token)
        array: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    else:  # zeros, which stay in families that have no such bias
        array = jnp.zeros(own(router).shape, own(router).dtype)
    return eqx.tree_at(lambda moe: own(_routed(moe).router), moe, array)


def to_tensors(family: Family, name: str, array: Any) -> dict[str, Any]:
    """The tensors of the array called `name`, as views where they can be."""
    if name == "table":
        return {name: array.astype(np.int64)}
    if name == "selection_bias":
        return {name: array[..., None, :] if family.selection_bias_rows else array}
    if name == "shared.gate_up" and not family.has(name):
        return {part: array[..., i, :, :] for i, part in enumerate(family.parts(name))}
    if name.endswith("gate_up_bias"):
        array = np.swapaxes(array, -1, -2) if family.interleaved else array
        return {name: array.reshape(*array.shape[:-2], -1)}
    if name in MATRICES:
        array = to_rows(family, name, array)
    if family.stored_transposed and name in STACKED_EXPERTS:
        array = np.swapaxes(array, -1, -2)
    return {name: array}


def to_rows(family: Family, name: str, array: Any) -> Any:
    """The matrices of the array called `name`, each (size_out, size_in) with its rows as stored:
    those of gate and up behind each other, or in turns."""
    if not name.endswith("gate_up"):
        return np.swapaxes(array, -1, -2)
    if family.interleaved and name in STACKED_EXPERTS:
        array = np.swapaxes(array, -2, -3)
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])


def from_rows(family: Family, name: str, array: Any, shape: tuple[int, ...]) -> Any:
    """The array of `shape` whose gate and up rows lie behind each other, or take turns."""
    if not (family.interleaved and name.startswith("experts.gate_up")):
        return array.reshape(shape)
    experts, parts, size, *rest = shape
    return np.swapaxes(array.reshape(experts, size, parts, *rest), 1, 2)


def _routed(moe: Block) -> RoutedMoE:
    return moe.routed if isinstance(moe, RoutedAndSharedMoE) else moe


def _is_zero(array: Any) -> bool:
    return not isinstance(array, jax.Array | np.ndarray) or not np.asarray(array).any()


def _require_network(name: str, network: Any, kind: type, family: Family) -> None:
    word = family.model_types[family.model_type].get("activation", "swiglu")
    wanted = type(activation(word, 1.0))
    has_names = type(network) is kind and isinstance(network.activation, wanted)
    _require(has_names, name, f"`{kind.__name__}` of {_TITLES.get(word, word)}", network)


def _require(condition: bool, name: str, must_be: str, found: object) -> None:
    if not condition:
        raise TypeError(
            f"`moe.{name}` must be {must_be}: only these have released names. "
            f"Got {one_line(repr(found))}."
        )

"""The arrays of a block by the library's own names, and the tensors that files make of them.

The names of arrays are `gate.weight`, `selection_bias` or `table`, `experts.gate_up`,
`experts.down`, `shared.gate_up` and `shared.down`; those of tensors are in `Family.spellings`.
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
from .._config import MoEConfig
from .._experts import Experts, FeedForward
from .._experts.activations import swiglu
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .._router import AbstractRouter, HashRouter, TopKRouter

Block = RoutedMoE | RoutedAndSharedMoE
# The matrices of one network that an array is made of, one after the other.
MATRICES = {"gate_up": ("gate", "up"), "down": ("down",)}
_ROUTERS: dict[type[AbstractRouter], tuple[str, str]] = {
    HashRouter: ("table", "router.table"),
    TopKRouter: ("selection_bias", "router.score_correction_bias"),
}


def leaves(moe: Block) -> dict[str, Callable[[Block], Any]]:
    """How to get at each array of `moe`.

    **Raises:** `TypeError` unless `moe` is made of the parts that released names exist for."""
    if not isinstance(moe, Block):
        raise TypeError(
            f"`moe` must be a `RoutedMoE` or `RoutedAndSharedMoE`. Got {type(moe).__name__}."
        )
    routed, root = (moe, "") if isinstance(moe, RoutedMoE) else (moe.routed, "routed.")
    router = routed.router
    _require(type(router) in _ROUTERS, f"{root}router", "a `HashRouter` or `TopKRouter`", router)
    _require(router.gate.bias is None, f"{root}router.gate", "without a bias", router.gate)
    _require_swiglu(f"{root}experts", routed.experts, Experts)
    own, path = _ROUTERS[type(router)]
    paths = {"gate.weight": "router.gate.weight", own: path}
    paths |= {name: name for name in ("experts.gate_up", "experts.down")}
    paths = {name: root + path for name, path in paths.items()}
    if not isinstance(moe, RoutedMoE):
        _require_swiglu("shared", moe.shared, FeedForward)
        paths |= {name: name for name in ("shared.gate_up", "shared.down")}
    return {name: attrgetter(path) for name, path in paths.items()}


def skeleton(config: MoEConfig, layer_idx: int, dtype: DTypeLike | None) -> Block:
    """The layer with shapes in place of arrays: no random number is drawn."""
    # The configuration's own hash table takes seconds, and the given one replaces it.
    small = config if config.vocab_size is None else dataclasses.replace(config, vocab_size=1)
    block = RoutedAndSharedMoE if config.num_shared_experts else RoutedMoE
    build = partial(block.from_config, small, layer_idx, dtype=dtype)
    moe = eqx.filter_eval_shape(build, key=jax.random.key(0))
    if not config.is_hash_layer(layer_idx):
        return moe
    shape = (config.vocab_size, config.num_experts_per_token)
    return eqx.tree_at(leaves(moe)["table"], moe, jax.ShapeDtypeStruct(shape, jnp.int32))


def to_tensors(name: str, array: Any) -> dict[str, Any]:
    """The tensors of the array called `name`, as views: stacked experts, one shared expert."""
    if name == "shared.gate_up":
        return {"shared.gate": array[..., 0, :, :], "shared.up": array[..., 1, :, :]}
    if name == "experts.gate_up":
        return {name: array.reshape(*array.shape[:-3], -1, array.shape[-1])}
    if name == "table":
        return {name: array.astype(np.int64)}
    return {name: np.swapaxes(array, -1, -2) if name.endswith("down") else array}


def _require_swiglu(name: str, network: Any, kind: type) -> None:
    has_names = type(network) is kind and isinstance(network.activation, type(swiglu()))
    has_names = has_names and network.gate_up_bias is None and network.down_bias is None
    _require(has_names, name, f"`{kind.__name__}` of SwiGLU without biases", network)


def _require(condition: bool, name: str, must_be: str, found: object) -> None:
    if not condition:
        raise TypeError(
            f"`moe.{name}` must be {must_be}: only these have released names. "
            f"Got {one_line(repr(found))}."
        )

"""A layer as named numpy arrays: the names, shapes and dtypes of transformers' saved modules."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from .. import hash_tables
from .._checks import floating_dtype
from .._config import MoEConfig
from .._experts import AbstractExperts, Experts, FeedForward
from .._moe import RoutedAndSharedMoE
from .._router import HashRouter, TopKRouter
from .dtypes import narrowed


class _Leaf(NamedTuple):
    """An array of the block and the released tensors that it is made of.

    `to_tensors` returns one array for each name, `from_tensors` takes them in that order.
    """

    where: Callable[[RoutedAndSharedMoE], Any]
    names: tuple[str, ...]
    to_tensors: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    from_tensors: Callable[..., np.ndarray]


def _one(array: np.ndarray) -> tuple[np.ndarray, ...]:
    return (array,)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


_DOWN = (lambda array: (_transposed(array),), _transposed)
_GATE_AND_UP = (
    lambda array: (array[..., 0, :, :], array[..., 1, :, :]),
    lambda gate, up: np.stack((gate, up), axis=-3),
)
_GATE = _Leaf(attrgetter("routed.router.gate.weight"), ("gate.weight",), _one, _same)
_BIAS = _Leaf(
    attrgetter("routed.router.score_correction_bias"),
    ("gate.e_score_correction_bias",),
    _one,
    _same,
)
_TABLE = _Leaf(
    attrgetter("routed.router.table"),
    ("gate.tid2eid",),
    lambda array: (array.astype(np.int64),),
    _same,
)
_FEED_FORWARD = (
    _Leaf(
        attrgetter("routed.experts.gate_up"),
        ("experts.gate_up_proj",),
        lambda a: (a.reshape(*a.shape[:-3], -1, a.shape[-1]),),
        lambda a: a.reshape(len(a), 2, -1, a.shape[-1]),
    ),
    _Leaf(attrgetter("routed.experts.down"), ("experts.down_proj",), *_DOWN),
    _Leaf(
        attrgetter("shared.gate_up"),
        ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"),
        *_GATE_AND_UP,
    ),
    _Leaf(attrgetter("shared.down"), ("shared_experts.down_proj.weight",), *_DOWN),
)
_LEAVES: dict[type, tuple[_Leaf, ...]] = {
    HashRouter: (_GATE, _TABLE, *_FEED_FORWARD),
    TopKRouter: (_GATE, _BIAS, *_FEED_FORWARD),
}


def to_state_dict(moe: RoutedAndSharedMoE) -> dict[str, np.ndarray]:
    """The arrays of a layer `moe` by transformers' names, without a prefix.

    `gate.weight` (experts, hidden), `gate.e_score_correction_bias` (experts,) or `gate.tid2eid`
    int64 (vocab, experts_per_token), `experts.gate_up_proj` (experts, 2 intermediate, hidden)
    with the gate rows first, `experts.down_proj` (experts, hidden, intermediate),
    `shared_experts.{gate,up,down}_proj.weight`. Floating-point arrays keep their dtype. Leading
    axes, of stacked layers, are kept. A gradient of the layer is such a tree too: leaves that are
    `None` are left out.

    **Raises:** `TypeError` unless `moe` is a `RoutedAndSharedMoE` of this library's routers and
    experts.

    **Source:** `DeepseekV4SparseMoeBlock` of transformers 5.23, `models/deepseek_v4`.

    **Example:**

        >>> import braidax as bx, jax
        >>> layer = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> bx.to_state_dict(layer)["experts.down_proj"].shape
        (8, 32, 16)
    """
    tensors = {}
    for leaf in _leaves(moe):
        array = leaf.where(moe)
        if array is not None:
            if not isinstance(array, jax.Array | np.ndarray):
                raise TypeError(
                    f"`moe` must hold arrays, or None where there is nothing. "
                    f"Got {type(array).__name__} for {' and '.join(leaf.names)}."
                )
            # Copies: a view of a JAX array is read-only.
            parts = (np.array(part, order="C") for part in leaf.to_tensors(np.asarray(array)))
            tensors.update(zip(leaf.names, parts, strict=True))
    return tensors


def from_state_dict(
    config: MoEConfig,
    layer_idx: int,
    tensors: Mapping[str, Any],
    *,
    dtype: DTypeLike = jnp.float32,
) -> RoutedAndSharedMoE:
    """The layer whose arrays are `tensors`: the inverse of `to_state_dict`, for one layer.

    - `config`: the sizes and rules of the model.
    - `layer_idx`: from 0; says whether the layer is hashed.
    - `tensors`: arrays by the names of `to_state_dict`, no more and no fewer. They are copied.
    - `dtype`: of the weights, 16 bits or more; the bias is float32, the table int32 always.

    **Raises:** `ValueError` naming the tensor, for names that are missing or unknown, wrong shapes,
    expert ids out of range, numbers too large for `dtype` or a bias that is not finite;
    `TypeError` for a dtype that cannot hold weights, quantised ones among them.

    **Source:** as for `to_state_dict`.

    **Example:**

        >>> import braidax as bx, jax
        >>> layer = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> layer = bx.from_state_dict(bx.MoEConfig.tiny(), 2, bx.to_state_dict(layer))
    """
    dtype = floating_dtype("dtype", dtype)
    layer = layer_skeleton(config, layer_idx, dtype)
    leaves = _leaves(layer)
    _check_names(tensors, [name for leaf in leaves for name in leaf.names])
    for leaf in leaves:
        layer = eqx.tree_at(leaf.where, layer, _array(leaf, tensors, leaf.where(layer), config))
    return layer


def check_parts(moe: RoutedAndSharedMoE, *experts: type[AbstractExperts]) -> None:
    """`moe` is made of this library's routers and shared expert, and of one of `experts`: only
    these have released names. **Raises:** `TypeError` naming the part."""
    if not isinstance(moe, RoutedAndSharedMoE):
        raise TypeError(f"`moe` must be a `RoutedAndSharedMoE`. Got {type(moe).__name__}.")
    parts = {
        "moe.routed.router": (moe.routed.router, tuple(_LEAVES)),
        "moe.routed.experts": (moe.routed.experts, experts),
        "moe.shared": (moe.shared, (FeedForward,)),
    }
    for name, (module, known) in parts.items():
        if type(module) not in known:
            names = " or ".join(f"`{cls.__name__}`" for cls in known)
            raise TypeError(
                f"`{name}` must be a {names}: only these have released names. "
                f"Got {type(module).__name__}."
            )


def _leaves(moe: RoutedAndSharedMoE) -> tuple[_Leaf, ...]:
    check_parts(moe, Experts)
    return _LEAVES[type(moe.routed.router)]


def layer_skeleton(config: MoEConfig, layer_idx: int, dtype: DTypeLike) -> RoutedAndSharedMoE:
    """The layer with shapes in place of arrays: no random number is drawn."""
    # Not the configuration's own hash table, which takes seconds: the given one replaces it.
    small = config if config.vocab_size is None else dataclasses.replace(config, vocab_size=1)
    build = partial(RoutedAndSharedMoE.from_config, small, layer_idx, dtype=dtype)
    skeleton = eqx.filter_eval_shape(build, key=jax.random.key(0))
    if not config.is_hash_layer(layer_idx):
        return skeleton
    shape = (config.vocab_size, config.num_experts_per_token)
    return eqx.tree_at(_TABLE.where, skeleton, jax.ShapeDtypeStruct(shape, jnp.int32))


def _check_names(given: Mapping[str, Any], wanted: list[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"`tensors` must be a mapping of names. Got {type(given).__name__}.")
    missing, unknown = set(wanted) - set(given), set(given) - set(wanted)
    if missing or unknown:
        raise ValueError(
            f"`tensors` must hold exactly {', '.join(wanted)}. "
            f"Missing: {_listed(missing)}. Unknown: {_listed(unknown)}."
        )


def _listed(names: set[Any]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"


def _array(
    leaf: _Leaf, tensors: Mapping[str, Any], wanted: jax.ShapeDtypeStruct, config: MoEConfig
) -> Array:
    """The leaf made of its tensors, each checked, in the dtype of the layer."""
    empty = np.broadcast_to(np.zeros((), wanted.dtype), wanted.shape)
    parts = [_as_numpy(name, tensors[name]) for name in leaf.names]
    for name, part, like in zip(leaf.names, parts, leaf.to_tensors(empty), strict=True):
        if part.shape != like.shape:
            raise ValueError(f"`{name}` must have shape {like.shape}. Got {part.shape}.")
    if leaf is _TABLE:
        return jnp.array(_checked_table(parts[0], config.num_experts))
    floats = [
        _checked_floats(name, part, wanted.dtype)
        for name, part in zip(leaf.names, parts, strict=True)
    ]
    if leaf is _BIAS and not np.isfinite(floats[0]).all():
        raise ValueError(f"`{leaf.names[0]}` must be finite. Got NaN or infinity.")
    # A copy: `jnp.asarray` may share the memory of a numpy array, which its owner may change.
    return jnp.array(leaf.from_tensors(*floats), copy=True)


def _as_numpy(name: str, tensor: Any) -> np.ndarray:
    try:
        return np.asarray(tensor)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be an array that numpy can read: {error}") from error


def _checked_floats(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # Numbers of one byte mean nothing without their scales.
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise TypeError(f"`{name}` must hold 16 to 64-bit floating point. Got {array.dtype}.")
    if array.dtype == dtype:
        return array
    result = narrowed(array, dtype)
    if result is None:
        raise ValueError(f"`{name}` must fit {dtype}. Got {np.abs(array).max():.3g}.")
    return result


def _checked_table(table: np.ndarray, num_experts: int) -> np.ndarray:
    try:
        return hash_tables.from_array(table, num_experts)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{_TABLE.names[0]}`: {error}") from error

"""The rule that moves a selection bias by the sign of the load, and what all such rules check."""

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Integer, Real

from ._balance import checked_load, expert_load
from ._checks import array_kind
from ._routing import Routing


def check_bias_dtype(name: str, bias: Array) -> None:
    """The selection bias is float32 or wider."""
    array_kind(name, bias, jnp.floating)
    # Released biases are near 5, where neighbors in bfloat16 are further apart than most scores.
    if jnp.result_type(bias).itemsize < 4:
        raise TypeError(
            f"`{name}` must be float32 or wider, because a rounded bias chooses other experts. "
            f"Got {bias.dtype}: cast the model by `braidax.cast`, which leaves routers alone."
        )


def check_layers(name: str, stacked: tuple[int, ...], num_experts: int, bias: Array) -> None:
    """What is `stacked`, with a last axis of experts, is of the layers and experts of `bias`.

    Without layers every axis counts micro-batches or examples. Beside layers such an axis could be
    taken for one of layers.
    """
    check_bias_dtype("bias", bias)
    *layers, wanted = bias.shape
    if num_experts != wanted:
        raise ValueError(f"`{name}` must be of {wanted} experts. Got {num_experts} experts.")
    if layers and list(stacked) != layers:
        raise ValueError(
            f"`{name}` must be stacked over the layers {tuple(layers)} of `bias` and over nothing "
            f"else. Got {tuple(stacked)}. Of micro-batches, give the sum over the axis that is not "
            "of layers, such as `braidax.expert_load(routing).sum(axis)`."
        )


def _check_rate(rate: Any) -> None:
    if not hasattr(rate, "dtype") and not isinstance(rate, numbers.Real):
        raise TypeError(f"`rate` must be a number. Got {rate!r:.60}.")
    if jnp.ndim(rate) != 0:
        raise ValueError(f"`rate` must be a scalar. Got shape {jnp.shape(rate)}.")
    if not isinstance(rate, Tracer) and not np.isfinite(rate):
        raise ValueError(f"`rate` must be finite. Got {rate}.")


def updated_bias(
    bias: Float[Array, "*layers experts"],
    load: Routing | Integer[ArrayLike, "..."],
    rate: Real[ArrayLike, ""],
    *,
    center: bool = False,
) -> Float[Array, "*layers experts"]:
    """`bias + rate * sign(mean(load) - load)`, float32 `(*layers, experts)`.

    **Arguments:**

    - `bias`: `(*layers, experts)`, float32 or wider.
    - `load`: the count of the whole step, integers `(*layers, experts)`, or a Routing to count.
        Sum over devices and micro-batches first. For a bias of one layer, axes in front are summed.
        The sign is decided in integers, exactly. A load of zero everywhere changes nothing.
    - `rate`: a scalar in units of the scores.
    - `center`: subtract the mean of the update, which stops the common drift and leaves selection
        alone.

    **Raises:** `TypeError` for a `load` that is neither a Routing nor integers, and for a `bias`
    narrower than float32. `ValueError` for shapes that differ, and for a `rate` that is not a
    finite scalar, unless it is traced.

    **Source:** arXiv:2408.15664, algorithm 1.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> bx.updated_bias(jnp.zeros(4), jnp.array([4, 2, 1, 1]), 0.5).tolist()
        [-0.5, 0.0, 0.5, 0.5]
    """
    load = checked_load(expert_load(load) if isinstance(load, Routing) else load)
    array_kind("load", load, jnp.integer)
    check_layers("load", load.shape[:-1], load.shape[-1], bias)
    _check_rate(rate)
    num_experts = load.shape[-1]
    if load.dtype.itemsize < 4:
        load = load.astype(jnp.int32)
    if bias.ndim == 1:
        load = load.reshape(-1, num_experts).sum(axis=0, dtype=load.dtype)
    # quotient and remainder of sum(load) / experts, without forming a sum that could overflow.
    parts = jnp.sum(load % num_experts, axis=-1, keepdims=True, dtype=load.dtype)
    quotient = jnp.sum(load // num_experts, axis=-1, keepdims=True, dtype=load.dtype)
    quotient, remainder = quotient + parts // num_experts, parts % num_experts
    below = (load < quotient) | ((load == quotient) & (remainder > 0))
    balanced = (load == quotient) & (remainder == 0)
    sign = jnp.where(below, 1.0, jnp.where(balanced, 0.0, -1.0)).astype(jnp.float32)
    if center:
        sign = sign - jnp.mean(sign, axis=-1, keepdims=True)
    return bias.astype(jnp.float32) + jnp.asarray(rate, jnp.float32) * sign

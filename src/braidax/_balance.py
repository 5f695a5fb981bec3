"""Expert load and the bias update: pure functions of a `Routing`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.export import is_symbolic_dim
from jaxtyping import Array, ArrayLike, Float, Int32, Integer, Real

from ._checks import array_kind
from ._routing import Routing, of_each_call, without_masked

Load = Real[Array, "*layers experts"]
_COUNTS = (jnp.integer, jnp.floating)  # floats: means of loads over steps


def count_sorted(indices: Int32[Array, " rows"], num_experts: int) -> Int32[Array, " experts"]:
    """Number of entries of ascending `indices` equal to each expert."""
    if is_symbolic_dim(indices.size):  # `searchsorted` needs to know how many steps it takes
        equal = indices[:, None] == jnp.arange(num_experts, dtype=indices.dtype)[None]
        return jnp.sum(equal, axis=0, dtype=jnp.int32)
    edges = jnp.searchsorted(indices, jnp.arange(num_experts + 1, dtype=indices.dtype))
    return jnp.diff(edges).astype(jnp.int32)


@of_each_call
def expert_load(routing: Routing) -> Int32[Array, "*stacked experts"]:
    """Assignments that each expert receives, `(*stacked, experts)` int32.

    The load of one call of a router is `(experts,)`: all batch axes of `routing` are summed.
    Routings stacked by `jax.vmap` or `jax.lax.scan` give a load for each call. Sum the axis that
    counts micro-batches or examples, and keep the axis that counts layers. Padding and nobody are
    not counted. A token that names an expert twice counts twice.

    **Raises:** `TypeError` unless `routing` is a Routing.

    **Example:**

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> load = bx.expert_load(router(jax.random.normal(jax.random.key(1), (4, 32))))
        >>> load.shape, int(load.sum())
        ((8,), 8)
    """
    num_experts = routing.scores.shape[-1]
    indices = without_masked(routing.indices, routing.mask, num_experts)
    # Sorted, because a scatter is slow on accelerators and a one-hot as large as the scores.
    return count_sorted(jnp.sort(indices.reshape(-1)), num_experts)


def max_violation(load: Load) -> Float[Array, "*layers"]:
    """MaxVio: `max(load) / mean(load) - 1`, a ratio, float32 `(*layers,)`.

    `load` counts assignments, `(*layers, experts)`. 0 at perfect balance and where nothing is
    loaded, `experts / experts_per_token - 1` at collapse.

    **Raises:** `TypeError` or `ValueError` for a `load` that is no array of counts, a `Routing`
    included.

    **Source:** arXiv:2408.15664, eq. 4.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> float(bx.max_violation(jnp.array([4, 2, 1, 1])))
        1.0
    """
    load = _checked(load).astype(jnp.float32)
    mean = jnp.mean(load, axis=-1)
    ratio = jnp.max(load, axis=-1) / jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, jnp.maximum(ratio - 1, 0), 0)


def load_entropy(load: Load) -> Float[Array, "*layers"]:
    """Entropy of the load's shares divided by `log(experts)`, float32 `(*layers,)`.

    `load` counts assignments, `(*layers, experts)`. 1 at perfect balance and, by convention, for a
    single expert; 0 when one of several takes everything, and for a load of zero everywhere.

    **Raises:** as `max_violation` does.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> round(float(bx.load_entropy(jnp.array([4, 4, 0, 0]))), 4)
        0.5
    """
    load = _checked(load).astype(jnp.float32)
    total = jnp.sum(load, axis=-1)
    if load.shape[-1] == 1:
        return jnp.where(total > 0, 1.0, 0.0).astype(jnp.float32)
    shares = load / jnp.where(total > 0, total, 1)[..., None]
    return jnp.sum(jax.scipy.special.entr(shares), axis=-1) / math.log(load.shape[-1])


def dead_experts(load: Load) -> Int32[Array, "*layers"]:
    """Number of experts without `load`, `(*layers, experts)`: int32 `(*layers,)`.

    **Raises:** as `max_violation` does.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> int(bx.dead_experts(jnp.array([4, 4, 0, 0])))
        2
    """
    return jnp.sum(_checked(load) == 0, axis=-1, dtype=jnp.int32)


def _checked(load: Load) -> Load:
    """`load`, if it is an array of counts."""
    dtype = getattr(load, "dtype", None)
    if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in _COUNTS):
        found = f"a {type(load).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(
            f"`load` must be an array of counts, as `braidax.expert_load` returns. Got {found}."
        )
    if load.ndim == 0:
        raise ValueError("`load` must have shape (*layers, experts). Got shape ().")
    return jnp.asarray(load)


def check_bias_dtype(name: str, bias: Array) -> None:
    """The selection bias is float32 or wider."""
    array_kind(name, bias, jnp.floating)
    # Released biases are near 5, where neighbors in bfloat16 are further apart than most scores.
    if jnp.result_type(bias).itemsize < 4:
        raise TypeError(
            f"`{name}` must be float32 or wider, because a rounded bias chooses other experts. "
            f"Got {bias.dtype}: cast the model by `braidax.cast`, which leaves routers alone."
        )


def _check_update(bias: Array, load: Array, rate: ArrayLike) -> None:
    array_kind("load", _checked(load), jnp.integer)
    check_bias_dtype("bias", bias)
    if bias.shape != load.shape:
        raise ValueError(
            "`bias` and `load` must have the same shape (*layers, experts). "
            f"Got {bias.shape} and {load.shape}."
        )
    if jnp.ndim(rate) != 0:
        raise ValueError(f"`rate` must be a scalar. Got shape {jnp.shape(rate)}.")
    if not isinstance(rate, Tracer) and not np.isfinite(rate):
        raise ValueError(f"`rate` must be finite. Got {rate}.")


def updated_bias(
    bias: Float[Array, "*layers experts"],
    load: Integer[Array, "*layers experts"],
    rate: Real[ArrayLike, ""],
    *,
    center: bool = False,
) -> Float[Array, "*layers experts"]:
    """`bias + rate * sign(mean(load) - load)`, float32 `(*layers, experts)`.

    `bias` and `load` are `(*layers, experts)`, `rate` is a scalar in units of the scores. The sign
    is decided in integers, exactly. `load` is the count of the whole step: sum over devices and
    micro-batches first. `center=True` also subtracts the mean of the update, which stops the
    common drift and leaves selection alone. A load of zero everywhere leaves the bias unchanged.

    **Raises:** `TypeError` for a `load` that is not integer and a `bias` narrower than float32.
    `ValueError` for shapes that differ and for a `rate` that is not a finite scalar, unless it is
    traced.

    **Source:** arXiv:2408.15664, algorithm 1.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> bx.updated_bias(jnp.zeros(4), jnp.array([4, 2, 1, 1]), 0.5).tolist()
        [-0.5, 0.0, 0.5, 0.5]
    """
    _check_update(bias, load, rate)
    if load.dtype.itemsize < 4:
        load = load.astype(jnp.int32)
    num_experts = load.shape[-1]
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

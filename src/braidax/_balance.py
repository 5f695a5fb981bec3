"""Expert load: pure functions of a `Routing`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int32, Real

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
    load = checked_load(load).astype(jnp.float32)
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
    load = checked_load(load).astype(jnp.float32)
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
    return jnp.sum(checked_load(load) == 0, axis=-1, dtype=jnp.int32)


def checked_load(load: Any) -> Load:
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

"""The bias update over a whole model, which no optimizer makes."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PyTree, Real

from ._balance import expert_load
from ._filters import is_router, routers
from ._router.base import AbstractRouter
from ._routing import Routing


def _listed(routings: Any) -> Sequence[Any]:
    """A single `Routing` or load stands for a list of one."""
    if isinstance(routings, Routing) or hasattr(routings, "dtype"):
        return [routings]
    if not isinstance(routings, Sequence):
        raise TypeError(
            "`routings` must be a Routing, a load, or a sequence of them. "
            f"Got a {type(routings).__name__}."
        )
    return routings


def _given_load(item: Any, position: int) -> Int[Array, "..."]:
    """The load that one of the `routings` stands for."""
    if isinstance(item, Routing):
        return expert_load(item)
    dtype = getattr(item, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or jnp.ndim(item) == 0:
        found = f"a {type(item).__name__}" if dtype is None else f"{dtype} {jnp.shape(item)}"
        raise TypeError(
            f"`routings[{position}]` must be a Routing, the second of the two that a block "
            f"returns, or a load, integers (*layers, experts). Got {found}."
        )
    return jnp.asarray(item)


def _layer_load(router: AbstractRouter, load: Array, position: int) -> Int[Array, "..."]:
    """The load that `router` is updated with: `(*layers, experts)`, layers from stacked weights."""
    weight = router.gate.weight
    if not hasattr(weight, "shape"):
        raise TypeError(
            f"`model` must hold whole routers. Got a router whose `gate.weight` is {weight!r:.60}: "
            "give the combined model, not a half of `eqx.partition`."
        )
    *layers, num_experts, _ = weight.shape
    if load.shape[-1] != num_experts:
        raise ValueError(
            f"`routings[{position}]` must come from a router of {num_experts} experts. "
            f"Got {load.shape[-1]} experts."
        )
    if not layers:  # every other axis counts micro-batches or examples
        return load.reshape(-1, num_experts).sum(axis=0)
    if list(load.shape[:-1]) != layers:
        raise ValueError(
            f"`routings[{position}]` must be stacked over the layers {tuple(layers)} of its router "
            f"and over nothing else. Got {load.shape[:-1]}. Of micro-batches, give the sum of the "
            "loads: `braidax.expert_load(routing).sum(axis)`, the axis that is not of layers."
        )
    return load


def rebalance(
    model: PyTree,
    routings: Routing | ArrayLike | Sequence[Routing | ArrayLike],
    rate: Real[ArrayLike, ""],
    *,
    where: Callable[[PyTree], Any] | None = None,
) -> PyTree:
    """A new `model` with the selection bias of every router moved towards balance by `rate`.

    **Arguments:**

    - `model`: any tree that holds routers.
    - `routings`: one `Routing` or load per router, in model order, routers without a bias included
        (they stay as they are). A single one stands for a list of one. A load is an integer array
        `(*layers, experts)`, such as the sum of `expert_load` over micro-batches. A router stacked
        over layers takes what is stacked over these layers and nothing else, because its axes
        could be taken for one another. For any other router all axes but the experts are summed.
    - `rate`: a scalar, the step in units of the scores.
    - `where`: `where(model) -> [routers]` names other routers or another order.

    **Raises:** `ValueError` where the counts or the shapes of routers and routings differ.
    `TypeError` for anything else in `routings`, where `where` returns anything but routers, and
    for half of a partitioned model.

    **Source:** arXiv:2408.15664, algorithm 1, as in `updated_bias`.

    **Example:** tokens that are all alike overload two experts, whose bias falls.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> router = bx.rebalance(router, router(jax.numpy.ones((4, 32))), rate=0.5)
        >>> sorted(router.score_correction_bias.tolist())
        [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    given = [_given_load(item, i) for i, item in enumerate(_listed(routings))]

    def find(tree: PyTree) -> list[Any]:
        nodes = routers(tree) if where is None else where(tree)
        return [nodes] if is_router(nodes) else list(nodes)

    found = find(model)
    for router in found:
        if not is_router(router):
            raise TypeError(f"`where` must return routers. Got {type(router).__name__}.")
    if len(found) != len(given):
        raise ValueError(
            "`routings` must hold one Routing or load per router of the model. "
            f"Got {len(given)} for {len(found)} routers."
        )
    if not found:
        raise ValueError("`model` must hold at least one router. Got none.")
    loads = [_layer_load(*pair, i) for i, pair in enumerate(zip(found, given, strict=True))]
    new = [router.rebalanced(load, rate) for router, load in zip(found, loads, strict=True)]
    return eqx.tree_at(find, model, new)

"""What the optimizer may change in a model, and the bias update that it must not make."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, Int32, PyTree, Real

from ._balance import count_assignments
from ._mesh import reduction_on_any_mesh
from ._router.base import AbstractRouter
from ._routing import Routing


def is_router(node: Any) -> bool:
    """Whether `node` is a router, for `is_leaf` of `jax.tree` functions."""
    return isinstance(node, AbstractRouter)


def routers(model: PyTree) -> list[AbstractRouter]:
    """The routers of `model`, any tree, in the order in which `rebalance` takes their routings.

    A router stacked over layers is one of them.

    **Example:**

        >>> import braidax as bx, jax
        >>> first, second = jax.random.split(jax.random.key(0))
        >>> model = [bx.TopKRouter(32, 8, 2, key=first), bx.TopKRouter(32, 16, 2, key=second)]
        >>> [router.gate.weight.shape for router in bx.routers(model)]
        [(8, 32), (16, 32)]
    """
    return [node for node in jax.tree.leaves(model, is_leaf=is_router) if is_router(node)]


def _mask(tree: PyTree, rule: Callable[[Any], bool]) -> PyTree[bool]:
    """`rule(leaf)` for every leaf of `tree`, and False in the routers' untrained fields."""
    untrained = tree.untrained_fields if is_router(tree) else ()

    def is_inner(node: Any) -> bool:
        return is_router(node) and node is not tree

    def visit(path: tuple, node: Any) -> PyTree[bool]:
        if path and getattr(path[0], "name", None) in untrained:
            return jax.tree.map(lambda _: False, node)
        return _mask(node, rule) if is_inner(node) else rule(node)

    # A router within a router is reached too: it is a leaf here and a tree in the inner call.
    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_inner)


def trainable(model: PyTree) -> PyTree[bool]:
    """A filter specification: True on every inexact array of `model` that a gradient may train.

    False on each router's `untrained_fields` (the selection bias, the hash table) and on
    everything that is not an inexact array. For `eqx.partition(model, trainable(model))`. Do not
    hand a tree of labels made from it to `optax.partition` as it is: optax calls labels that are a
    callable module. Give it a function.

    **Example:**

        >>> import braidax as bx, equinox as eqx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> parameters, rest = eqx.partition(router, bx.trainable(router))
        >>> parameters.gate.weight.shape, parameters.score_correction_bias
        ((8, 32), None)
    """
    return _mask(model, eqx.is_inexact_array)


def decay_mask(params: PyTree) -> PyTree[bool]:
    """The mask for weight decay, as in `optax.adamw(1e-3, mask=braidax.decay_mask)`.

    Same structure as `params`, True everywhere except on the routers' `untrained_fields`, which
    have zero gradient but would still decay. `params` may be the model itself,
    `eqx.filter(model, eqx.is_inexact_array)`, or a tree that holds `optax.MaskedNode`s.

    **Example:**

        >>> import braidax as bx, jax, optax
        >>> optimizer = optax.adamw(1e-3, mask=bx.decay_mask)
        >>> mask = bx.decay_mask(bx.TopKRouter(32, 8, 2, key=jax.random.key(0)))
        >>> mask.gate.weight, mask.score_correction_bias
        (True, False)
    """
    return _mask(params, lambda _: True)


def _layer_loads(router: AbstractRouter, routing: Routing, position: int) -> Int32[Array, "..."]:
    """The load that `router` is updated with: `(*layers, experts)`, layers from stacked weights."""
    *layers, num_experts, _ = router.gate.weight.shape
    if routing.scores.shape[-1] != num_experts:
        raise ValueError(
            f"`routings[{position}]` must come from a router of {num_experts} experts. "
            f"Got {routing.scores.shape[-1]} experts."
        )
    shape = routing.indices.shape
    if len(shape) <= len(layers) or list(shape[: len(layers)]) != layers:
        raise ValueError(
            f"`routings[{position}].indices` must start with the layer axes {tuple(layers)} "
            f"of its router. Got shape {shape}."
        )

    def count(indices: Array, mask: Array | None) -> Array:
        return count_assignments(indices, mask, num_experts)

    for _ in layers:
        count = jax.vmap(count)
    return reduction_on_any_mesh(count)(routing.indices, routing.mask)


def rebalance(
    model: PyTree,
    routings: Routing | Sequence[Routing],
    rate: Real[ArrayLike, ""],
    *,
    where: Callable[[PyTree], Any] | None = None,
) -> PyTree:
    """A new `model` with the selection bias of every router moved towards balance by `rate`.

    **Arguments:**

    - `model`: any tree that holds routers.
    - `routings`: one `Routing` per router, in model order, routers without a bias included (they
        stay as they are); a single `Routing` stands for a list of one. A router stacked over
        layers takes a `Routing` whose first axes are those layers; every other axis is summed.
    - `rate`: a scalar, the step in units of the scores.
    - `where`: `where(model) -> [routers]` names other routers or another order.

    **Raises:** `ValueError` where the counts or the shapes of routers and routings differ, and
    `TypeError` where `where` returns anything but routers.

    **Source:** arXiv:2408.15664, algorithm 1, as in `updated_bias`.

    **Example:** tokens that are all alike overload two experts, whose bias falls.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> router = bx.rebalance(router, router(jax.numpy.ones((4, 32))), rate=0.5)
        >>> sorted(router.score_correction_bias.tolist())
        [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    routings = [routings] if isinstance(routings, Routing) else list(routings)

    def find(tree: PyTree) -> list[Any]:
        nodes = routers(tree) if where is None else where(tree)
        return [nodes] if is_router(nodes) else list(nodes)

    found = find(model)
    for router in found:
        if not is_router(router):
            raise TypeError(f"`where` must return routers. Got {type(router).__name__}.")
    if len(found) != len(routings):
        raise ValueError(
            "`routings` must hold one Routing per router of the model. "
            f"Got {len(routings)} routings for {len(found)} routers."
        )
    if not found:
        raise ValueError("`model` must hold at least one router. Got none.")
    loads = [_layer_loads(*pair, i) for i, pair in enumerate(zip(found, routings, strict=True))]
    new = [router.rebalanced(load, rate) for router, load in zip(found, loads, strict=True)]
    return eqx.tree_at(find, model, new)

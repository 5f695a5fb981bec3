"""Which leaves of a model an optimizer may change, and a cast may narrow."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike, PyTree

from ._checks import floating_dtype
from ._router.base import AbstractRouter


def is_router(node: Any) -> bool:
    """Whether `node` is a router, for `is_leaf` of `jax.tree` functions."""
    return isinstance(node, AbstractRouter)


def routers(model: PyTree) -> list[AbstractRouter]:
    """The routers of `model`, any tree, in the order in which `rebalance` takes their routings.

    A router stacked over layers is one of them. **Raises:** `TypeError` if `model` is no tree.

    **Example:**

        >>> import braidax as bx, jax
        >>> first, second = jax.random.split(jax.random.key(0))
        >>> model = [bx.TopKRouter(32, 8, 2, key=first), bx.TopKRouter(32, 16, 2, key=second)]
        >>> [router.gate.weight.shape for router in bx.routers(model)]
        [(8, 32), (16, 32)]
    """
    check_tree("model", model)
    return [node for node in jax.tree.leaves(model, is_leaf=is_router) if is_router(node)]


def check_tree(name: str, tree: PyTree) -> None:
    """`tree` is not a mere number, a function or a word, for which every filter has an answer."""
    if jax.tree_util.all_leaves([tree]) and not _is_parameter(tree):
        raise TypeError(
            f"`{name}` must be a model or a tree of its parameters. Got {tree!r:.60}. "
            "`optax.inject_hyperparams` calls every function with the step count unless "
            '`static_args` names the argument, as in `static_args="mask"`.'
        )


def _is_parameter(leaf: Any) -> bool:
    """Whether a leaf is an inexact array, or the shape of one."""
    shape = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return shape or eqx.is_inexact_array(leaf)


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
    everything that is not an inexact array. `model` may hold shapes, as `eqx.filter_eval_shape`
    makes.

    `eqx.partition(model, trainable(model))` is the way that is right with every optimizer: what an
    optimizer is not given, no optimizer can move. `decay_mask` is shorter and right with some.

    Do not hand a tree of labels made from it to `optax.partition` as it is: optax calls labels
    that are a callable module. Give it a function.

    **Raises:** `TypeError` if `model` is no tree.

    **Example:**

        >>> import braidax as bx, equinox as eqx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> parameters, rest = eqx.partition(router, bx.trainable(router))
        >>> parameters.gate.weight.shape, parameters.score_correction_bias
        ((8, 32), None)
    """
    check_tree("model", model)
    return _mask(model, _is_parameter)


def decay_mask(params: PyTree) -> PyTree[bool]:
    """The mask for weight decay, as in `optax.adamw(1e-3, mask=braidax.decay_mask)`.

    Same structure as `params`, True everywhere except on the routers' `untrained_fields`, which
    have zero gradient but would still decay. `params` may be the model itself,
    `eqx.filter(model, eqx.is_inexact_array)`, or a tree that holds `optax.MaskedNode`s.

    The mask is right where weight decay is all that moves a parameter without a gradient, as in
    `optax.adamw` and `optax.lion`. It does not hold `optax.add_noise` or
    `optax.contrib.schedule_free_adamw`: for these split the model by `trainable`. In
    `optax.inject_hyperparams` name it, by `static_args="mask"`, or it is called as a schedule.

    **Raises:** `TypeError` if `params` is no tree, as the step count of such a call.

    **Example:**

        >>> import braidax as bx, jax, optax
        >>> optimizer = optax.adamw(1e-3, mask=bx.decay_mask)
        >>> mask = bx.decay_mask(bx.TopKRouter(32, 8, 2, key=jax.random.key(0)))
        >>> mask.gate.weight, mask.score_correction_bias
        (True, False)
    """
    check_tree("params", params)
    return _mask(params, lambda _: True)


def cast(model: PyTree, dtype: DTypeLike) -> PyTree:
    """`model` with its floating-point arrays in `dtype`, except those of routers.

    A gate or a selection bias in bfloat16 chooses other experts, and a router is a small part of
    a model. Integers, packed weights included, stay too. Cast inside the loss function, and the
    gradients are those of the float32 parameters.

    **Raises:** `TypeError` or `ValueError` for a `dtype` that is not floating point, of 16 bits or
    more, and `TypeError` if `model` is no tree.

    **Example:**

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> block = bx.top_k_moe(32, 16, 8, 2, key=jax.random.key(0))
        >>> narrow = bx.cast(block, jnp.bfloat16)
        >>> str(narrow.experts.down.dtype), str(narrow.router.gate.weight.dtype)
        ('bfloat16', 'float32')
    """
    check_tree("model", model)
    dtype = floating_dtype("dtype", dtype)

    def visit(node: Any) -> Any:
        floating = _is_parameter(node) and jnp.issubdtype(node.dtype, jnp.floating)
        return node.astype(dtype) if floating else node

    return jax.tree.map(visit, model, is_leaf=is_router)

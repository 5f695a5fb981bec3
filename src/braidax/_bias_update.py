"""The bias update over a whole model, which no optimizer makes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import equinox as eqx
from jaxtyping import ArrayLike, PyTree, Real

from ._filters import is_router, routers
from ._router.base import AbstractRouter, BiasRule
from ._sign_bias import updated_bias


def rebalance(
    model: PyTree,
    routings: Any,
    rate: Real[ArrayLike, ""] | None = None,
    *,
    rule: BiasRule | None = None,
    where: Callable[[PyTree], Any] | None = None,
) -> PyTree:
    """A new `model` with the selection bias of every router moved towards balance.

    **Arguments:**

    - `model`: any tree that holds routers.
    - `routings`: one `Routing` per router, in model order, or instead of a `Routing` whatever else
        the rule takes. A single one stands for a list of one. A router without a bias stays as it
        is, and takes anything. A router stacked over layers takes what is stacked over these layers
        and nothing else, because its axes could be taken for one another. For any other router all
        axes but the experts are summed.
    - `rate`: a scalar in units of the scores, the step of the default rule, which is
        `updated_bias` with this rate. That rule takes loads too, integers `(*layers, experts)`,
        such as the sum of `expert_load` over micro-batches.
    - `rule`: another rule, `rule(bias, item) -> bias`, such as `quantile_bias`. The item is one of
        the `routings`. Give either `rate` or `rule`.
    - `where`: `where(model) -> [routers]` names other routers or another order.

    **Raises:** `ValueError` where the numbers of routers and routings differ, and unless one of
    `rate` and `rule` is given. `TypeError` where `where` returns anything but routers, and for half
    of a partitioned model. An error of the rule has a note that names the routing.

    **Source:** arXiv:2408.15664, algorithm 1, as in `updated_bias`.

    **Example:** tokens that are all alike overload two experts, whose bias falls.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> router = bx.rebalance(router, router(jax.numpy.ones((4, 32))), rate=0.5)
        >>> sorted(router.score_correction_bias.tolist())
        [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    if (rate is None) == (rule is None):
        raise ValueError(f"Either `rate` or `rule` must be given. Got {rate!r} and {rule!r}.")
    if rule is None:
        rule = functools.partial(updated_bias, rate=cast(ArrayLike, rate))
    items = routings if isinstance(routings, Sequence) else [routings]

    def find(tree: PyTree) -> list[Any]:
        nodes = routers(tree) if where is None else where(tree)
        return [nodes] if is_router(nodes) else list(nodes)

    found = find(model)
    for router in found:
        if not is_router(router):
            raise TypeError(f"`where` must return routers. Got {type(router).__name__}.")
        if not hasattr(router.gate.weight, "shape"):
            raise TypeError(
                "`model` must hold whole routers. Got a router whose `gate.weight` is "
                f"{router.gate.weight!r:.60}: give the combined model, not a half of "
                "`eqx.partition`."
            )
    if len(found) != len(items):
        raise ValueError(
            "`routings` must hold one Routing or load per router of the model. "
            f"Got {len(items)} for {len(found)} routers."
        )
    if not found:
        raise ValueError("`model` must hold at least one router. Got none.")
    new = [_rebalanced(router, rule, items, i) for i, router in enumerate(found)]
    return eqx.tree_at(find, model, new)


def _rebalanced(
    router: AbstractRouter, rule: BiasRule, items: Sequence[Any], position: int
) -> AbstractRouter:
    try:
        return router.rebalanced(rule, items[position])
    except (TypeError, ValueError) as error:
        error.add_note(f"This is about `routings[{position}]` of `braidax.rebalance`.")
        raise

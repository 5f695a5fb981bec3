"""What every router does with its gate; a subclass only selects experts."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer, PRNGKeyArray

from .._checks import array_kind, at_least_int32, last_axis
from .._compiled import compiled
from .._routing import (
    HiddenStates,
    Indices,
    InputIds,
    Mask,
    Routing,
    Scores,
    count_nobody,
    undefined_where,
    without_masked,
    zero_masked,
)
from .gate import Gate

# Indices, and whether each token has a defined answer.
Selection = tuple[Int[Array, "*batch experts_per_token"], Bool[Array, "*batch"]]

# `rule(bias, item) -> bias`, both biases `(*layers, experts)` float32.
BiasRule = Callable[[Array, Any], Array]


class AbstractRouter(eqx.Module):
    """gate -> score -> select -> weigh; a subclass provides *select*.

    To write a router, subclass, declare the two fields below, and implement `select`. Arrays that
    must not be trained by gradient are listed in `untrained_fields`.

    - `gate`: a `Gate`.
    - `num_experts_per_token`: the number of experts of a token, on average where that differs.

    A router whose choice for one token depends on others sets `compares_tokens`. Over a mesh the
    router then sees the tokens of all devices at once.

    **Example:** a router that takes the worst experts, for a comparison.

        >>> import braidax as bx, equinox as eqx, jax
        >>> class WorstRouter(bx.AbstractRouter):
        ...     gate: bx.Gate
        ...     num_experts_per_token: int = eqx.field(static=True, default=2)
        ...
        ...     def select(self, scores, logits, input_ids, *, key):
        ...         _, indices = jax.lax.top_k(-scores, self.num_experts_per_token)
        ...         return indices, jax.numpy.ones(scores.shape[:-1], bool)
        >>> router = WorstRouter(bx.Gate(4, 4, key=jax.random.key(0)))
        >>> router = eqx.tree_at(lambda router: router.gate.weight, router, jax.numpy.eye(4))
        >>> router(jax.numpy.array([3.0, 1.0, 0.0, 2.0])).indices.tolist()
        [2, 1]
    """

    gate: eqx.AbstractVar[Gate]
    num_experts_per_token: eqx.AbstractVar[int]

    untrained_fields: ClassVar[tuple[str, ...]] = ()
    compares_tokens: ClassVar[bool] = False

    @abc.abstractmethod
    def select(
        self,
        scores: Scores,
        logits: Scores,
        input_ids: InputIds | None,
        *,
        key: PRNGKeyArray | None,
    ) -> Selection:
        """Which experts, for given `scores` and `logits`, `(*batch, experts)` float32.

        A router may look at `input_ids`, `(*batch,)` or `None`, and draw random numbers with
        `key`, what the block was called with. Scores and logits of padding are -inf here: padding
        loses wherever tokens are compared.

        **Returns:** `(*batch, experts_per_token)` int32 indices, all within `[0, experts]`, of
        which `experts` is nobody; and `(*batch,)` bool, whether each token has a defined answer. A
        token without one gets NaN weights for its experts and leaves all others untouched.
        """

    def count_dropped(self, indices: Indices, mask: Mask | None) -> Int[Array, ""]:
        """How many assignments are missing from `indices`, `(*batch, experts_per_token)`.

        These are the slots of nobody, of tokens that `mask`, `(*batch,)` or `None`, does not call
        padding. A router that leaves slots unused overrides it.
        """
        return count_nobody(indices, mask, self.gate.weight.shape[0])

    def rebalanced(self, rule: BiasRule, item: Any) -> "AbstractRouter":
        """This router after one step of a `rule` of balancing.

        `rule(bias, item)` gives the new bias. The item is what `rebalance` was given for this
        router: a Routing, or whatever else the rule takes. A router without a selection bias stays.
        """
        del rule, item
        return self

    @compiled
    @jax.named_scope("braidax.router")
    def __call__(
        self,
        hidden_states: HiddenStates,
        input_ids: InputIds | None = None,
        *,
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        indices: Integer[Array, "*batch experts_per_token"] | None = None,
    ) -> Routing:
        """Route every token.

        - `hidden_states`: `(*batch, hidden)`, any floating-point dtype.
        - `input_ids`: `(*batch,)` token ids, for routers that look at ids.
        - `mask`: `(*batch,)` bool, `False` on padding. Padding goes to nobody and may hold
            anything, NaN and invalid ids included.
        - `key`: handed to `select`.
        - `indices`: `(*batch, experts_per_token)` integers: the experts of each token, in place of
            `select`. Scores and weights are those of the gate, and have its gradient. The number
            of experts per token is free. An index equal to `experts` is nobody, and a token with
            any other index of no expert gets NaN weights.

        **Raises:** `ValueError` or `TypeError` at trace time for a wrong shape or dtype.
        """
        check_hidden_states(self, hidden_states)
        batch = hidden_states.shape[:-1]
        check_mask(mask, batch)
        scores, logits = self.gate(zero_masked(jnp.asarray(hidden_states), mask))
        if indices is None:
            compared = _lowest_masked(scores, mask), _lowest_masked(logits, mask)
            indices, defined = self.select(*compared, input_ids, key=key)
        else:
            indices = checked_indices("indices", indices, batch)
            indices, defined = named_experts(indices, scores.shape[-1])
        indices = without_masked(indices, mask, scores.shape[-1])
        weights = self.gate.weigh(scores, indices)
        # A select: nothing that comes back through padding may reach the gate.
        undefined = ~defined[..., None] & (indices < scores.shape[-1])
        weights = undefined_where(undefined, zero_masked(weights, mask))
        dropped = self.count_dropped(indices, mask)
        return Routing(indices, weights, scores, logits, mask, dropped)


def _lowest_masked(array: Scores, mask: Mask | None) -> Scores:
    return array if mask is None else jnp.where(mask[..., None], array, -jnp.inf)


def check_hidden_states(router: AbstractRouter, hidden_states: HiddenStates) -> None:
    """`router` is a single one, not stacked over layers, and `hidden_states` fit it."""
    shape = router.gate.weight.shape
    if len(shape) != 2:
        raise ValueError(
            f"`router.gate.weight` must have shape (experts, hidden). Got {shape}: layers stacked "
            "in front are called one by one, by `jax.lax.scan` or `jax.vmap`."
        )
    last_axis("hidden_states", hidden_states, shape[-1], "hidden")


def check_mask(mask: Mask | None, batch: tuple[int, ...]) -> None:
    """`mask` is None or a bool array with one entry for each token."""
    if mask is not None:
        _check_entries("mask", mask, jnp.bool_, batch)


def checked_ids(input_ids: InputIds, batch: tuple[int, ...]) -> InputIds:
    """`input_ids`, if they are integers of shape `batch`; never broadcast."""
    _check_entries("input_ids", input_ids, jnp.integer, batch)
    return input_ids


def checked_indices(name: str, indices: Array, batch: tuple[int, ...]) -> Array:
    """`indices`, if they are integers of shape `(*batch, experts_per_token)`."""
    array_kind(name, indices, jnp.integer)
    shape = jnp.shape(indices)
    if shape[:-1] != tuple(batch) or 0 in (len(shape), *shape[-1:]):
        raise ValueError(
            f"`{name}` must have shape {(*batch, 'experts_per_token')}, with at least one expert "
            f"for a token. Got {shape}."
        )
    return indices


def named_experts(
    indices: Integer[Array, "*batch experts_per_token"], num_experts: int
) -> Selection:
    """`indices` that were chosen elsewhere, as `select` returns its own.

    A token with an index that is neither an expert nor nobody has no defined answer."""
    # Wide indices are compared in their own dtype: narrowing first would wrap them into range.
    indices = at_least_int32(indices)
    valid = jnp.asarray((indices >= 0) & (indices <= num_experts))
    return jnp.where(valid, indices, 0).astype(jnp.int32), valid.all(axis=-1)


def _check_entries(name: str, array: Array, kind: Any, batch: tuple[int, ...]) -> None:
    array_kind(name, array, kind)
    if jnp.shape(array) != tuple(batch):
        raise ValueError(
            f"`{name}` must have the shape of `hidden_states` without its last axis, "
            f"{tuple(batch)}. Got {jnp.shape(array)}."
        )

"""Replaying a given assignment with its weights: what is refused, and what poisons a token."""

import jax.numpy as jnp

from ._router import (
    AbstractRouter,
    check_hidden_states,
    check_mask,
    checked_indices,
    named_experts,
)
from ._routing import (
    HiddenStates,
    Mask,
    Routing,
    undefined_where,
    without_masked,
    zero_masked,
)


def replayed(
    router: AbstractRouter, hidden_states: HiddenStates, mask: Mask | None, routing: Routing
) -> Routing:
    """`routing`, with its mask folded in, for these hidden states and this router.

    A token with an index that is neither an expert nor nobody gets NaN weights: a router makes
    only valid indices. `dropped` counts the assignments that are missing, as the router does.

    **Raises:** `ValueError` or `TypeError` if `routing` does not fit.
    """
    _check(router, hidden_states, mask, routing)
    num_experts, mask = routing.scores.shape[-1], routing.mask
    indices, defined = named_experts(routing.indices, num_experts)
    indices = without_masked(indices, mask, num_experts)
    nobody = indices == num_experts
    weights = undefined_where(~defined[..., None], routing.weights)
    weights = zero_masked(jnp.where(nobody, 0, weights), mask)
    dropped = router.count_dropped(indices, mask)
    return Routing(indices, weights, routing.scores, routing.logits, mask, dropped)


def _check(
    router: AbstractRouter, hidden_states: HiddenStates, mask: Mask | None, routing: Routing
) -> None:
    check_hidden_states(router, hidden_states)
    if mask is not None:
        raise ValueError("`mask` must be None when `routing` is given: it has its own. Got both.")
    batch, num_experts = hidden_states.shape[:-1], router.gate.weight.shape[0]
    check_mask(routing.mask, batch)
    indices = checked_indices("routing.indices", routing.indices, batch)
    if routing.weights.shape != indices.shape:
        raise ValueError(
            "`routing.weights` must have the shape of `routing.indices`, "
            f"{tuple(indices.shape)}. Got {tuple(routing.weights.shape)}."
        )
    if routing.scores.shape[-1] != num_experts:
        raise ValueError(
            f"`routing` must be over {num_experts} experts, as the block. "
            f"Got {routing.scores.shape[-1]}."
        )

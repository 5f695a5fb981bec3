"""Replaying a given assignment: what is refused, and what poisons a token."""

import jax.numpy as jnp

from ._checks import at_least_int32
from ._router import AbstractRouter, check_hidden_states, check_mask
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
    indices = at_least_int32(routing.indices)
    valid = (indices >= 0) & (indices <= num_experts)
    indices = jnp.where(valid, indices, 0).astype(jnp.int32)
    indices = without_masked(indices, mask, num_experts)
    nobody = indices == num_experts
    weights = undefined_where(~valid.all(axis=-1, keepdims=True), routing.weights)
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
    if routing.indices.shape[:-1] != batch or routing.weights.shape != routing.indices.shape:
        raise ValueError(
            f"`routing` must have indices and weights of shape {(*batch, 'experts_per_token')}. "
            f"Got {routing.indices.shape} and {routing.weights.shape}."
        )
    if routing.scores.shape[-1] != num_experts:
        raise ValueError(
            f"`routing` must be over {num_experts} experts, as the block. "
            f"Got {routing.scores.shape[-1]}."
        )

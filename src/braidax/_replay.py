"""Replaying a given assignment: what is refused, and what poisons a token."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._checks import at_least_int32
from ._router import AbstractRouter
from ._router.base import check_hidden_states, check_mask
from ._routing import Routing


def within_range(routing: Routing, *, checks: bool) -> Routing:
    """NaN weights for the tokens whose indices name no expert, or a run-time error with `checks`.
    A router only makes valid ones."""
    num_experts = routing.scores.shape[-1]
    indices = at_least_int32(routing.indices)
    valid = (indices >= 0) & (indices < num_experts)
    defined = valid.all(axis=-1, keepdims=True)
    weights = jnp.where(defined, routing.weights, jnp.nan)
    if checks:
        wrong = ~defined[..., 0] if routing.mask is None else ~defined[..., 0] & routing.mask
        # On the float weights: integers have no NaN for EQX_ON_ERROR=nan to put there.
        weights = eqx.error_if(
            weights,
            wrong,
            f"`routing.indices` must be in [0, {routing.scores.shape[-1]}). "
            "Got an index of no expert.",
        )
    return Routing(
        indices=jnp.where(valid, indices, 0).astype(jnp.int32),
        weights=weights,
        scores=routing.scores,
        logits=routing.logits,
        mask=routing.mask,
        dropped=routing.dropped,
    )


def check_replay(
    router: AbstractRouter,
    hidden_states: Float[Array, "*batch hidden"],
    mask: Bool[Array, "*batch"] | None,
    routing: Routing,
) -> None:
    """`routing` fits these hidden states and this router; `ValueError` or `TypeError` if not."""
    check_hidden_states(router, hidden_states)
    if mask is not None:
        raise ValueError("`mask` must be None when `routing` is given: it has its own. Got both.")
    batch, num_experts = hidden_states.shape[:-1], router.weight.shape[0]
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

"""Dropless dispatch: one row for every assignment, sorted by expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .base import AbstractDispatch


@jax.custom_vjp
def permute(
    array: Float[Array, "rows hidden"], order: Int[Array, " rows"], inverse: Int[Array, " rows"]
) -> Float[Array, "rows hidden"]:
    """`array[order]` for a permutation. Its transpose is a gather by `inverse`, where JAX would
    scatter: slower, and on a GPU not deterministic."""
    del inverse
    return array.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permute_forward(array, order, inverse):
    return permute(array, order, inverse), (order, inverse)


def _permute_backward(residuals, cotangent):
    order, inverse = residuals
    return permute(cotangent, inverse, order), None, None


permute.defvjp(_permute_forward, _permute_backward)


class SortedDispatch(AbstractDispatch):
    """Rows sorted by expert, tokens in order within an expert, padding last.

    `order[row]` is the assignment (token * experts_per_token + slot) in that row, and
    `inverse[assignment]` the row it went to.
    """

    order: Int[Array, " rows"]
    inverse: Int[Array, " rows"]
    group_sizes: Int[Array, " groups"]

    def gather(self, hidden_states: Float[Array, "tokens hidden"]) -> Float[Array, "rows hidden"]:
        """The token of every row."""
        tokens, hidden = hidden_states.shape
        slots = self.order.shape[0] // max(tokens, 1)
        assignments = jnp.broadcast_to(hidden_states[:, None], (tokens, slots, hidden))
        return permute(assignments.reshape(-1, hidden), self.order, self.inverse)

    def combine(
        self,
        rows: Float[Array, "rows hidden"],
        weights: Float[Array, "tokens experts_per_token"],
    ) -> Float[Array, "tokens hidden"]:
        """Weighted sum of each token's rows, in the fixed order of its slots."""
        assignments = permute(rows, self.inverse, self.order)
        assignments = assignments.reshape(*weights.shape, rows.shape[-1])
        return (assignments * weights[..., None].astype(rows.dtype)).sum(axis=1)


def sorted_dispatch(
    indices: Int[Array, "tokens experts_per_token"],
    mask: Bool[Array, " tokens"] | None,
    num_experts: int,
) -> SortedDispatch:
    """Plan the dispatch of `indices` with a stable sort: no capacity, nothing dropped."""
    if mask is not None:
        # Past the last expert: sorted to the end, into no group.
        indices = jnp.where(mask[:, None], indices, num_experts)
    experts = indices.reshape(-1)
    positions = jnp.arange(experts.shape[0], dtype=jnp.int32)
    experts, order = jax.lax.sort((experts, positions), num_keys=1, is_stable=True)
    inverse = (
        jnp.zeros_like(order)
        .at[order]
        .set(positions, mode="promise_in_bounds", unique_indices=True)
    )
    edges = jnp.searchsorted(experts, jnp.arange(num_experts + 1, dtype=experts.dtype))
    return SortedDispatch(order, inverse, jnp.diff(edges).astype(jnp.int32))

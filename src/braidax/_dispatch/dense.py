"""Dense dispatch: every expert sees every token. The oracle, not a fast path."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .base import AbstractDispatch


class DenseDispatch(AbstractDispatch):
    """Experts x tokens rows in equal groups, most of which combine with weight 0.

    Differentiable in every mode and order, because it is plain indexing and arithmetic. It does
    not isolate a NaN: one in an expert's weights reaches the gradient of every token, and one in
    a token the gradient of every expert.
    """

    indices: Int[Array, "tokens experts_per_token"]
    group_sizes: Int[Array, " groups"]
    num_experts: int = eqx.field(static=True)

    def gather(self, hidden_states: Float[Array, "tokens hidden"]) -> Float[Array, "rows hidden"]:
        """All tokens, once for each expert."""
        tokens, hidden = hidden_states.shape
        rows = jnp.broadcast_to(hidden_states, (self.num_experts, tokens, hidden))
        return rows.reshape(self.num_experts * tokens, hidden)

    def combine(
        self,
        rows: Float[Array, "rows hidden"],
        weights: Float[Array, "tokens experts_per_token"],
    ) -> Float[Array, "tokens hidden"]:
        """Weighted sum over all experts; duplicates in a row of `indices` add up."""
        tokens = weights.shape[0]
        by_expert = jnp.zeros((tokens, self.num_experts), rows.dtype)
        by_expert = by_expert.at[jnp.arange(tokens)[:, None], self.indices].add(
            weights.astype(rows.dtype)
        )
        chosen = jnp.zeros(by_expert.shape, bool)
        chosen = chosen.at[jnp.arange(tokens)[:, None], self.indices].set(True)
        outputs = rows.reshape(self.num_experts, tokens, rows.shape[-1])
        outputs = jnp.where(chosen.T[..., None], outputs, 0)
        return jnp.einsum("te,eth->th", by_expert, outputs, precision="highest")


def dense_dispatch(
    indices: Int[Array, "tokens experts_per_token"],
    mask: Bool[Array, " tokens"] | None,
    num_experts: int,
) -> DenseDispatch:
    """Plan nothing: masked tokens already have weight 0 and a zero hidden state."""
    del mask
    group_sizes = jnp.full((num_experts,), indices.shape[0], jnp.int32)
    return DenseDispatch(indices, group_sizes, num_experts)

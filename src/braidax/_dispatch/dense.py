"""Dense dispatch: every expert sees every token. The oracle, not a fast path."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._experts import AbstractExperts
from .._matmul import Dense, GroupedMatmul, accumulation_dtype
from .._routing import Routing
from .base import AbstractDispatch


class DenseDispatch(AbstractDispatch):
    """Every expert computes every token, and most results are multiplied by 0.

    Plain indexing and arithmetic, so every mode and order of differentiation works. A NaN is not
    isolated: one in an expert's weights reaches the gradient of every token, and one in a token the
    gradient of every expert.

    **Example:**

        >>> import braidax as bx, jax
        >>> block = bx.top_k_moe(32, 16, 8, 2, dispatch=bx.DenseDispatch(), key=jax.random.key(0))
    """

    def __call__(
        self,
        experts: AbstractExperts,
        hidden_states: Float[Array, "*batch hidden"],
        routing: Routing,
    ) -> tuple[Float[Array, "*batch hidden"], Int[Array, ""]]:
        """As `AbstractDispatch.__call__`."""
        num_experts, hidden = routing.scores.shape[-1], hidden_states.shape[-1]
        indices = routing.indices.reshape(-1, routing.indices.shape[-1])
        somebody = (indices < num_experts).any(axis=-1)
        tokens = jnp.where(somebody[:, None], hidden_states.reshape(-1, hidden), 0)
        group_sizes = jnp.full((num_experts,), tokens.shape[0], jnp.int32)
        rows = jnp.broadcast_to(tokens, (num_experts, *tokens.shape)).reshape(-1, hidden)
        outputs = experts(rows, group_sizes, GroupedMatmul(Dense()))
        outputs = outputs.reshape(num_experts, tokens.shape[0], hidden)
        output = _combine(outputs, indices, routing.weights.reshape(indices.shape))
        output = output.astype(accumulation_dtype(hidden_states))
        return output.reshape(hidden_states.shape), jnp.zeros((), jnp.int32)


def _combine(
    outputs: Float[Array, "experts tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
) -> Float[Array, "tokens hidden"]:
    """Weighted sum over all experts. An expert that a token names twice adds twice."""
    num_experts, num_tokens, _ = outputs.shape
    token = jnp.arange(num_tokens)[:, None]
    by_expert = jnp.zeros((num_tokens, num_experts), outputs.dtype)
    by_expert = by_expert.at[token, indices].add(weights.astype(outputs.dtype), mode="drop")
    chosen = jnp.zeros(by_expert.shape, bool).at[token, indices].set(True, mode="drop")
    outputs = jnp.where(chosen.T[..., None], outputs, 0)
    return jnp.einsum("te,eth->th", by_expert, outputs, precision="highest")

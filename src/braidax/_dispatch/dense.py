"""Dense dispatch: every expert sees every token. The oracle, not a fast path."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
        scales, chosen = _by_expert(indices, routing.weights.reshape(indices.shape), num_experts)
        outputs = experts.call_scaled(
            rows, scales.reshape(-1), group_sizes, GroupedMatmul(Dense())
        ).reshape(num_experts, tokens.shape[0], hidden)
        output = jnp.where(chosen[..., None], outputs, 0).sum(axis=0)
        output = output.astype(accumulation_dtype(hidden_states))
        return output.reshape(hidden_states.shape), jnp.zeros((), jnp.int32)


def _by_expert(
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
    num_experts: int,
) -> tuple[Float[Array, "experts tokens"], Bool[Array, "experts tokens"]]:
    """The weight that each expert has for each token, and whether the token names the expert. An
    expert that a token names twice has both weights."""
    token, shape = jnp.arange(indices.shape[0])[:, None], (indices.shape[0], num_experts)
    scales = jnp.zeros(shape, accumulation_dtype(weights))
    scales = scales.at[token, indices].add(weights.astype(scales.dtype), mode="drop")
    chosen = jnp.zeros(shape, bool).at[token, indices].set(True, mode="drop")
    return scales.T, chosen.T

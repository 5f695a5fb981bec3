"""The contract of a dispatch: how tokens meet experts."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from .._experts import AbstractExperts
from .._matmul import AbstractGroupedMatmul, Auto, check_kernel
from .._router import AbstractRouter
from .._routing import Routing


class AbstractDispatch(eqx.Module):
    """How tokens meet experts: on one device, by every expert, or over a mesh.

    A subclass supplies `__call__`, from tokens and their `Routing` to the weighted sum of each
    token's experts. Its fields are its settings, and must be static. An assignment to *nobody*,
    whose index is the number of experts, takes no part.

    **Example:** a dispatch that computes every expert for every token, one expert after the other.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> class OneByOne(bx.AbstractDispatch):
        ...     def __call__(self, experts, hidden_states, routing):
        ...         product, num_tokens = bx.GroupedMatmul(bx.matmul.Blocks()), len(hidden_states)
        ...         num_experts, output = routing.scores.shape[-1], jnp.zeros(hidden_states.shape)
        ...         for expert in range(num_experts):
        ...             sizes = jnp.zeros(num_experts, jnp.int32).at[expert].set(num_tokens)
        ...             weight = jnp.where(routing.indices == expert, routing.weights, 0).sum(-1)
        ...             output += experts.call_scaled(hidden_states, weight, sizes, product)
        ...         return output, jnp.zeros((), jnp.int32)
        >>> block = bx.top_k_moe(8, 4, 4, 2, dispatch=OneByOne(), key=jax.random.key(0))
        >>> output, _ = block(jnp.ones((2, 8)))
    """

    def route(
        self,
        router: AbstractRouter,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None,
        *,
        mask: Bool[Array, "*batch"] | None,
        key: PRNGKeyArray | None,
        indices: Integer[Array, "*batch experts_per_token"] | None,
    ) -> Routing:
        """The `Routing` by `router` of `hidden_states`, `(*batch, hidden)`.

        `input_ids` and `mask` are `(*batch,)`, `indices` `(*batch, experts_per_token)`, or `None`;
        `key` goes to the router. A dispatch over a mesh routes where the tokens are.
        """
        return router(hidden_states, input_ids, mask=mask, key=key, indices=indices)

    def checked(self, routing: Routing) -> Routing:
        """`routing`, tied to a run-time error for a token without a defined answer: what a block
        with `checks=True` calls. A dispatch that cannot stop its program overrides it."""
        # On the float weights: integers have no NaN for EQX_ON_ERROR=nan to put there.
        weights = eqx.error_if(
            routing.weights,
            jnp.isnan(routing.weights),
            "A token has no experts: its id is outside the table of the router (`input_ids`), a "
            "given index names no expert (`indices`, `routing.indices`), or a score is NaN.",
        )
        return eqx.tree_at(lambda r: r.weights, routing, weights)

    @abc.abstractmethod
    def __call__(
        self,
        experts: AbstractExperts,
        hidden_states: Float[Array, "*batch hidden"],
        routing: Routing,
    ) -> tuple[Float[Array, "*batch hidden"], Int[Array, ""]]:
        """The weighted sum of each token's experts.

        **Arguments:**

        - `experts`: their `call_scaled` takes rows grouped by expert, and the weights.
        - `hidden_states`: `(*batch, hidden)`. A token whose assignments are all to nobody may hold
            anything, and gets 0.
        - `routing`: int32 indices and float32 weights, `(*batch, experts_per_token)`.

        **Returns:** `(*batch, hidden)` in float32 or wider, and the number of assignments that
        were not computed, int32.
        """


def checked_kernel(matmul: AbstractGroupedMatmul | None) -> AbstractGroupedMatmul:
    """`matmul`, if it is a kernel of groups of any size, or `Auto()` for `None`.

    **Raises:** `TypeError` otherwise."""
    matmul = Auto() if matmul is None else matmul
    check_kernel("matmul", matmul)
    return matmul

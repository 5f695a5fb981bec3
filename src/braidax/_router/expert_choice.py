"""`ExpertChoiceRouter`: each expert takes its best tokens."""

import math
from typing import Any, ClassVar, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._checks import experts_per_token, integer
from .._routing import Indices, InputIds, Mask, Scores
from .base import AbstractRouter, Selection
from .gate import Gate, GateOptions


class ExpertChoiceRouter(AbstractRouter):
    """Each expert takes the tokens that score it highest, as many as every other expert.

    All batch axes of a call are one batch, of which an expert takes `capacity` tokens. The load is
    even without a loss or a bias. A token has any number of experts, none included, and its slots
    hold them from the highest score down. Unused slots are nobody's, and are not counted in
    `dropped`. Equal scores are won by the lower token index.

    **A choice sees the whole batch.** In a causal model a later token changes the output of an
    earlier one, which leaks the future. One token of a call is taken by every expert, so decoding
    differs from training. `jax.vmap` makes each example a batch of its own. `ExpertParallel` lets
    experts choose among the tokens of all devices.

    - Padding takes no place, and does not count towards the capacity. The answer is that of the
      call without padding.
    - A token with a NaN score comes after all others. Experts with room for it give it NaN weights.
    - `gate`: the `Gate`.
    - all others: the arguments of the constructor.

    **Source:** Zhou et al. (arXiv:2202.09368), section 3.2. `num_experts_per_token` is its capacity
    factor.

    **Example:** two experts take two of four tokens each. Nobody takes the last token.

        >>> import braidax as bx, equinox as eqx, jax, jax.numpy as jnp
        >>> router = bx.ExpertChoiceRouter(2, 2, 1, key=jax.random.key(0))
        >>> router = eqx.tree_at(lambda router: router.gate.weight, router, jnp.eye(2))
        >>> routing = router(jnp.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 1.0]]))
        >>> routing.indices.tolist(), bx.expert_load(routing).tolist(), int(routing.dropped)
        ([[0, 2], [0, 1], [2, 2], [1, 2]], [2, 2], 0)
    """

    gate: Gate
    num_experts_per_token: int = eqx.field(static=True)
    max_experts_per_token: int = eqx.field(static=True)

    compares_tokens: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        max_experts_per_token: int | None = None,
        key: PRNGKeyArray,
        **gate_options: Unpack[GateOptions],
    ):
        """**Arguments:**

        - `hidden_size`, `num_experts`: sizes.
        - `num_experts_per_token`: the experts of a token on average, which makes the capacity.
        - `max_experts_per_token`: the slots of a token; by default `num_experts`, so that nothing
            is lost. The choices of lowest score that find no slot are counted in `dropped`.
            A `SortedDispatch` holds a row for each slot, unless it has this router's `capacity`.
        - `key` and the `gate_options`, which are `score_function`, `normalize`,
            `scaling_factor`, `temperature`, `use_bias` and `dtype`: as for `Gate`. As in the paper
            the scores are a softmax by default, and not normalized.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        options: GateOptions = {"score_function": jax.nn.softmax, "normalize": False}
        options.update(gate_options)
        self.gate = Gate(hidden_size, num_experts, key=key, **options)
        self.num_experts_per_token = experts_per_token(num_experts_per_token, num_experts)
        slots = num_experts if max_experts_per_token is None else max_experts_per_token
        self.max_experts_per_token = integer("max_experts_per_token", slots, 1, num_experts)

    def capacity(self, num_tokens: int) -> int:
        """How many of the `num_tokens` of a call each expert takes, padding left out.

        `num_tokens * num_experts_per_token / num_experts`, rounded up.

        **Raises:** `ValueError` or `TypeError` unless `num_tokens` is an integer of at least 0.

        **Example:**

            >>> import braidax as bx, jax
            >>> bx.ExpertChoiceRouter(32, 8, 2, key=jax.random.key(0)).capacity(30)
            8
        """
        return self._share(integer("num_tokens", num_tokens, 0))

    def _share(self, num_tokens: Any) -> Any:
        """`capacity` of a number that may be traced, or a symbolic dimension."""
        return -(-num_tokens * self.num_experts_per_token // self.gate.weight.shape[0])

    def select(
        self,
        scores: Scores,
        logits: Scores,
        input_ids: InputIds | None,
        *,
        key: PRNGKeyArray | None,
    ) -> Selection:
        """The experts that take each token of these `scores`, as `AbstractRouter.select`."""
        del logits, input_ids, key
        *batch, num_experts = scores.shape
        flat = jax.lax.stop_gradient(scores).reshape(math.prod(batch), num_experts)
        undefined = jnp.isnan(flat).any(axis=-1)
        num_real = jnp.sum(~jnp.isneginf(flat).all(axis=-1), dtype=jnp.int32)
        # Below every score, and above padding, which is -inf.
        last = float(jnp.finfo(flat.dtype).min)
        flat = jnp.where(undefined[:, None], last, flat)
        most, taken = self._share(flat.shape[0]), self._share(num_real)
        chosen = jnp.where(_best_tokens(flat, most, taken), flat, -jnp.inf)
        best, indices = jax.lax.top_k(chosen, self.max_experts_per_token)
        indices = jnp.where(jnp.isneginf(best), num_experts, indices.astype(jnp.int32))
        return indices.reshape(*batch, self.max_experts_per_token), ~undefined.reshape(batch)

    def count_dropped(self, indices: Indices, mask: Mask | None) -> Int[Array, ""]:
        """The choices that `indices` lack, with or without a `mask`: those without a slot."""
        num_experts = self.gate.weight.shape[0]
        num_tokens = math.prod(indices.shape[:-1])
        num_real = num_tokens if mask is None else jnp.sum(mask, dtype=jnp.int32)
        num_left = jnp.sum(indices < num_experts, dtype=jnp.int32)
        return jnp.maximum(num_experts * self._share(num_real) - num_left, 0)


def _best_tokens(
    scores: Float[Array, "tokens experts"], most: Any, count: Int[Array, ""]
) -> Bool[Array, "tokens experts"]:
    """The `count` highest `scores` of each expert, which are at most `most`, a static number."""
    order = jnp.argsort(-scores, axis=0, stable=True)[:most]
    within = jnp.broadcast_to(jnp.arange(order.shape[0])[:, None] < count, order.shape)
    experts = jnp.broadcast_to(jnp.arange(scores.shape[-1]), order.shape)
    return jnp.zeros(scores.shape, bool).at[order, experts].set(within, unique_indices=True)

"""The gate that every router shares; a subclass only selects experts."""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import (
    Array,
    ArrayLike,
    Bool,
    DTypeLike,
    Float,
    Int,
    Integer,
    PRNGKeyArray,
    Real,
)

from .._checks import (
    array_dtype,
    floating_dtype,
    last_axis,
    positive_integer,
    positive_number,
)
from .._routing import Routing, zero_masked
from .._scoring import SCORE_FUNCTIONS


class AbstractRouter(eqx.Module):
    """gate -> score -> select -> gather -> normalise -> scale; a subclass provides *select*.

    Everything is computed in float32 whatever the dtype of the parameters and of the input, and
    the gate's matrix product at the highest precision: a lower one changes which experts are
    selected.

    To write a router, subclass, declare the fields below, and implement `select`. Arrays that
    must not be trained by gradient are listed in `untrained_fields`.

    - `weight`: `(experts, hidden)`, the gate.
    - `num_experts_per_token`, `score_function`, `normalize`, `scaling_factor`, `temperature`: as
      for `TopKRouter`.

    **Example:** a router that takes the worst experts, for a comparison.

        >>> import braidax as bx, equinox as eqx, jax
        >>> class WorstRouter(bx.AbstractRouter):
        ...     weight: jax.Array
        ...     num_experts_per_token: int = eqx.field(static=True, default=2)
        ...     score_function: str = eqx.field(static=True, default="sigmoid")
        ...     normalize: bool = eqx.field(static=True, default=True)
        ...     scaling_factor: float = eqx.field(static=True, default=1.0)
        ...     temperature: float = eqx.field(static=True, default=1.0)
        ...
        ...     def select(self, scores, logits, input_ids):
        ...         _, indices = jax.lax.top_k(-scores, self.num_experts_per_token)
        ...         return indices, jax.numpy.ones(scores.shape[:-1], bool)
        >>> WorstRouter(jax.numpy.eye(4))(jax.numpy.array([3.0, 1.0, 0.0, 2.0])).indices.tolist()
        [2, 1]
    """

    weight: eqx.AbstractVar[Float[Array, "experts hidden"]]
    num_experts_per_token: eqx.AbstractVar[int]
    score_function: eqx.AbstractVar[str]
    normalize: eqx.AbstractVar[bool]
    scaling_factor: eqx.AbstractVar[float]
    temperature: eqx.AbstractVar[float]

    untrained_fields: ClassVar[tuple[str, ...]] = ()

    def _set_gate(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        score_function: str,
        normalize: bool,
        scaling_factor: float | int,
        temperature: float | int,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        """Check the constructor arguments that all routers share, and set the fields of the gate.

        `weight` is uniform within +-1/sqrt(hidden), as `eqx.nn.Linear` initialises its own.
        """
        positive_integer("hidden_size", hidden_size)
        positive_integer("num_experts", num_experts)
        if positive_integer("num_experts_per_token", num_experts_per_token) > num_experts:
            raise ValueError(
                "`num_experts_per_token` must be at most `num_experts`. "
                f"Got {num_experts_per_token} and {num_experts}."
            )
        if score_function not in SCORE_FUNCTIONS:
            raise ValueError(
                f"`score_function` must be one of {sorted(SCORE_FUNCTIONS)}. "
                f"Got {score_function!r}."
            )
        if not isinstance(normalize, bool):
            raise TypeError(f"`normalize` must be a bool. Got {normalize!r}.")
        self.scaling_factor = positive_number("scaling_factor", scaling_factor)
        self.temperature = positive_number("temperature", temperature)
        self.num_experts_per_token = int(num_experts_per_token)
        self.score_function = score_function
        self.normalize = normalize
        shape, bound = (num_experts, hidden_size), hidden_size**-0.5
        self.weight = jax.random.uniform(key, shape, floating_dtype("dtype", dtype), -bound, bound)

    @abc.abstractmethod
    def select(
        self,
        scores: Float[Array, "*batch experts"],
        logits: Float[Array, "*batch experts"],
        input_ids: Integer[Array, "*batch"] | None,
    ) -> tuple[Int[Array, "*batch experts_per_token"], Bool[Array, "*batch"]]:
        """Which experts, for given scores.

        **Arguments:**

        - `scores`, `logits`: `(*batch, experts)` float32.
        - `input_ids`: `(*batch,)` token ids, or `None`.

        **Returns:** `(*batch, experts_per_token)` int32 indices, all within `[0, experts)`, and
        `(*batch,)` bool, whether each token has a defined answer. A token without one gets NaN
        weights and leaves all others untouched.
        """

    def checked_weights(
        self,
        weights: Float[Array, "*batch experts_per_token"],
        input_ids: Integer[Array, "*batch"] | None,
        mask: Bool[Array, "*batch"] | None,
    ) -> Float[Array, "*batch experts_per_token"]:
        """`weights`, `(*batch, experts_per_token)`, tied to a run-time error for unmasked
        `input_ids` without an answer: `checks=True` of a block. `input_ids` and `mask` are
        `(*batch,)` or `None`. A router that does not look at ids has nothing to check."""
        del input_ids, mask
        return weights

    def rebalanced(
        self, load: Int[Array, "*layers experts"], rate: Real[ArrayLike, ""]
    ) -> "AbstractRouter":
        """This router after one step of size `rate` against a `load`, `(*layers, experts)`. A
        router without a selection bias stays."""
        del load, rate
        return self

    @jax.named_scope("braidax.router")
    def __call__(
        self,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None = None,
        *,
        mask: Bool[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Routing:
        """Route every token.

        **Arguments:**

        - `hidden_states`: `(*batch, hidden)`, any floating-point dtype.
        - `input_ids`: `(*batch,)` token ids; needed by routers that look at ids, ignored by the
            others.
        - `mask`: `(*batch,)` bool, `False` on padding. Padding is routed with weight 0 and may
            hold anything, NaN and invalid ids included.
        - `key`: ignored; provided for compatibility with the Equinox module API.

        **Returns:** a `Routing` of int32 indices and float32 weights.

        **Raises:** `ValueError` or `TypeError` at trace time for a wrong shape or dtype.
        """
        del key
        check_hidden_states(self, hidden_states)
        check_mask(mask, hidden_states.shape[:-1])
        hidden_states = zero_masked(jnp.asarray(hidden_states), mask).astype(jnp.float32)
        logits = jnp.matmul(
            hidden_states,
            self.weight.astype(jnp.float32).T,
            precision=jax.lax.Precision.HIGHEST,
        )
        logits = logits / self.temperature
        function = SCORE_FUNCTIONS[self.score_function]
        scores = function.scores(logits)

        indices, defined = self.select(scores, logits, input_ids)
        weights = jnp.take_along_axis(scores, indices, axis=-1, mode="promise_in_bounds")
        if self.normalize:
            weights = function.normalise(weights)
        weights = weights * self.scaling_factor
        weights = jnp.where(defined[..., None], weights, jnp.nan)
        return Routing(
            indices=indices,
            weights=zero_masked(weights, mask),
            scores=scores,
            logits=logits,
            mask=mask,
            dropped=jnp.zeros((), jnp.int32),
        )


def check_hidden_states(
    router: AbstractRouter, hidden_states: Float[Array, "*batch hidden"]
) -> None:
    """`router` is a single one, not stacked over layers, and `hidden_states` fit it."""
    shape = router.weight.shape
    if len(shape) != 2:
        raise ValueError(
            f"`router.weight` must have shape (experts, hidden). Got {shape}: layers stacked in "
            "front are called one by one, by `jax.lax.scan` or `jax.vmap`."
        )
    last_axis("hidden_states", hidden_states, shape[-1], "hidden")


def check_mask(mask: Bool[Array, "*batch"] | None, batch: tuple[int, ...]) -> None:
    """`mask` is None or a bool array with one entry for each token."""
    if mask is None:
        return
    dtype = array_dtype("mask", mask)
    if dtype != jnp.bool_:
        raise TypeError(f"`mask` must have dtype bool. Got {dtype}.")
    if jnp.shape(mask) != tuple(batch):
        raise ValueError(
            f"`mask` must have the shape of `hidden_states` without its last axis, "
            f"{tuple(batch)}. Got {jnp.shape(mask)}."
        )

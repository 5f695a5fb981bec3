"""`HashRouter`: a fixed token id -> experts assignment with learned weights."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer, PRNGKeyArray

from .. import hash_tables
from .._checks import array_dtype, at_least_int32
from .base import AbstractRouter


class HashRouter(AbstractRouter):
    """Looks the experts of a token up by its id; how much each counts is learned.

    The table is an int32 leaf, so no gradient, optimizer or dtype cast of floating-point
    parameters touches it. There is no selection bias and nothing to balance by loss. An id
    outside the table gives that token NaN weights and changes no other token.

    - `weight`: `(experts, hidden)`, the gate.
    - `table`: `(vocab, experts_per_token)`, known elsewhere as `tid2eid`.
    - all others: the arguments of the constructor.

    **Source:** DeepSeek-V4 (arXiv:2606.19348), section 2.1; Hash Layers (arXiv:2106.04426).

    **Example:**

        >>> import braidax as bx, jax
        >>> table = bx.hash_tables.round_robin(256, 8, 2)
        >>> router = bx.HashRouter(32, 8, 2, table=table, key=jax.random.key(0))
        >>> router(jax.numpy.ones((2, 32)), jax.numpy.array([1, 4])).indices.tolist()
        [[2, 3], [0, 1]]
    """

    weight: Float[Array, "experts hidden"]
    table: Int[Array, "vocab experts_per_token"]
    num_experts_per_token: int = eqx.field(static=True)
    score_function: str = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)
    scaling_factor: float = eqx.field(static=True)
    temperature: float = eqx.field(static=True)

    untrained_fields: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        table: Integer[np.ndarray, "vocab experts_per_token"]
        | Integer[Array, "vocab experts_per_token"],
        score_function: str = "sqrtsoftplus",
        normalize: bool = True,
        scaling_factor: float | int = 1.0,
        temperature: float | int = 1.0,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `hidden_size`, `num_experts`, `num_experts_per_token`: sizes.
        - `table`: integers `(vocab, experts_per_token)` in `[0, num_experts)`, from
            `braidax.hash_tables` or a checkpoint. An expert named twice in a row counts twice.
        - `score_function`, `normalize`, `scaling_factor`, `temperature`, `dtype`, `key`: as for
            `TopKRouter`.

        **Raises:** `ValueError` or `TypeError` naming the argument. The table's content is
        checked, so it must be concrete: build the router outside of `jax.jit`.
        """
        self._set_gate(
            hidden_size,
            num_experts,
            num_experts_per_token,
            score_function=score_function,
            normalize=normalize,
            scaling_factor=scaling_factor,
            temperature=temperature,
            dtype=dtype,
            key=key,
        )
        try:
            table = np.asarray(table)
        except jax.errors.TracerArrayConversionError:
            raise TypeError(
                "`table` must be a concrete array, because its content is checked. Got a traced "
                "array: build the router outside of jit, vmap and scan."
            ) from None
        if table.ndim != 2 or table.shape[1] != num_experts_per_token:
            raise ValueError(
                f"`table` must have shape (vocab, num_experts_per_token={num_experts_per_token}). "
                f"Got {table.shape}."
            )
        try:
            self.table = jnp.asarray(hash_tables.from_array(table, num_experts))
        except (TypeError, ValueError) as error:
            raise type(error)(f"`table`: {error}") from None

    def select(
        self,
        scores: Float[Array, "*batch experts"],
        logits: Float[Array, "*batch experts"],
        input_ids: Integer[Array, "*batch"] | None,
    ) -> tuple[Int[Array, "*batch experts_per_token"], Bool[Array, "*batch"]]:
        """The table's rows at `input_ids`; `scores` play no part. As `AbstractRouter.select`.

        **Raises:** `ValueError` or `TypeError` at trace time for ids that are missing or of
        another shape or dtype.
        """
        del logits
        input_ids = _checked_ids(input_ids, scores.shape[:-1])
        if not jnp.issubdtype(self.table.dtype, jnp.integer):
            raise TypeError(
                f"`table` must have an integer dtype. Got {self.table.dtype}: was it averaged or "
                "cast as a parameter?"
            )
        known = self._known(input_ids)
        rows = jnp.where(known, input_ids, 0).astype(jnp.int32)
        entries = self.table.at[rows].get(mode="promise_in_bounds")
        # Checked at construction, but a table may be replaced or deserialised afterwards.
        valid = (entries >= 0) & (entries < scores.shape[-1])
        return jnp.where(valid, entries, 0), known & valid.all(axis=-1)

    def checked_weights(
        self,
        weights: Float[Array, "*batch experts_per_token"],
        input_ids: Integer[Array, "*batch"] | None,
        mask: Bool[Array, "*batch"] | None,
    ) -> Float[Array, "*batch experts_per_token"]:
        """`weights`, tied to a run-time error if an unmasked id is outside the table. As
        `AbstractRouter.checked_weights`.

        **Raises:** `ValueError` or `TypeError` as `select` does.
        """
        unknown = ~self._known(_checked_ids(input_ids, weights.shape[:-1]))
        # On the float weights: integers have no NaN for EQX_ON_ERROR=nan to put there.
        return eqx.error_if(
            weights,
            unknown if mask is None else unknown & mask,
            f"`input_ids` must be in [0, vocab={self.table.shape[0]}). Got an id outside.",
        )

    def _known(self, input_ids: Integer[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Which ids have a row in the table."""
        # Wide ids are compared in their own dtype: narrowing first would wrap them into range.
        input_ids = at_least_int32(input_ids)
        return jnp.asarray((input_ids >= 0) & (input_ids < self.table.shape[0]))


def _checked_ids(
    input_ids: Integer[Array, "*batch"] | None, batch: tuple[int, ...]
) -> Integer[Array, "*batch"]:
    """`input_ids`, if they are integers of shape `batch`; never broadcast."""
    if input_ids is None:
        raise ValueError(
            "`input_ids` must be given to a `HashRouter`: it assigns experts by token id. Got None."
        )
    dtype = array_dtype("input_ids", input_ids)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`input_ids` must have an integer dtype. Got {dtype}.")
    if jnp.shape(input_ids) != batch:
        raise ValueError(
            f"`input_ids` must have the shape of `hidden_states` without its last axis, "
            f"{batch}. Got {jnp.shape(input_ids)}."
        )
    return input_ids

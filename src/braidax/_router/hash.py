"""`HashRouter`: a fixed token id -> experts assignment with learned weights."""

from typing import ClassVar, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, PRNGKeyArray

from .. import hash_tables
from .._checks import array_kind, at_least_int32, experts_per_token
from .._routing import InputIds, Scores
from .base import AbstractRouter, Selection, checked_ids
from .gate import Gate, GateOptions


class HashRouter(AbstractRouter):
    """Looks the experts of a token up by its id; how much each counts is learned.

    The table is an int32 leaf, so no gradient, optimizer or dtype cast of floating-point
    parameters touches it. There is no selection bias and nothing to balance by loss. An id
    outside the table gives that token NaN weights and changes no other token.

    - `gate`: the `Gate`.
    - `table`: `(vocab, experts_per_token)`, known elsewhere as `tid2eid`.
    - `num_experts_per_token`: its columns.

    **Source:** DeepSeek-V4 (arXiv:2606.19348), section 2.1; Hash Layers (arXiv:2106.04426).

    **Example:**

        >>> import braidax as bx, jax
        >>> table = bx.hash_tables.round_robin(256, 8, 2)
        >>> router = bx.HashRouter(32, 8, 2, table=table, key=jax.random.key(0))
        >>> router(jax.numpy.ones((2, 32)), jax.numpy.array([1, 4])).indices.tolist()
        [[2, 3], [0, 1]]
    """

    gate: Gate
    table: Int[Array, "vocab experts_per_token"]
    num_experts_per_token: int = eqx.field(static=True)

    untrained_fields: ClassVar[tuple[str, ...]] = ("table",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        table: Integer[np.ndarray, "vocab experts_per_token"]
        | Integer[Array, "vocab experts_per_token"],
        key: PRNGKeyArray,
        **gate_options: Unpack[GateOptions],
    ):
        """**Arguments:**

        - `hidden_size`, `num_experts`, `num_experts_per_token`: sizes.
        - `table`: integers `(vocab, experts_per_token)` in `[0, num_experts)`, from
            `braidax.hash_tables` or a checkpoint. An expert named twice in a row counts twice.
        - `key` and the `gate_options`, which are `score_function`, `normalize`,
            `scaling_factor`, `temperature`, `use_bias` and `dtype`: as for `Gate`.

        **Raises:** `ValueError` or `TypeError` naming the argument. The table's content is
        checked, so it must be concrete: build the router outside of `jax.jit`.
        """
        self.gate = Gate(hidden_size, num_experts, key=key, **gate_options)
        self.num_experts_per_token = experts_per_token(num_experts_per_token, num_experts)
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
        scores: Scores,
        logits: Scores,
        input_ids: InputIds | None,
        *,
        key: PRNGKeyArray | None,
    ) -> Selection:
        """The table's rows at `input_ids`, as `AbstractRouter.select`.

        **Raises:** `ValueError` or `TypeError` for ids that are missing or of another shape or
        dtype.
        """
        del logits, key
        if input_ids is None:
            raise ValueError(
                "`input_ids` must be given to a `HashRouter`: it assigns experts by token id. "
                "Got None."
            )
        input_ids = checked_ids(input_ids, scores.shape[:-1])
        array_kind("table", self.table, jnp.integer, " Was it averaged or cast as a parameter?")
        # Wide ids are compared in their own dtype: narrowing first would wrap them into range.
        input_ids = at_least_int32(input_ids)
        known = jnp.asarray((input_ids >= 0) & (input_ids < self.table.shape[0]))
        rows = jnp.where(known, input_ids, 0).astype(jnp.int32)
        entries = self.table.at[rows].get(mode="promise_in_bounds")
        # Checked at construction, but a table may be replaced or deserialized afterwards.
        valid = (entries >= 0) & (entries < scores.shape[-1])
        return jnp.where(valid, entries, 0), known & valid.all(axis=-1)

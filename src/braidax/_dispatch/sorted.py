"""Sorted dispatch: one row for every assignment, sorted by expert, up to a capacity."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int

from .._balance import count_sorted
from .._checks import boolean, positive_integer
from .._experts import AbstractExperts
from .._matmul import LARGEST_BLOCK, AbstractGroupedMatmul, GroupedMatmul, accumulation_dtype
from .._mesh import placed_by_compiler, split_axes, varying_alike
from .._routing import Routing, over_capacity
from .base import AbstractDispatch, checked_kernel


class SortedDispatch(AbstractDispatch):
    """Rows sorted by expert, one for every assignment. Nothing is dropped without a capacity.

    **Example:**

        >>> import braidax as bx, jax
        >>> dispatch = bx.SortedDispatch(bx.matmul.Blocks(), remat=True)
        >>> block = bx.top_k_moe(32, 16, 8, 2, dispatch=dispatch, key=jax.random.key(0))
    """

    matmul: AbstractGroupedMatmul
    capacity: int | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        matmul: AbstractGroupedMatmul | None = None,
        *,
        capacity: int | None = None,
        remat: bool = False,
    ):
        """**Arguments:**

        - `matmul`: the kernel of the experts' products; by default `Auto()`.
        - `capacity`: the most assignments of an expert in a call. The later ones are left out, as
            by `over_capacity`, and counted in `dropped`. A layer holds `experts * capacity` rows
            then, if a row for every slot would be more. For `jax.export` with a symbolic number
            of tokens it holds all.
        - `remat`: do not keep the experts' pre-activations, `(rows, 2 * intermediate)` float32 in
            each layer, for the backward pass: it computes them again. Same numbers, more time, and
            less memory for layers in a `jax.lax.scan`. Unrolled layers on a CPU gain nothing.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        self.matmul = checked_kernel(matmul)
        self.capacity = None if capacity is None else positive_integer("capacity", capacity)
        self.remat = boolean("remat", remat)

    def __call__(
        self,
        experts: AbstractExperts,
        hidden_states: Float[Array, "*batch hidden"],
        routing: Routing,
    ) -> tuple[Float[Array, "*batch hidden"], Int[Array, ""]]:
        """As `AbstractDispatch.__call__`."""
        axes = split_axes((experts, hidden_states, routing))
        if axes:
            raise ValueError(
                "`hidden_states` and `experts` must be whole on every device of an Explicit mesh, "
                "because a `SortedDispatch` sorts all tokens. `braidax.ExpertParallel(mesh, "
                f"axis=None, tokens=(...)).shard(model)` computes them in parts. Got {axes}."
            )
        slots, num_experts = routing.indices.shape[-1], routing.scores.shape[-1]
        matmul = GroupedMatmul(checked_kernel(self.matmul))
        kept, most = routing, None
        if self.capacity is not None:
            kept, most = over_capacity(routing, self.capacity), self.capacity * num_experts
        arrays, static = eqx.partition(experts, eqx.is_array)

        def combined(arrays, tokens, indices, weights):
            compute = eqx.combine(arrays, static)
            compute = eqx.filter_checkpoint(compute) if self.remat else compute
            sizes = {"num_experts": num_experts, "most": most}
            return weighted_sum(compute, matmul, tokens, indices, weights, **sizes)

        output = placed_by_compiler(
            combined,
            arrays,
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            kept.indices.reshape(-1, slots),
            kept.weights.reshape(-1, slots),
        )
        return output.reshape(hidden_states.shape), kept.dropped - routing.dropped


def weighted_sum(
    experts: Callable[..., Array],
    matmul: GroupedMatmul,
    tokens: Float[Array, "tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
    *,
    num_experts: int,
    most: int | None = None,
) -> Float[Array, "tokens hidden"]:
    """Each token's weighted sum over the experts it names, in float32 or wider.

    `most` is a bound on the assignments that are not nobody's, if there is one."""
    tokens, indices, weights = varying_alike((tokens, indices, weights))
    slots = indices.shape[-1]
    plan = plan_rows(indices.reshape(-1), num_experts)
    if most is not None and not is_symbolic_dim(plan.order.size):
        plan = plan._replace(order=plan.order[:most])  # nobody's rows are the last
    rows = spread(tokens, plan.order, plan.inverse, slots)
    if is_symbolic_dim(rows.shape[0]):
        # Rows of nobody, so that a block of a size that is known now fits among them.
        rows = jnp.pad(rows, ((0, LARGEST_BLOCK), (0, 0)))
    rows = experts(rows, plan.group_sizes, matmul)[: plan.order.size]
    # As a spread with one slot: the weight of every row.
    scales = spread(weights.reshape(-1), plan.order, plan.inverse, 1)
    rows = rows * scales[:, None].astype(rows.dtype)
    return collect(rows, plan.order, plan.inverse, slots).astype(accumulation_dtype(tokens))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(
    tokens: Float[Array, "tokens ..."],
    order: Int[Array, " rows"],
    inverse: Int[Array, " assignments"],
    slots: int,
) -> Float[Array, "rows ..."]:
    """To each row its token: row `r` holds assignment `order[r]`, of token `order[r] // slots`.

    Its transpose is `collect`, where JAX would scatter: slower, and on a GPU not deterministic.
    """
    del inverse
    return tokens.at[order // slots].get(mode="promise_in_bounds")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def collect(
    rows: Float[Array, "rows ..."],
    order: Int[Array, " rows"],
    inverse: Int[Array, " assignments"],
    slots: int,
) -> Float[Array, "tokens ..."]:
    """Sum over each token's rows, in the fixed order of its slots: the transpose of `spread`.

    One gather for each slot: XLA fuses their sum into one pass, 7 times faster on a CPU than a
    reduction over a single gather, and never stores the rows in another order. An assignment whose
    row is past the end of `rows` is nobody's.
    """
    mode = "promise_in_bounds" if order.size == inverse.size else "fill"
    by_slot = inverse.reshape(-1, slots)
    total = rows.at[by_slot[:, 0]].get(mode=mode, fill_value=0)
    for slot in range(1, slots):
        total = total + rows.at[by_slot[:, slot]].get(mode=mode, fill_value=0)
    return total


def _forward(function):
    def forward(array, order, inverse, slots):
        return function(array, order, inverse, slots), (order, inverse)

    return forward


def _backward(transpose):
    def backward(slots, residuals, cotangent):
        return transpose(cotangent, *residuals, slots), None, None

    return backward


spread.defvjp(_forward(spread), _backward(collect))
collect.defvjp(_forward(collect), _backward(spread))


class RowPlan(NamedTuple):
    """Rows sorted by expert, tokens in order within an expert, nobody's rows last.

    `order[row]` is the assignment (token * experts_per_token + slot) in that row, and
    `inverse[assignment]` the row it went to. Rows of nobody may be missing from `order`.
    """

    order: Int[Array, " rows"]
    inverse: Int[Array, " assignments"]
    group_sizes: Int[Array, " groups"]


def plan_rows(indices: Int[Array, " rows"], num_experts: int) -> RowPlan:
    """The plan of all assignments `indices`, by a stable sort."""
    positions = jnp.arange(indices.size, dtype=jnp.int32)
    experts, order = _sort(indices.astype(jnp.int32), positions, num_experts)
    inverse = (
        jnp.zeros_like(order)
        .at[order]
        .set(positions, mode="promise_in_bounds", unique_indices=True)
    )
    return RowPlan(order, inverse, count_sorted(experts, num_experts))


def _sort(
    experts: Int[Array, " rows"], positions: Int[Array, " rows"], num_experts: int
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """The experts in ascending order and their positions, ascending for one expert.

    Both in one number where 32 bits hold them: on a CPU three times faster than to sort pairs.
    """
    bits = 31 if is_symbolic_dim(positions.size) else positions.size.bit_length()
    if (num_experts + 1) << bits > 2**31:
        experts, order = jax.lax.sort((experts, positions), num_keys=1, is_stable=True)
        return experts, order
    keys = jax.lax.sort((experts << bits) | positions, is_stable=False)
    return keys >> bits, keys & (2**bits - 1)

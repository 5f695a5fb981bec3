"""Rows of assignments, sorted by expert: how tokens become rows, and rows tokens again."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int

from .._balance import count_sorted
from .._matmul import LARGEST_BLOCK, GroupedMatmul


class RowPlan(NamedTuple):
    """Rows sorted by expert, tokens in order within an expert, nobody's rows last.

    `order[row]` is the assignment (token * experts_per_token + slot) in that row, and
    `inverse[assignment]` the row it went to. Rows of nobody may be missing from `order`.
    """

    order: Int[Array, " rows"]
    inverse: Int[Array, " assignments"]
    group_sizes: Int[Array, " groups"]


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


class _Rows(NamedTuple):
    """Stands for the rows among what a backward pass needs. It holds nothing."""


def apply_to_rows(
    call_scaled: Callable[..., Array],
    matmul: GroupedMatmul,
    tokens: Float[Array, "tokens hidden"],
    weights: Float[Array, "tokens experts_per_token"],
    plan: RowPlan,
) -> Float[Array, "rows hidden"]:
    """`call_scaled`, the method of `AbstractExperts`, of every row of `plan`.

    Rows hold every token as often as it has experts. They are not kept for the backward pass, which
    gathers them again.
    """
    arrays, static = eqx.partition(call_scaled, eqx.is_array)
    slots, num_rows = weights.shape[-1], plan.order.size

    def gathered(tokens, weights, plan):
        rows = spread(tokens, plan.order, plan.inverse, slots)
        # As a spread with one slot: the weight of every row.
        scales = spread(weights.reshape(-1), plan.order, plan.inverse, 1)
        if is_symbolic_dim(num_rows):
            # Rows of nobody, so that a block of a size that is known now fits among them.
            rows = jnp.pad(rows, ((0, LARGEST_BLOCK), (0, 0)))
            scales = jnp.pad(scales, (0, LARGEST_BLOCK))
        return rows, scales

    def compute(arrays, rows, scales, plan):
        return eqx.combine(arrays, static)(rows, scales, plan.group_sizes, matmul)[:num_rows]

    @jax.custom_vjp
    def run(arrays, tokens, weights, plan):
        return compute(arrays, *gathered(tokens, weights, plan), plan)

    def forward(arrays, tokens, weights, plan):
        rows, scales = gathered(tokens, weights, plan)
        output, transpose = jax.vjp(lambda *given: compute(*given, plan), arrays, rows, scales)
        # A residual that is the rows is left out. Should JAX hand on a copy, the copy is kept.
        kept = jax.tree.map(lambda leaf: _Rows() if leaf is rows else leaf, transpose)
        return output, (kept, tokens, weights, plan)

    def backward(residuals, cotangent):
        kept, tokens, weights, plan = residuals
        _, ungather = jax.vjp(partial(gathered, plan=plan), tokens, weights)
        rows = _gathered_late(
            lambda *given: gathered(*given)[0], (tokens, weights, plan), cotangent
        )
        transpose = jax.tree.map(
            lambda leaf: rows if isinstance(leaf, _Rows) else leaf,
            kept,
            is_leaf=lambda leaf: isinstance(leaf, _Rows),
        )
        d_arrays, *d_gathered = transpose(cotangent)
        return d_arrays, *ungather(tuple(d_gathered)), None

    run.defvjp(forward, backward)
    return run(arrays, tokens, weights, plan)


def _gathered_late(
    gather: Callable[..., Array], operands: tuple, cotangent: Float[Array, "rows hidden"]
) -> Float[Array, "rows hidden"]:
    """`gather(*operands)`, which XLA must neither take for the gather of the forward pass nor do
    before the cotangent is there.

    A barrier is enough, but on a CPU, where XLA drops it early. There a condition stands in, which
    is true wherever a row exists, and reads the cotangent so as to wait for it.
    """
    shape = jax.eval_shape(gather, *operands).shape

    def guarded(operands, cotangent):
        tokens, _, plan = operands
        needed = (plan.group_sizes.sum() > 0) | (cotangent[:1].sum() > 0)
        zeros = jax.lax.full_like(tokens, 0, shape=shape)
        return jax.lax.cond(needed, lambda: gather(*operands), lambda: zeros)

    def held_back(operands, cotangent):
        return gather(*jax.lax.optimization_barrier((operands, cotangent))[0])

    return jax.lax.platform_dependent(operands, cotangent, cpu=guarded, default=held_back)

"""Sorted dispatch: one row for every assignment, sorted by expert, up to a capacity."""

from collections.abc import Callable

import equinox as eqx
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int

from .._checks import boolean, positive_integer
from .._experts import AbstractExperts
from .._matmul import AbstractGroupedMatmul, GroupedMatmul, accumulation_dtype
from .._mesh import placed_by_compiler, split_axes, varying_alike
from .._routing import Routing, over_capacity
from .base import AbstractDispatch, checked_kernel
from .rows import apply_to_rows, collect, plan_rows


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
        - `remat`: do not keep the experts' pre-activations for the backward pass, float32
            `(rows, parts * intermediate)` in each layer: it computes them again. Same numbers,
            more time, and less memory for layers in a `jax.lax.scan`. Unrolled layers on a CPU
            gain nothing.

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
            compute = eqx.combine(arrays, static).call_scaled
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
    call_scaled: Callable[..., Array],
    matmul: GroupedMatmul,
    tokens: Float[Array, "tokens hidden"],
    indices: Int[Array, "tokens experts_per_token"],
    weights: Float[Array, "tokens experts_per_token"],
    *,
    num_experts: int,
    most: int | None = None,
) -> Float[Array, "tokens hidden"]:
    """Each token's weighted sum over the experts it names, in float32 or wider.

    `call_scaled` is the method of `AbstractExperts`. `most` is a bound on the assignments that are
    not nobody's, if there is one."""
    operands = (call_scaled, tokens, indices, weights)
    call_scaled, tokens, indices, weights = varying_alike(operands)
    slots = indices.shape[-1]
    plan = plan_rows(indices.reshape(-1), num_experts)
    if most is not None and not is_symbolic_dim(plan.order.size):
        plan = plan._replace(order=plan.order[:most])  # nobody's rows are the last
    rows = apply_to_rows(call_scaled, matmul, tokens, weights, plan)
    return collect(rows, plan.order, plan.inverse, slots).astype(accumulation_dtype(tokens))

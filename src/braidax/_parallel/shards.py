"""Routing, and experts, on the mesh: two `jax.shard_map`s over the devices' parts of the tokens.

Routing is inside of one because the partitioner would gather the scores of all tokens for
`jax.lax.top_k`. Losses and loads are functions of the returned global `Routing`, outside.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._experts import AbstractExperts
from .._matmul import AbstractGroupedMatmul, GroupedMatmul
from .._mesh import placed_by_compiler, varying_alike
from .._router import (
    AbstractRouter,
    check_hidden_states,
    check_mask,
    checked_ids,
    checked_indices,
)
from .._routing import HiddenStates, InputIds, Mask, Routing
from .context import Context, context_of
from .exchange import AbstractExchange, Shard
from .layout import MeshLayout
from .local import local_experts
from .tokens import token_layout

# Assignments that a device computes at a time, as a multiple of the even share: a mild imbalance
# stays within one pass.
CHUNK = 1.25
_EVERYWHERE = PartitionSpec()

# Hidden states, ids, mask and indices, as a router takes them.
_Tokens = tuple[HiddenStates, InputIds | None, Mask | None, Array | None]


def route_on_shards(
    layout: MeshLayout,
    router: AbstractRouter,
    tokens: _Tokens,
    key: PRNGKeyArray | None,
) -> Routing:
    """The `Routing` of all tokens, each routed on the device that has it."""
    hidden_states, input_ids, mask, indices = tokens
    # Checked here, because inside the shapes are those of one device's part.
    check_hidden_states(router, hidden_states)
    batch = jnp.shape(hidden_states)[:-1]
    check_mask(mask, batch)
    if input_ids is not None:
        checked_ids(input_ids, batch)
    if indices is not None:
        checked_indices("indices", indices, batch)
    spread = token_layout(layout, jnp.asarray(hidden_states))
    tokens = jax.tree.map(spread.spread, (jnp.asarray(hidden_states), *tokens[1:]))
    arrays, static = eqx.partition(router, eqx.is_array)
    context = context_of(layout)

    def on_shard(tokens, arrays, key):
        (hidden_states, input_ids, mask, indices), arrays = varying_alike((tokens, arrays))
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(layout.tokens))
        options = {"mask": mask, "key": key, "indices": indices}
        routing = eqx.combine(arrays, static)(hidden_states, input_ids, **options)
        # A router may choose without looking at the tokens.
        routing, _ = varying_alike((routing, hidden_states))
        return routing.indices, routing.weights, routing.scores, routing.logits

    parts = PartitionSpec(layout.tokens)
    mapped = _mapped(context, on_shard, (parts, _EVERYWHERE, _EVERYWHERE), parts)
    chosen, *rest = map(spread.restore, mapped(tokens, context.reshard(arrays), key))

    def count(arrays, chosen, mask):
        return eqx.combine(arrays, static).count_dropped(chosen, mask)

    # Counted over all tokens: a device's part has padding, and not the whole share of an expert.
    dropped = placed_by_compiler(count, arrays, chosen, mask)
    return Routing(chosen, *rest, mask=mask, dropped=dropped)


def route_together(
    layout: MeshLayout,
    router: AbstractRouter,
    tokens: _Tokens,
    key: PRNGKeyArray | None,
) -> Routing:
    """The `Routing` of all tokens by a router that compares them: the compiler gathers what the
    comparison needs."""
    context_of(layout)  # raises the errors of a surrounding `jax.shard_map`
    arrays, static = eqx.partition(router, eqx.is_array)

    def together(arrays, hidden_states, input_ids, mask, indices, key):
        options = {"mask": mask, "key": key, "indices": indices}
        return eqx.combine(arrays, static)(hidden_states, input_ids, **options)

    return placed_by_compiler(together, arrays, jnp.asarray(tokens[0]), *tokens[1:], key)


def experts_on_shards(
    layout: MeshLayout,
    exchange: AbstractExchange | None,
    matmul: AbstractGroupedMatmul,
    experts: AbstractExperts,
    hidden_states: Float[Array, "*batch hidden"],
    routing: Routing,
) -> tuple[Float[Array, "*batch hidden"], Int[Array, ""]]:
    """The weighted sums of all tokens, and how many assignments the exchange dropped."""
    num_experts = routing.scores.shape[-1]
    spread = token_layout(layout, hidden_states)
    tokens = jax.tree.map(spread.spread, (hidden_states, routing.indices, routing.weights))
    live = spread.live()
    arrays, static = eqx.partition(experts, eqx.is_array)
    check_leading_axis(arrays, num_experts)
    arrays = _padded(arrays, -num_experts % layout.size)
    num_local = -(-num_experts // layout.size)
    context = context_of(layout)

    def on_shard(tokens, live, arrays):
        (hidden_states, indices, weights), arrays = varying_alike((tokens, arrays))
        # Nobody is past the padding of the experts here. The padding of tokens is nobody's too.
        somebody = indices < num_experts
        if live is not None:
            somebody &= live.reshape(-1, *[1] * (indices.ndim - 1))
        indices = jnp.where(somebody, indices, layout.size * num_local)
        slots = indices.shape[-1]

        def compute(rows, indices, weights):
            # Another device's NaN weight must not reach a row that is 0 here.
            weights = jnp.where(indices < num_local, weights, 0)
            combined = eqx.combine(arrays, static)
            sizes = {"num_experts": num_local, "chunk": math.ceil(CHUNK * somebody.size)}
            return local_experts(combined, GroupedMatmul(matmul), rows, indices, weights, **sizes)

        rows = (hidden_states.reshape(-1, hidden_states.shape[-1]),)
        rows += (indices.reshape(-1, slots), weights.reshape(-1, slots))
        if exchange is None or layout.axis is None:
            output, dropped = compute(*rows), None
        else:
            shard = Shard(layout.axis, layout.size, num_local, compute)
            output, dropped = exchange(shard, *rows)
        some = dropped is not None
        dropped = jax.lax.psum(dropped, layout.tokens) if some else jnp.zeros((), jnp.int32)
        return output.reshape(hidden_states.shape), dropped

    parts = PartitionSpec(layout.tokens)
    specs = (parts, parts, PartitionSpec(layout.axis)), (parts, _EVERYWHERE)
    mapped = _mapped(context, on_shard, *specs)
    output, dropped = mapped(tokens, live, context.reshard(arrays, layout.axis))
    return spread.restore(output), dropped


def check_leading_axis(experts: PyTree, num_experts: int, axis: int = 0) -> None:
    """All arrays of `experts` have the experts on `axis`, after stacked layers.

    **Raises:** `ValueError` otherwise."""
    for leaf in jax.tree.leaves(experts):
        if leaf.shape[axis : axis + 1] != (num_experts,):
            raise ValueError(
                f"`experts` must hold arrays that all start with the {num_experts} experts, after "
                f"{axis} axes of stacked layers. Got shape {leaf.shape}."
            )


def _mapped(context: Context, function, in_specs, out_specs):
    """`function` on every device's part."""
    if context.taken:
        # What is kept for the backward pass leaves the inner shard_map with a sharding over axes
        # of the outer one as well, which jax 0.10 does not lower: nothing is kept but the inputs.
        function = jax.checkpoint(function)
    return jax.shard_map(
        function,
        mesh=context.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=context.free,
    )


def _padded(experts: PyTree, count: int) -> PyTree:
    """`count` experts of zeros more, which nobody is routed to."""
    if not count:
        return experts

    def pad(leaf):
        return jnp.pad(leaf, ((0, count), *[(0, 0)] * (leaf.ndim - 1)))

    return jax.tree.map(pad, experts)

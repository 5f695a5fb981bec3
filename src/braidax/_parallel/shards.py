"""The four stages on a mesh: routing, dispatch, experts and combine inside one `jax.shard_map`.

Routing is inside because the partitioner would gather the scores of all tokens for
`jax.lax.top_k`. Losses and loads are functions of the returned global `Routing`, outside.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray, PyTree

from .._backends import find_backend
from .._checks import array_dtype
from .._moe import RoutedMoE
from .._router.base import check_hidden_states, check_mask
from .._routing import Routing, zero_masked
from .context import context_of
from .exchange import Shard
from .local import local_experts
from .tokens import layout_of

if TYPE_CHECKING:
    from .expert_parallel import ExpertParallel

# Assignments that a device computes at a time, as a multiple of the even share: a mild imbalance
# stays within one pass.
CHUNK = 1.25


class _Tokens(NamedTuple):
    """Everything with one entry for each token. `replay` is the `(indices, weights)` given."""

    hidden_states: Float[Array, "*batch hidden"]
    input_ids: Integer[Array, "*batch"] | None
    mask: Bool[Array, "*batch"] | None
    replay: tuple[Array, Array] | None


@eqx.filter_jit
def parallel_routed_sum(
    parallel: "ExpertParallel",
    block: RoutedMoE,
    hidden_states: Float[Array, "*batch hidden"],
    input_ids: Integer[Array, "*batch"] | None,
    mask: Bool[Array, "*batch"] | None,
    routing: Routing | None,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch hidden"], Routing]:
    """`routed_sum` of `_moe`, with the experts spread over the devices of a mesh axis.

    A replayed `routing` is in range and fits the hidden states: the block has checked it.
    """
    _check_tokens(block, hidden_states, input_ids, mask)
    layout = layout_of(parallel, hidden_states)
    given_mask = mask if routing is None else routing.mask
    replay = None if routing is None else (routing.indices, routing.weights)
    tokens = _Tokens(jnp.asarray(hidden_states), input_ids, given_mask, replay)
    tokens = jax.tree.map(layout.spread, tokens)
    live = layout.live()
    if live is not None:
        padded_mask = live if tokens.mask is None else live & tokens.mask
        tokens = tokens._replace(mask=padded_mask)
    output, (indices, weights, scores, logits), dropped = _on_shards(parallel, block, tokens, key)
    output = layout.restore(output)
    if routing is None:
        parts = [layout.restore(array) for array in (indices, weights, scores, logits)]
        routing = Routing(*parts, mask=given_mask, dropped=dropped)
    return output, eqx.tree_at(lambda r: r.dropped, routing, dropped)


def _check_tokens(block, hidden_states, input_ids, mask) -> None:
    """Here, because inside the shapes are those of one device's part."""
    check_hidden_states(block.router, hidden_states)
    batch = jnp.shape(hidden_states)[:-1]
    check_mask(mask, batch)
    if input_ids is None:
        return
    array_dtype("input_ids", input_ids)
    if jnp.shape(input_ids) != batch:
        raise ValueError(
            f"`input_ids` must have the shape of `hidden_states` without its last axis, {batch}. "
            f"Got {jnp.shape(input_ids)}."
        )


def _on_shards(parallel: "ExpertParallel", block: RoutedMoE, tokens: _Tokens, key):
    """`(output, the Routing's arrays, dropped)`, the first two spread over the token axes."""
    everywhere, spread = PartitionSpec(), PartitionSpec(parallel.tokens)
    others = tuple(name for name in parallel.tokens if name != parallel.axis)
    router, router_static = eqx.partition(block.router, eqx.is_array)
    experts, experts_static = eqx.partition(block.experts, eqx.is_array)
    experts = _padded(experts, -block.router.weight.shape[0] % parallel.size)
    context = context_of(parallel)
    router, experts = context.reshard(router), context.reshard(experts, parallel.axis)

    def one_shard(tokens, router, experts, key):
        # Weights are the same along these axes. Said here, so that the kernels' own derivatives
        # need not know; the transpose is the sum of the gradients.
        router = eqx.combine(_varying(router, parallel.tokens), router_static)
        experts = eqx.combine(_varying(experts, others), experts_static)
        if context.taken:
            router, experts = (_varying_like(tokens, tree) for tree in (router, experts))
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(parallel.tokens))
        return _one_shard(parallel, block.backend, router, experts, tokens, key)

    if context.taken:
        # What is kept for the backward pass leaves the inner shard_map with a sharding over axes
        # of the outer one as well, which jax 0.10 does not lower: nothing is kept but the inputs.
        mapped = jax.checkpoint(one_shard)
    else:
        mapped = one_shard
    in_specs = (spread, everywhere, PartitionSpec(parallel.axis), everywhere)
    return jax.shard_map(
        mapped,
        mesh=context.mesh,
        in_specs=in_specs,
        out_specs=(spread, spread, everywhere),
        axis_names=context.free,
    )(tokens, router, experts, key)


def _one_shard(parallel: "ExpertParallel", backend: str, router, experts, tokens: _Tokens, key):
    """The stages for the tokens of one device."""
    hidden_states, input_ids, mask, replay = tokens
    if replay is None:
        routing = router(hidden_states, input_ids, mask=mask, key=key)
        routed = (routing.indices, routing.weights, routing.scores, routing.logits)
        mask = routing.mask
    else:
        routed = (*replay, None, None)
    hidden, slots = hidden_states.shape[-1], routed[0].shape[-1]
    rows = zero_masked(hidden_states, mask).reshape(-1, hidden)
    weights = zero_masked(routed[1], mask).reshape(-1, slots)
    num_local = jax.tree.leaves(eqx.filter(experts, eqx.is_array))[0].shape[0]
    indices = routed[0]
    if mask is not None:
        indices = jnp.where(mask[..., None], indices, num_local * parallel.size)
    chunk = math.ceil(CHUNK * indices.size)

    def compute(rows, indices, weights):
        return local_experts(
            experts,
            find_backend(backend).grouped_matmul,
            rows,
            indices,
            # Another device's NaN weight must not reach a row that is 0 here.
            jnp.where(indices < num_local, weights, 0),
            num_experts=num_local,
            chunk=chunk,
        )

    shard = Shard(
        parallel.axis, parallel.size, parallel.tokens, num_local, parallel.capacity, compute
    )
    output, dropped = parallel.exchange(shard, rows, indices.reshape(-1, slots), weights)
    if dropped is None:
        dropped = jnp.zeros((), jnp.int32)
    else:
        dropped = jax.lax.psum(dropped, parallel.tokens)
    output = zero_masked(output.reshape(hidden_states.shape), mask)
    return output, routed, dropped


def _padded(experts: PyTree, count: int) -> PyTree:
    """`count` experts of zeros more, which nobody is routed to."""
    if not count:
        return experts

    def pad(leaf):
        return jnp.pad(leaf, ((0, count), *[(0, 0)] * (leaf.ndim - 1)))

    return jax.tree.map(pad, experts)


def _varying(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    if not axes:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), tree)


def _varying_like(tokens: _Tokens, tree: PyTree) -> PyTree:
    """`tree` also varies over the axes of a surrounding `shard_map` that tokens vary over, whether
    it did before or not: `pcast` would have to know."""

    def vary(leaf):
        return leaf + jax.lax.full_like(tokens.hidden_states, 0, leaf.dtype, ())

    numbers, rest = eqx.partition(tree, lambda leaf: eqx.is_array(leaf) and leaf.dtype != bool)
    return eqx.combine(jax.tree.map(vary, numbers), rest)

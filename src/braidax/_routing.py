"""`Routing`: the one noun that travels between the stages of a mixture-of-experts layer.

The axis names of all annotations are a closed vocabulary:
`batch tokens hidden experts experts_per_token intermediate vocab rows groups`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from ._checks import check, integer
from ._mesh import placed_by_compiler

_Result = TypeVar("_Result")

# The arrays that most stages take or return.
HiddenStates = Float[Array, "*batch hidden"]
InputIds = Integer[Array, "*batch"]
Mask = Bool[Array, "*batch"]
Scores = Float[Array, "*batch experts"]
Indices = Int[Array, "*batch experts_per_token"]
Weights = Float[Array, "*batch experts_per_token"]


class Routing(eqx.Module):
    """Which experts each token goes to, and with what weight.

    A router returns it, the block computes with it, and every loss, metric and bias update is a
    function of it.

    Under `jax.vmap` or `jax.lax.scan` all fields gain the mapped axis in front, whether it counts
    layers, micro-batches or examples. These axes are `stacked`, and nothing merges them unasked:
    loads, losses and capacities are those of each call of the router.

    An index equal to the number of experts is *nobody*: an assignment that does not exist. It has
    no row, weight 0, and is no load. All assignments of padding are to nobody, and so are those
    that a capacity leaves out.

    - `indices`: `(*batch, experts_per_token)` int32, the selected experts, each in `[0, experts)`,
      or `experts` for nobody.
    - `weights`: `(*batch, experts_per_token)` float32 combine weights, already normalized and
      scaled. NaN marks a token that could not be routed (an id outside the table, a NaN score).
    - `scores`: `(*batch, experts)` float32, before the selection bias.
    - `logits`: `(*batch, experts)` float32, of the gate, after the temperature.
    - `mask`: `(*batch,)` bool, `False` on padding: not counted, zero output, no gradient. `None`:
      no padding.
    - `dropped`: `(*stacked,)` int32, a scalar for one call of the router: the assignments of real
      tokens that were not computed. These are nobody's, and those that an exchange over a mesh had
      no room for.

    **Example:**

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> routing = router(jax.numpy.ones((4, 32)))
        >>> isinstance(routing, bx.Routing), routing.scores.shape, int(routing.dropped)
        (True, (4, 8), 0)
    """

    indices: Int[Array, "*batch experts_per_token"]
    weights: Float[Array, "*batch experts_per_token"]
    scores: Float[Array, "*batch experts"]
    logits: Float[Array, "*batch experts"]
    mask: Bool[Array, "*batch"] | None
    dropped: Int[Array, "*stacked"]

    @property
    def stacked(self) -> tuple[int, ...]:
        """The sizes of the axes in front that stacking made, `()` for one call of a router.

        **Example:** three examples of four tokens.

            >>> import braidax as bx, jax
            >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
            >>> routing = jax.vmap(router)(jax.numpy.ones((3, 4, 32)))
            >>> routing.stacked, routing.indices.shape
            ((3,), (3, 4, 2))
        """
        # A call counts its drops in one number, so each axis of the counts is an axis of calls.
        return tuple(jnp.shape(self.dropped))


def of_each_call(function: Callable[[Routing], _Result]) -> Callable[[Routing], _Result]:
    """A `function` from one call's routing to small arrays, for stacked routings and any mesh.

    The result has the stacked axes in front. A call compiles once, also outside of `jax.jit`.
    """

    @jax.jit
    def reduced(routing: Routing) -> _Result:
        return placed_by_compiler(_mapped(function, routing), routing)

    @functools.wraps(function)
    def checked(routing: Routing) -> _Result:
        return reduced(check_routing(routing))

    return checked


def check_routing(routing: Any) -> Routing:
    """`routing`, if it is a `Routing`."""
    if not isinstance(routing, Routing):
        raise TypeError(
            "`routing` must be a Routing, the second of the two that a block returns. "
            f"Got a {type(routing).__name__}."
        )
    return routing


def _mapped(function: Callable[..., _Result], routing: Routing) -> Callable[..., _Result]:
    """`function`, mapped over the stacked axes of `routing`."""
    for _ in routing.stacked:
        function = jax.vmap(function)
    return function


def without_masked(indices: Indices, mask: Mask | None, num_experts: int) -> Indices:
    """`indices` with those of padding nobody's: what a mask means to everything but a gate."""
    return indices if mask is None else jnp.where(mask[..., None], indices, num_experts)


def count_nobody(indices: Indices, mask: Mask | None, num_experts: int) -> Int[Array, ""]:
    """The assignments of real tokens to nobody."""
    nobody = indices == num_experts
    return jnp.sum(nobody if mask is None else nobody & mask[..., None], dtype=jnp.int32)


def without_identity(
    routing: Routing, num_identity: int
) -> tuple[Routing, Bool[Array, "*batch experts_per_token"]]:
    """`routing` over the experts that compute, and which assignments are to those that do not.

    The last `num_identity` experts hand a token on as it is. Their assignments need no row, so they
    become nobody's."""
    num_experts = routing.scores.shape[-1] - num_identity
    identity = (routing.indices >= num_experts) & (routing.indices < num_experts + num_identity)
    computing = Routing(
        jnp.minimum(routing.indices, num_experts),
        jnp.where(identity, 0, routing.weights),
        routing.scores[..., :num_experts],
        routing.logits[..., :num_experts],
        routing.mask,
        routing.dropped,
    )
    return computing, identity


def zero_masked(
    array: Float[Array, "*batch size"], mask: Mask | None
) -> Float[Array, "*batch size"]:
    """Rows whose mask is `False` become 0, whatever they held."""
    # A select, not a product: 0 * NaN is NaN, forward and backward.
    return array if mask is None else jnp.where(mask[..., None], array, 0)


def undefined_where(
    undefined: Bool[Array, "*batch _"], array: Float[Array, "*batch size"]
) -> Float[Array, "*batch size"]:
    """`array`, with NaN where `undefined`. The derivative there is 0.

    NaN is made of 0 / 0: `jax_debug_nans` reports a constant NaN although nothing takes it."""
    divisor = jnp.where(undefined, 0, jnp.ones_like(array))
    return jnp.where(undefined, 0, array) / divisor


def over_capacity(
    routing: Routing, capacity: int, *, by: Literal["position", "weight"] = "position"
) -> Routing:
    """`routing` with at most `capacity` assignments for each expert; all others are nobody's.

    `by` says which assignments an expert keeps. By `"position"` tokens earlier in the batch win,
    and for one token the earlier slots. By `"weight"` the highest weights win, of equal ones the
    earlier, and NaN comes last. Padding takes no room. Weights are not normalized again. `dropped`
    counts what was left out. All batch axes are one batch, and stacked routings have the capacity
    each.

    **Raises:** `ValueError` or `TypeError` unless `capacity` is an integer of at least 0, and for a
    `routing` or a `by` that is none.

    **Source:** the capacity of Switch Transformers (arXiv:2101.03961), section 2.2. By weight it is
    that of Batch Prioritized Routing (arXiv:2106.05974), for each expert.

    **Example:** three tokens that choose the same two experts, with room for two.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> routing = bx.over_capacity(router(jax.numpy.ones((3, 32))), capacity=2)
        >>> int(routing.dropped), routing.indices[2].tolist()
        (2, [8, 8])
    """
    capacity = integer("capacity", capacity, 0)
    check(by in ("position", "weight"), "by", "be 'position' or 'weight'", f"{by!r:.60}")
    num_experts = check_routing(routing).scores.shape[-1]
    indices = without_masked(routing.indices, routing.mask, num_experts)
    # What ranks the assignments of an expert. NaN is sorted to the end.
    first = (-jax.lax.stop_gradient(routing.weights),) if by == "weight" else ()
    place = placed_by_compiler(_mapped(_places, routing), indices, *first, like=indices)
    left_out = (place >= capacity) & (indices < num_experts)
    indices = jnp.where(left_out, num_experts, indices)
    weights = jnp.where(left_out, 0, routing.weights)
    batch = tuple(range(len(routing.stacked), left_out.ndim))
    dropped = routing.dropped + jnp.sum(left_out, axis=batch, dtype=jnp.int32)
    return Routing(indices, weights, routing.scores, routing.logits, routing.mask, dropped)


def _places(indices: Indices, *first: Weights) -> Indices:
    """How many assignments of its expert come before each assignment: the lowest `first`, or the
    first positions."""
    keys = tuple(key.reshape(-1) for key in (indices, *first))
    position = jnp.arange(indices.size, dtype=jnp.int32)
    ordered, *_, order = jax.lax.sort((*keys, position), num_keys=len(keys), is_stable=True)
    start = jax.lax.cummax(jnp.where(ordered == jnp.roll(ordered, 1), 0, position))
    place = jnp.zeros_like(position).at[order].set(position - start, unique_indices=True)
    return place.reshape(indices.shape)

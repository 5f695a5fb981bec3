"""The block: four stages, nothing backwards.

    hidden_states, input_ids -> router -> Routing -> dispatch -> experts -> combine -> output

The `Routing` is returned beside the output. Losses, metrics and the bias update are functions of
it, outside of the layer.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Integer, PRNGKeyArray

from ._checks import boolean, integer, same_sizes
from ._config import MoEConfig
from ._dispatch import AbstractDispatch, SortedDispatch
from ._experts import AbstractExperts, Experts, FeedForward, activations
from ._replay import replayed
from ._router import AbstractRouter, TopKRouter, router_from_config
from ._routing import Routing, zero_masked

_SORTED = SortedDispatch()


class RoutedMoE(eqx.Module):
    """Routed experts: each token is computed by the few experts its router chose.

    `block(hidden_states, input_ids)` takes a token, a sequence or a batch, `(*batch, hidden)`,
    and returns `(output, routing)`. Native leading axes are the fast path; `jax.vmap(block)`
    gives the same answer and composes with `jax.grad` either way round. A call compiles once, also
    outside of `jax.jit`. **Source:** DeepSeek-V4 (arXiv:2606.19348), section 2.1.

    **Example:**

        >>> import braidax as bx, jax
        >>> block = bx.RoutedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> output, routing = block(jax.numpy.ones((4, 32)))
        >>> output.shape, routing.indices.shape
        ((4, 32), (4, 2))
    """

    router: AbstractRouter
    experts: AbstractExperts
    dispatch: AbstractDispatch
    checks: bool = eqx.field(static=True)

    def __init__(
        self,
        router: AbstractRouter,
        experts: AbstractExperts,
        *,
        dispatch: AbstractDispatch = _SORTED,
        checks: bool = False,
    ):
        """**Arguments:**

        - `router`: an `AbstractRouter`.
        - `experts`: an `Experts`, or any other `AbstractExperts`.
        - `dispatch`: how tokens meet experts: `SortedDispatch()`, `DenseDispatch()`, an
            `ExpertParallel`, or any other `AbstractDispatch`.
        - `checks`: raise at run time, by `eqx.error_if`, for a token that has no defined answer:
            an id outside the table of a `HashRouter`, a replayed index of no expert, or a score of
            NaN. Without it, the default and what `jax.export` needs, that token gets NaN and no
            other token changes. Must be `False` over a mesh.

        **Raises:** `ValueError` or `TypeError` naming the argument, for sizes that differ too.
        """
        if isinstance(experts, Experts):
            # The last axes: layers may be stacked in front.
            *_, num_experts, _, _, hidden = experts.gate_up.shape
            wanted = router.gate.weight.shape[-2:]
            same_sizes(
                "experts", (num_experts, hidden), wanted, "the (experts, hidden) of `router`"
            )
        if not isinstance(dispatch, AbstractDispatch):
            raise TypeError(
                "`dispatch` must be an `AbstractDispatch`, as `SortedDispatch()`. "
                f"Got {dispatch!r:.60}."
            )
        self.router = router
        self.experts = experts
        self.dispatch = dispatch
        self.checks = boolean("checks", checks)

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        layer_idx: int,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "RoutedMoE":
        """The routed experts of layer `layer_idx` of `config`.

        The first `config.num_hash_layers` are hash-routed, by an MD5 table salted with the layer
        index, and all others by top-k. Weights are of `dtype`, by default JAX's own, drawn with
        `key`. Layers stacked for `jax.lax.scan` are made by `eqx.filter_vmap` over keys.

        **Raises:** `TypeError` or `ValueError` for a traced or negative `layer_idx`, a `dtype`, and
        numbers of `config` that are out of range.
        """
        router_key, experts_key = jax.random.split(key)
        experts = Experts(
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            activation=activations.swiglu(config.swiglu_limit),
            dtype=dtype,
            key=experts_key,
        )
        return cls(router_from_config(config, layer_idx, dtype=dtype, key=router_key), experts)

    @eqx.filter_jit
    def __call__(
        self,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None = None,
        *,
        mask: Bool[Array, "*batch"] | None = None,
        routing: Routing | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], Routing]:
        """Route, dispatch, compute, combine.

        **Arguments:**

        - `hidden_states`: `(*batch, hidden)`, floating point.
        - `input_ids`: `(*batch,)` token ids, required by a `HashRouter`, ignored by a
            `TopKRouter`.
        - `mask`: `(*batch,)` bool, `False` on padding: zero output, no gradient, not counted.
        - `routing`: replay this assignment, its mask included, instead of routing. A token with
            an index that is neither an expert nor nobody gets NaN, as one with an unknown id does.
        - `key`: handed to the router's `select`.

        **Returns:** the output, in the shape and dtype of `hidden_states`, and the `Routing`.

        **Raises:** `ValueError` or `TypeError` at trace time for wrong shapes and dtypes.
        """
        output, routing = _routed_sum(self, hidden_states, input_ids, mask, routing, key)
        return output.astype(hidden_states.dtype), routing


class RoutedAndSharedMoE(eqx.Module):
    """Routed experts plus a shared expert that every token passes: DeepSeek's MoE layer.

    The shared output is added unscaled, in float32, and the sum is rounded once. **Source:**
    DeepSeek-V4 (arXiv:2606.19348), section 2.1.

    **Example:**

        >>> import braidax as bx, jax
        >>> block = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 0, key=jax.random.key(0))
        >>> output, routing = block(jax.numpy.ones((4, 32)), jax.numpy.arange(4))  # hashed
        >>> bool((routing.indices == block.routed.router.table[:4]).all())
        True
    """

    routed: RoutedMoE
    shared: FeedForward

    def __init__(self, routed: RoutedMoE, shared: FeedForward):
        """**Arguments:**

        - `routed`: a `RoutedMoE`.
        - `shared`: a `FeedForward`, or any module from `(*batch, hidden)` to `(*batch, hidden)`.

        **Raises:** `ValueError` if the hidden sizes differ.
        """
        if isinstance(shared, FeedForward):
            sizes, wanted = shared.gate_up.shape[-1:], routed.router.gate.weight.shape[-1:]
            same_sizes("shared", sizes, wanted, "the (hidden,) of `routed`")
        self.routed = routed
        self.shared = shared

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        layer_idx: int,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "RoutedAndSharedMoE":
        """As `RoutedMoE.from_config`, with the shared expert; several are one wider network.

        **Raises:** as that, and `ValueError` if the configuration has no shared expert.
        """
        if config.num_shared_experts < 1:
            raise ValueError(
                "`config.num_shared_experts` must be at least 1. "
                f"Got {config.num_shared_experts}: use `RoutedMoE`."
            )
        routed_key, shared_key = jax.random.split(key)
        shared = FeedForward(
            config.hidden_size,
            config.num_shared_experts * config.intermediate_size,
            activation=activations.swiglu(config.shared_swiglu_limit),
            dtype=dtype,
            key=shared_key,
        )
        return cls(RoutedMoE.from_config(config, layer_idx, dtype=dtype, key=routed_key), shared)

    @eqx.filter_jit
    def __call__(
        self,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None = None,
        *,
        mask: Bool[Array, "*batch"] | None = None,
        routing: Routing | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], Routing]:
        """As `RoutedMoE.__call__`, with the shared expert's output added."""
        output, routing = _routed_sum(self.routed, hidden_states, input_ids, mask, routing, key)
        shared = self.shared(zero_masked(hidden_states, routing.mask))
        output = output + zero_masked(shared, routing.mask).astype(output.dtype)
        return output.astype(hidden_states.dtype), routing


def _routed_sum(
    block: RoutedMoE,
    hidden_states: Float[Array, "*batch hidden"],
    input_ids: Integer[Array, "*batch"] | None,
    mask: Bool[Array, "*batch"] | None,
    routing: Routing | None,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch hidden"], Routing]:
    """The four stages, up to the float32 (or wider) sum over experts, not yet rounded."""
    if routing is None:
        route = block.dispatch.route
        routing = route(block.router, hidden_states, input_ids, mask=mask, key=key)
    else:
        routing = replayed(block.router, hidden_states, mask, routing)
    if block.checks:
        routing = block.dispatch.checked(routing)
    output, dropped = block.dispatch(block.experts, jnp.asarray(hidden_states), routing)
    return output, eqx.tree_at(lambda r: r.dropped, routing, routing.dropped + dropped)


def top_k_moe(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    num_shared_experts: int = 0,
    dispatch: AbstractDispatch = _SORTED,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> RoutedMoE | RoutedAndSharedMoE:
    """A top-k routed layer of SwiGLU experts in one line: the common case.

    **Arguments:**

    - `hidden_size`, `intermediate_size`: features of a token, and inside one expert.
    - `num_experts`, `num_experts_per_token`: routed experts, and how many each token goes to.
    - `num_shared_experts`: experts that every token passes; several are one wider network.
    - `dispatch`: as for `RoutedMoE`.
    - `dtype`: of the weights; by default JAX's own.
    - `key`: for the weights.

    **Returns:** a `RoutedMoE`, or a `RoutedAndSharedMoE` if there are shared experts.

    **Raises:** `ValueError` or `TypeError` naming the argument.

    **Example:**

        >>> import braidax as bx, jax
        >>> block = bx.top_k_moe(32, 16, 8, 2, num_shared_experts=1, key=jax.random.key(0))
        >>> output, routing = block(jax.numpy.ones((4, 32)))
    """
    shared = integer("num_shared_experts", num_shared_experts, 0)
    routed_key, shared_key = jax.random.split(key)
    router_key, experts_key = jax.random.split(routed_key)
    sizes = (hidden_size, num_experts, num_experts_per_token)
    routed = RoutedMoE(
        TopKRouter(*sizes, dtype=dtype, key=router_key),
        Experts(num_experts, hidden_size, intermediate_size, dtype=dtype, key=experts_key),
        dispatch=dispatch,
    )
    if not shared:
        return routed
    width = shared * intermediate_size
    return RoutedAndSharedMoE(routed, FeedForward(hidden_size, width, dtype=dtype, key=shared_key))

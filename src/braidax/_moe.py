"""The block: four stages, nothing backwards.

    hidden_states, input_ids -> router -> Routing -> dispatch -> experts -> combine -> output

The `Routing` is returned beside the output; losses, metrics and the bias update are functions of
it, outside the layer.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Integer, PRNGKeyArray

from ._backends import check_backend, find_backend
from ._checks import boolean, same_sizes
from ._config import MoEConfig
from ._experts import AbstractExperts, SwiGLU, SwiGLUExperts
from ._experts.grouped_matmul import accumulation_dtype
from ._replay import check_replay, within_range
from ._router import AbstractRouter, router_from_config
from ._routing import Routing, zero_masked


class RoutedMoE(eqx.Module):
    """Routed experts: each token is computed by the few experts its router chose.

    `block(hidden_states, input_ids)` takes a token, a sequence or a batch, `(*batch, hidden)`,
    and returns `(output, routing)`. Native leading axes are the fast path; `jax.vmap(block)`
    gives the same answer and composes with `jax.grad` either way round. **Source:** DeepSeek-V4
    (arXiv:2606.19348), section 2.1.

    **Example:**

        >>> import braidax as bx, jax
        >>> block = bx.RoutedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> output, routing = block(jax.numpy.ones((4, 32)))
        >>> output.shape, routing.indices.shape
        ((4, 32), (4, 2))
    """

    router: AbstractRouter
    experts: AbstractExperts
    backend: str = eqx.field(static=True)
    checks: bool = eqx.field(static=True)
    remat: bool = eqx.field(static=True)
    parallel: Any = eqx.field(static=True)

    def __init__(
        self,
        router: AbstractRouter,
        experts: AbstractExperts,
        *,
        backend: str = "auto",
        checks: bool = False,
        remat: bool = False,
    ):
        """**Arguments:**

        - `router`: an `AbstractRouter`.
        - `experts`: a `SwiGLUExperts`, or any other `AbstractExperts`.
        - `backend`: `"auto"` (by platform), `"blocks"`, `"ragged"`, `"tokamax"` (needs
            `braidax[kernels]`), or `"dense"`, in which every expert computes every token: slow,
            but differentiable in forward mode too.
        - `checks`: raise at run time, by `eqx.error_if`, for an id outside the table of a
            `HashRouter` and for a replayed index of no expert. Without it, the default and what
            `jax.export` needs, that token gets NaN and no other token changes.
        - `remat`: do not keep the experts' pre-activations, `(rows, 2 * intermediate)` float32 in
            each layer, for the backward pass: it computes them again. Same numbers, more time;
            less memory for layers in a `jax.lax.scan`. Unrolled layers on a CPU gain nothing, and
            a block spread by `ExpertParallel` (its field `parallel`) always recomputes.

        **Raises:** `ValueError` or `TypeError` naming the argument, for sizes that differ too.
        """
        if isinstance(experts, SwiGLUExperts):
            # The last axes: layers may be stacked in front.
            sizes, wanted = experts.gate_up.shape[-3::2], router.weight.shape[-2:]
            same_sizes("experts", sizes, wanted, "the (experts, hidden) of `router`")
        self.router = router
        self.experts = experts
        self.backend = check_backend(backend)
        self.checks = boolean("checks", checks)
        self.remat = boolean("remat", remat)
        self.parallel = None  # Set by `ExpertParallel.shard`.

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        layer_idx: int,
        *,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ) -> "RoutedMoE":
        """The routed experts of layer `layer_idx`: hash-routed if it is one of the first
        `config.num_hash_layers`, by an MD5 table salted with the layer index; top-k otherwise.
        Weights are of `dtype`, drawn with `key`.

        **Raises:** `TypeError` or `ValueError` for a traced or negative `layer_idx` and a `dtype`.
        """
        router_key, experts_key = jax.random.split(key)
        experts = SwiGLUExperts(
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            limit=config.swiglu_limit,
            dtype=dtype,
            key=experts_key,
        )
        return cls(router_from_config(config, layer_idx, dtype=dtype, key=router_key), experts)

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
            an index outside of the experts gets NaN, as one with an unknown id does.
        - `key`: handed to the router, which ignores it.

        **Returns:** the output, in the shape and dtype of `hidden_states`, and the `Routing`.

        **Raises:** `ValueError` or `TypeError` at trace time for wrong shapes and dtypes.
        """
        output, routing = routed_sum(self, hidden_states, input_ids, mask, routing, key)
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
    shared: SwiGLU

    def __init__(self, routed: RoutedMoE, shared: SwiGLU):
        """**Arguments:**

        - `routed`: a `RoutedMoE`.
        - `shared`: a `SwiGLU`, or any module from `(*batch, hidden)` to `(*batch, hidden)`.

        **Raises:** `ValueError` if the hidden sizes differ.
        """
        if isinstance(shared, SwiGLU):
            sizes, wanted = shared.gate_up.shape[-1:], routed.router.weight.shape[-1:]
            same_sizes("shared", sizes, wanted, "the (hidden,) of `routed`")
        self.routed = routed
        self.shared = shared

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        layer_idx: int,
        *,
        dtype: DTypeLike = jnp.float32,
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
        shared = SwiGLU(
            config.hidden_size,
            config.num_shared_experts * config.intermediate_size,
            limit=config.shared_swiglu_limit,
            dtype=dtype,
            key=shared_key,
        )
        return cls(RoutedMoE.from_config(config, layer_idx, dtype=dtype, key=routed_key), shared)

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
        output, routing = routed_sum(self.routed, hidden_states, input_ids, mask, routing, key)
        shared = self.shared(zero_masked(hidden_states, routing.mask))
        output = zero_masked(output + shared.astype(output.dtype), routing.mask)
        return output.astype(hidden_states.dtype), routing


def routed_sum(
    block: RoutedMoE,
    hidden_states: Float[Array, "*batch hidden"],
    input_ids: Integer[Array, "*batch"] | None,
    mask: Bool[Array, "*batch"] | None,
    routing: Routing | None,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch hidden"], Routing]:
    """The four stages, up to the float32 (or wider) sum over experts, not yet rounded."""
    if routing is not None:
        check_replay(block.router, hidden_states, mask, routing)
        routing = within_range(routing, checks=block.checks)
    if block.parallel is not None:
        return block.parallel.routed_sum(block, hidden_states, input_ids, mask, routing, key)
    if routing is None:
        routing = block.router(hidden_states, input_ids, mask=mask, key=key)
        if block.checks:
            weights = block.router.checked_weights(routing.weights, input_ids, mask)
            routing = eqx.tree_at(lambda routing: routing.weights, routing, weights)
    batch, hidden = hidden_states.shape[:-1], hidden_states.shape[-1]
    tokens = zero_masked(jnp.asarray(hidden_states), routing.mask).reshape(-1, hidden)
    flat_mask = None if routing.mask is None else routing.mask.reshape(-1)
    indices = routing.indices.reshape(-1, routing.indices.shape[-1])
    weights = zero_masked(routing.weights, routing.mask).reshape(indices.shape)

    backend = find_backend(block.backend)
    dispatch = backend.dispatch(indices, flat_mask, routing.scores.shape[-1])
    rows = dispatch.gather(tokens)
    experts = eqx.filter_checkpoint(block.experts) if block.remat else block.experts
    rows = experts(rows, dispatch.group_sizes, backend.grouped_matmul)
    output = dispatch.combine(rows, weights).astype(accumulation_dtype(hidden_states))
    # Masked here as well: nothing that comes back through a padded row may reach an expert.
    return zero_masked(output.reshape(*batch, hidden), routing.mask), routing

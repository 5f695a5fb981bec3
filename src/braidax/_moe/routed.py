"""The block: four stages, nothing backwards.

    hidden_states, input_ids -> router -> Routing -> dispatch -> experts -> combine -> output

The `Routing` is returned beside the output. Losses, metrics and the bias update are functions of
it, outside of the layer.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer, PRNGKeyArray

from .._checks import boolean, check, integer, same_sizes
from .._compiled import compiled
from .._config import MoEConfig, activation
from .._dispatch import AbstractDispatch, SortedDispatch
from .._experts import AbstractExperts, Experts
from .._replay import replayed
from .._router import AbstractRouter, router_from_config
from .._routing import Routing, without_identity, zero_masked
from .latent import LatentProjection, project

_SORTED = SortedDispatch()
_OUTPUTS_ONLY = (
    "be False: weights multiply the experts' outputs here, not their inputs. The page "
    "docs/guide/families.md shows a dispatch for Llama-4, and how to open its layers"
)


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
    latent: LatentProjection | None
    num_identity_experts: int = eqx.field(static=True)
    checks: bool = eqx.field(static=True)

    def __init__(
        self,
        router: AbstractRouter,
        experts: AbstractExperts,
        *,
        dispatch: AbstractDispatch = _SORTED,
        latent: LatentProjection | None = None,
        num_identity_experts: int = 0,
        checks: bool = False,
    ):
        """**Arguments:**

        - `router`: an `AbstractRouter`.
        - `experts`: an `Experts`, or any other `AbstractExperts`.
        - `dispatch`: how tokens meet experts: `SortedDispatch()`, `DenseDispatch()`, an
            `ExpertParallel`, or any other `AbstractDispatch`.
        - `latent`: projects tokens for narrower experts, and their sum back (Nemotron-3).
        - `num_identity_experts`: the last so many experts of the router hand a token on as it is,
            times its weight (LongCat-Flash). `experts` holds all others.
        - `checks`: raise at run time, by `eqx.error_if`, for a token that has no defined answer:
            an id outside the table of a `HashRouter`, a replayed index of no expert, or a score of
            NaN. Without it, the default and what `jax.export` needs, that token gets NaN and no
            other token changes. Must be `False` over a mesh.

        **Raises:** `ValueError` or `TypeError` naming the argument, for sizes that differ too.
        """
        num_identity = integer("num_identity_experts", num_identity_experts, 0)
        _check_sizes(router, experts, latent, num_identity)
        if not isinstance(dispatch, AbstractDispatch):
            raise TypeError(
                "`dispatch` must be an `AbstractDispatch`, as `SortedDispatch()`. "
                f"Got {dispatch!r:.60}."
            )
        self.router = router
        self.experts = experts
        self.dispatch = dispatch
        self.latent = latent
        self.num_identity_experts = num_identity
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
        check(not config.weighted_input, "weighted_input", _OUTPUTS_ONLY, config.weighted_input)
        router_key, experts_key, latent_key = jax.random.split(key, 3)
        # The router first: it finds most mistakes, and the experts take gigabytes.
        router = router_from_config(config, layer_idx, dtype=dtype, key=router_key)
        latent_size, latent = config.latent_size, None
        if latent_size is not None:
            latent = LatentProjection(config.hidden_size, latent_size, dtype=dtype, key=latent_key)
        experts = Experts(
            config.num_experts,
            config.hidden_size if latent_size is None else latent_size,
            config.intermediate_size,
            activation=activation(config.activation, config.swiglu_limit),
            use_bias=config.use_expert_bias,
            dtype=dtype,
            key=experts_key,
        )
        identity = config.num_identity_experts
        return cls(router, experts, latent=latent, num_identity_experts=identity)

    @compiled
    def __call__(
        self,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None = None,
        *,
        mask: Bool[Array, "*batch"] | None = None,
        routing: Routing | None = None,
        indices: Integer[Array, "*batch experts_per_token"] | None = None,
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
        - `indices`: `(*batch, experts_per_token)` integers: replay this choice of experts, and
            compute its weights anew, so that the gate has its gradient. As for a router.
        - `key`: handed to the router's `select`.

        **Returns:** the output, in the shape and dtype of `hidden_states`, and the `Routing`.

        **Raises:** `ValueError` or `TypeError` at trace time for wrong shapes and dtypes.
        """
        options = {"mask": mask, "routing": routing, "indices": indices, "key": key}
        output, routing = routed_sum(self, hidden_states, input_ids, **options)
        return output.astype(hidden_states.dtype), routing


def have_shapes(*leaves: Any) -> bool:
    return all(hasattr(leaf, "shape") for leaf in leaves)


def routed_sum(
    block: RoutedMoE,
    hidden_states: Float[Array, "*batch hidden"],
    input_ids: Integer[Array, "*batch"] | None,
    *,
    mask: Bool[Array, "*batch"] | None,
    routing: Routing | None,
    indices: Integer[Array, "*batch experts_per_token"] | None,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch hidden"], Routing]:
    """The four stages, up to the float32 (or wider) sum over experts, not yet rounded."""
    if routing is None:
        options = {"mask": mask, "key": key, "indices": indices}
        routing = block.dispatch.route(block.router, hidden_states, input_ids, **options)
    else:
        if indices is not None:
            raise ValueError("`indices` must be None when `routing` is given. Got both.")
        routing = replayed(block.router, hidden_states, mask, routing)
    if block.checks:
        routing = block.dispatch.checked(routing)
    output, dropped = _experts_sum(block, jnp.asarray(hidden_states), routing)
    return output, eqx.tree_at(lambda r: r.dropped, routing, routing.dropped + dropped)


def _experts_sum(
    block: RoutedMoE, hidden_states: Float[Array, "*batch hidden"], routing: Routing
) -> tuple[Float[Array, "*batch hidden"], Int[Array, ""]]:
    """The dispatch, inside of a projection, beside the experts that hand a token on as it is."""
    if block.num_identity_experts:
        computing, identity = without_identity(routing, block.num_identity_experts)
    else:
        computing, identity = routing, None
    if block.latent is None:
        output, dropped = block.dispatch(block.experts, hidden_states, computing)
    else:
        rows = project(zero_masked(hidden_states, routing.mask), block.latent.down)
        rows = rows.astype(hidden_states.dtype)
        output, dropped = block.dispatch(block.experts, rows, computing)
        output = project(output, block.latent.up)
    if identity is not None:
        kept = jnp.where(identity, routing.weights, 0).sum(axis=-1, keepdims=True)
        # Tokens that no such expert has may hold anything: a select, because 0 * NaN is NaN.
        tokens = jnp.where(identity.any(axis=-1, keepdims=True), hidden_states, 0)
        output = output + (kept * tokens).astype(output.dtype)
    return output, dropped


def _check_sizes(
    router: AbstractRouter,
    experts: AbstractExperts,
    latent: LatentProjection | None,
    num_identity: int,
) -> None:
    """Half of a partitioned block has no shapes. Layers may be stacked in front of all axes."""
    weight: Any = getattr(router.gate, "weight", None)
    if not have_shapes(weight):
        return
    num_experts, width = weight.shape[-2:]
    if latent is not None and have_shapes(latent.down):
        same_sizes("latent", latent.down.shape[-1:], (width,), "the (hidden,) of `router`")
        width = latent.down.shape[-2]
    if isinstance(experts, Experts) and have_shapes(experts.gate_up):
        *_, own, _, _, own_width = experts.gate_up.shape
        wanted = (num_experts - num_identity, width)
        same_sizes("experts", (own, own_width), wanted, "the (experts, hidden) of `router`")

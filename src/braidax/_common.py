"""The layer that most people want, in one line."""

from typing import Any, Unpack

import jax
from jaxtyping import PRNGKeyArray

from ._checks import integer
from ._dispatch import AbstractDispatch, SortedDispatch
from ._experts import Experts, FeedForward, activations
from ._matmul import Activation
from ._moe import RoutedAndSharedMoE, RoutedMoE
from ._router import GateOptions, TopKRouter

_SWIGLU, _SORTED = activations.swiglu(), SortedDispatch()


def top_k_moe(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    num_shared_experts: int = 0,
    activation: Activation = _SWIGLU,
    dispatch: AbstractDispatch = _SORTED,
    key: PRNGKeyArray,
    **gate_options: Unpack[GateOptions],
) -> RoutedMoE | RoutedAndSharedMoE:
    """A top-k routed layer: a `RoutedMoE`, or a `RoutedAndSharedMoE` if it has shared experts.

    **Arguments:**

    - `hidden_size`, `intermediate_size`: features of a token, and inside one expert.
    - `num_experts`, `num_experts_per_token`: routed experts, and how many each token goes to.
    - `num_shared_experts`: experts that every token passes; several are one wider network.
    - `activation`: of all experts, as for `Experts`.
    - `dispatch`: as for `RoutedMoE`.
    - `key` and the `gate_options`, which are `score_function`, `normalize`, `scaling_factor`,
        `temperature`, `use_bias` and `dtype`: as for `Gate`. The experts have this `dtype` too.

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
    router = TopKRouter(*sizes, key=router_key, **gate_options)
    alike: Any = {"activation": activation, "dtype": gate_options.get("dtype")}
    experts = Experts(num_experts, hidden_size, intermediate_size, key=experts_key, **alike)
    routed = RoutedMoE(router, experts, dispatch=dispatch)
    if not shared:
        return routed
    every = FeedForward(hidden_size, shared * intermediate_size, key=shared_key, **alike)
    return RoutedAndSharedMoE(routed, every)

"""From a trained dense network to a mixture that starts where it was."""

import math
from typing import Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ._checks import check
from ._dispatch import AbstractDispatch, SortedDispatch
from ._experts import Experts, FeedForward
from ._moe import RoutedMoE
from ._router import GateOptions, TopKRouter

_SORTED = SortedDispatch()


def upcycle(
    feed_forward: FeedForward,
    num_experts: int,
    num_experts_per_token: int,
    *,
    noise: float | int = 0.0,
    dispatch: AbstractDispatch = _SORTED,
    key: PRNGKeyArray,
    **gate_options: Unpack[GateOptions],
) -> RoutedMoE:
    """A mixture of copies of `feed_forward`, with its output: the weights of a token sum to 1.

    **Arguments:**

    - `feed_forward`: a trained `FeedForward`, of any activation, with or without biases.
    - `num_experts`, `num_experts_per_token`: copies, and how many of them each token goes to.
    - `noise`: each copy's matrices are multiplied by `1 + noise * N(0, 1)`. Without noise all
        copies are equal, and learn to differ by the tokens they get alone.
    - `dispatch`: as for `RoutedMoE`.
    - `key` and the `gate_options`: as for `Gate`; weights must be normalized and not scaled.

    **Raises:** `ValueError` or `TypeError` naming the argument.

    **Source:** sparse upcycling (arXiv:2212.05055).

    **Example:**

        >>> import braidax as bx, jax
        >>> dense = bx.FeedForward(32, 64, key=jax.random.key(0))
        >>> block = bx.upcycle(dense, 8, 2, key=jax.random.key(1))
        >>> hidden_states = jax.random.normal(jax.random.key(2), (4, 32))
        >>> bool(jax.numpy.allclose(block(hidden_states)[0], dense(hidden_states), atol=1e-6))
        True
    """
    if not isinstance(feed_forward, FeedForward):
        kind = type(feed_forward).__name__
        raise TypeError(f"`feed_forward` must be a `FeedForward`. Got {kind}.")
    check(gate_options.get("normalize", True), "normalize", "be True", False)
    scaling = gate_options.get("scaling_factor", 1.0)
    check(scaling == 1, "scaling_factor", "be 1, for the output of the dense network", scaling)
    if isinstance(noise, bool) or not isinstance(noise, int | float):
        raise TypeError(f"`noise` must be a number. Got {noise!r:.60}.")
    check(0 <= noise < math.inf, "noise", "be finite and at least 0", noise)
    gate_options.setdefault("dtype", feed_forward.down.dtype)
    router_key, experts_key = jax.random.split(key)
    sizes = (feed_forward.down.shape[-1], num_experts, num_experts_per_token)
    router = TopKRouter(*sizes, key=router_key, **gate_options)
    return RoutedMoE(
        router, _copies(feed_forward, int(num_experts), noise, experts_key), dispatch=dispatch
    )


def _copies(network: FeedForward, count: int, noise: float, key: PRNGKeyArray) -> Experts:
    """`Experts` whose arrays are those of `network`, `count` times, the matrices with noise."""
    intermediate, hidden = network.down.shape
    options = {"activation": network.activation, "use_bias": network.down_bias is not None}
    shapes = eqx.filter_eval_shape(Experts, count, hidden, intermediate, **options, key=key)

    def copied(path: tuple, shape: jax.ShapeDtypeStruct) -> Array:
        name = path[0].name
        array = getattr(network, name)
        stack = jnp.broadcast_to(array, shape.shape)
        if not noise or name not in keys:
            return stack
        return (stack * (1 + noise * jax.random.normal(keys[name], stack.shape))).astype(
            array.dtype
        )

    keys = dict(zip(("gate_up", "down"), jax.random.split(key), strict=True))
    return jax.tree_util.tree_map_with_path(copied, shapes)

"""Grouped feed-forward network: two grouped products with an activation between them.

    feed_forward(rows, up, down, group_sizes, activation)
        = activation(rows x up^T, by group) x down, by group

Composed of two products it is right everywhere. A backend that can do both products of a block of
rows while they are in cache supplies three kernels; this file closes them under everything that
the composition supports, by falling back on it: under `jax.vmap`, and for derivatives of the
backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "*batch up"]], Float[Array, "*batch intermediate"]]


class FeedForwardKernels(NamedTuple):
    """Fused kernels. `activation` is hashable, and the same object for the same function.

    - `forward(rows, up, down, group_sizes, activation)` gives the output.
    - `saving`, called alike, gives the output and the pre-activations.
    - `backward(rows, up, down, group_sizes, before, cotangent, activation, sums=None)` gives the
      cotangents of rows, up and down, in float32 or wider, the last two added to `sums`.
    """

    forward: Callable[..., Array]
    saving: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


def composed(multiply: Callable[..., Array]) -> Callable[..., Array]:
    """The feed-forward network out of a grouped product."""

    def feed_forward(rows, up, down, group_sizes, activation):
        return _saving(multiply, activation, rows, up, down, group_sizes)[0]

    return feed_forward


def fused(
    multiply: Callable[..., Array], outer: Callable[..., Array], kernels: FeedForwardKernels
) -> Callable[..., Array]:
    """The feed-forward network out of fused kernels, and of products where those do not reach."""

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def feed_forward(rows, up, down, group_sizes, activation):
        reference = composed(multiply)
        return _or_vmapped(kernels.forward, reference, activation)(rows, up, down, group_sizes)

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def saving(rows, up, down, group_sizes, activation):
        reference = _last(partial(_saving, multiply))
        return _or_vmapped(kernels.saving, reference, activation)(rows, up, down, group_sizes)

    @partial(jax.custom_vjp, nondiff_argnums=(6,))
    def backward(rows, up, down, group_sizes, before, cotangent, activation):
        kernel = _or_vmapped(
            kernels.backward, _last(partial(_backward, multiply, outer)), activation
        )
        return kernel(rows, up, down, group_sizes, before, cotangent)

    def feed_forward_forward(rows, up, down, group_sizes, activation):
        output, before = saving(rows, up, down, group_sizes, activation)
        return output, (rows, up, down, group_sizes, before)

    def feed_forward_backward(activation, residuals, cotangent):
        operands = residuals[:3]
        cotangents = backward(*residuals, cotangent, activation)
        cotangents = (c.astype(o.dtype) for c, o in zip(cotangents, operands, strict=True))
        return *cotangents, None

    def saving_forward(rows, up, down, group_sizes, activation):
        operands = (rows, up, down, group_sizes)
        return saving(*operands, activation), operands

    def saving_backward(activation, residuals, cotangents):
        rows, up, down, group_sizes = residuals
        reference = partial(_saving, multiply, activation, group_sizes=group_sizes)
        return *jax.vjp(reference, rows, up, down)[1](cotangents), None

    def backward_forward(rows, up, down, group_sizes, before, cotangent, activation):
        operands = (rows, up, down, group_sizes, before, cotangent)
        return backward(*operands, activation), operands

    def backward_backward(activation, residuals, cotangents):
        rows, up, down, group_sizes, before, cotangent = residuals

        def reference(rows, up, down, before, cotangent):
            operands = (rows, up, down, group_sizes, before, cotangent)
            return _backward(multiply, outer, activation, *operands)

        pullback = jax.vjp(reference, rows, up, down, before, cotangent)[1]
        rows, up, down, before, cotangent = pullback(cotangents)
        return rows, up, down, None, before, cotangent

    feed_forward.defvjp(feed_forward_forward, feed_forward_backward)
    saving.defvjp(saving_forward, saving_backward)
    backward.defvjp(backward_forward, backward_backward)
    return feed_forward


def _saving(multiply, activation, rows, up, down, group_sizes):
    before = multiply(rows, up, group_sizes, True)
    return multiply(activation(before), down, group_sizes, False), before


def _backward(multiply, outer, activation, rows, up, down, group_sizes, before, cotangent):
    """What differentiating `_saving` would do, from the saved pre-activations."""
    activations, pullback = jax.vjp(activation, before)
    cotangent = cotangent.astype(jnp.result_type(activations, down))
    down_cotangent = outer(activations, cotangent, group_sizes)
    cotangent = multiply(cotangent, down, group_sizes, True).astype(activations.dtype)
    (cotangent,) = pullback(cotangent)
    cotangent = cotangent.astype(jnp.result_type(rows, up))
    up_cotangent = outer(cotangent, rows, group_sizes)
    return multiply(cotangent, up, group_sizes, False), up_cotangent, down_cotangent


def _last(function: Callable) -> Callable:
    """With the activation as the last argument, as kernels have it."""
    return lambda *arguments: function(arguments[-1], *arguments[:-1])


def _or_vmapped(kernel: Callable, reference: Callable, activation: Activation) -> Callable:
    """`kernel`, or the mapped `reference` under `jax.vmap`."""

    @custom_vmap
    def call(*operands):
        return kernel(*operands, activation)

    @call.def_vmap
    def _rule(axis_size, in_batched, *operands):
        in_axes = [0 if batched else None for batched in in_batched]
        mapped = jax.vmap(
            lambda *operands: reference(*operands, activation), in_axes, axis_size=axis_size
        )
        outputs = mapped(*operands)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return call

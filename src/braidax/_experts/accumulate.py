"""Gradients of weights that are added to running sums, for a caller that takes rows in chunks.

The value is that of the plain product. `sums`, which it does not depend on, stand for the weights
in its derivative: their cotangent is `sums` plus the gradient of the weights, never rounded to the
weights' dtype, and added in place where a backend's kernel can. The weights themselves get none.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .feed_forward import FeedForwardKernels


class Accumulating(NamedTuple):
    """`multiply(rows, weight, group_sizes, sums, transposed)` and
    `feed_forward(rows, up, down, group_sizes, sums, activation)`, there with a pair of sums."""

    multiply: Callable[..., Array]
    feed_forward: Callable[..., Array]


def accumulating(
    multiply: Callable[..., Array],
    outer: Callable[..., Array],
    kernels: FeedForwardKernels | None = None,
) -> Accumulating:
    """Both functions out of a grouped product, its outer product and, where there are some, fused
    kernels. Reverse mode once."""

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def multiply_into(rows, weight, group_sizes, sums, transposed):
        return multiply(rows, weight, group_sizes, transposed)

    def multiply_forward(rows, weight, group_sizes, sums, transposed):
        operands = (rows, weight, group_sizes, sums)
        return multiply_into(*operands, transposed), operands

    def multiply_backward(transposed, residuals, cotangent):
        rows, weight, group_sizes, sums = residuals
        cotangent = cotangent.astype(jnp.result_type(rows, weight))
        rows_cotangent = multiply(cotangent, weight, group_sizes, not transposed)
        left, right = (cotangent, rows) if transposed else (rows, cotangent)
        sums = sums + outer(left, right, group_sizes)
        return rows_cotangent.astype(rows.dtype), None, None, sums

    multiply_into.defvjp(multiply_forward, multiply_backward)
    if kernels is None:
        return Accumulating(multiply_into, composed_into(multiply_into))

    @partial(jax.custom_vjp, nondiff_argnums=(5,))
    def feed_forward_into(rows, up, down, group_sizes, sums, activation):
        return kernels.forward(rows, up, down, group_sizes, activation)

    def feed_forward_forward(rows, up, down, group_sizes, sums, activation):
        operands = (rows, up, down, group_sizes)
        output, before = kernels.saving(*operands, activation)
        return output, (*operands, before, sums)

    def feed_forward_backward(activation, residuals, cotangent):
        *operands, sums = residuals
        rows, *sums = kernels.backward(*operands, cotangent, activation, sums)
        return rows.astype(operands[0].dtype), None, None, None, tuple(sums)

    feed_forward_into.defvjp(feed_forward_forward, feed_forward_backward)
    return Accumulating(multiply_into, feed_forward_into)


def composed_into(multiply_into: Callable[..., Array]) -> Callable[..., Array]:
    """The feed-forward network out of `Accumulating.multiply`."""

    def feed_forward(rows, up, down, group_sizes, sums, activation):
        before = multiply_into(rows, up, group_sizes, sums[0], True)
        return multiply_into(activation(before), down, group_sizes, sums[1], False)

    return feed_forward

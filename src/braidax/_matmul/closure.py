"""Grouped products closed under reverse-mode differentiation of any order and `jax.vmap`.

A kernel supplies `multiply` and `outer`. Each is the derivative of the other, so two mutually
recursive `custom_vjp` functions close both. A fused network is closed by the network that is
composed of the closed products: it stands in under `jax.vmap` and for derivatives of derivatives.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from .._mesh import varying_alike
from . import network
from .base import AbstractGroupedMatmul
from .blocks import Blocks
from .mapped import mapped_by, mapped_multiply, mapped_outer
from .network import Activation, FeedForwardWeights, accumulation_dtype, clear_nobody
from .stacks import is_array, is_packed


class GroupedMatmul(eqx.Module):
    """What experts multiply with: a differentiable, vmappable product made of a kernel.

    Cotangents are rounded to the wider dtype of the two operands, as in any mixed-precision
    product. Forward mode works for kernels of plain JAX code alone.

    - `kernel`: an `AbstractGroupedMatmul`.

    **Example:** three rows, two of which belong to the first of two groups.

        >>> import braidax as bx, jax.numpy as jnp
        >>> product = bx.GroupedMatmul(bx.matmul.Blocks())
        >>> weight = jnp.array([[[1.0]], [[10.0]]])
        >>> product(jnp.array([[1.0], [2.0], [3.0]]), weight, jnp.array([2, 1])).tolist()
        [[1.0], [2.0], [30.0]]
    """

    kernel: AbstractGroupedMatmul

    def __call__(
        self,
        rows: Float[Array, "rows size_in"],
        weight: Any,
        group_sizes: Int[Array, " groups"],
        *,
        transposed: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "rows size_out"]:
        """Every row times the matrix of its group; rows of nobody give 0.

        **Arguments:**

        - `rows`: `(rows, size_in)`, consecutive rows for each group.
        - `weight`: `(groups, size_in, size_out)`. An object with a method `multiply(product, rows,
            group_sizes, *, transposed)` multiplies by itself what stands for such an array.
        - `group_sizes`: int32 `(groups,)`, the rows of each group.
        - `transposed`: whether the matrices are `(size_out, size_in)`.
        - `out_dtype`: of the result, by default float32 or wider.
        """
        if hasattr(weight, "multiply"):
            output = weight.multiply(self, rows, group_sizes, transposed=transposed)
            return output if out_dtype is None else output.astype(out_dtype)
        rows, weight, group_sizes = varying_alike((rows, weight, group_sizes))
        out_dtype = jnp.dtype(out_dtype or accumulation_dtype(rows, weight))
        if self.kernel.plain:
            weight = _unpacked(weight) if is_packed(weight) else weight
            options = {"transposed": transposed, "out_dtype": out_dtype}
            return self.kernel.multiply(rows, weight, group_sizes, **options)
        kernel = _kernel_for(self.kernel, weight)
        return _multiply(kernel, rows, weight, group_sizes, transposed, out_dtype)

    def feed_forward(
        self,
        rows: Float[Array, "rows hidden"],
        weights: FeedForwardWeights,
        group_sizes: Int[Array, " groups"],
        activation: Activation,
        scales: Float[Array, " rows"] | None = None,
    ) -> Float[Array, "rows hidden"]:
        """Every row through the network of its group, in float32 or wider; rows of nobody give 0.

        **Arguments:**

        - `rows`: `(rows, hidden)`, consecutive rows for each group.
        - `weights`: two matrices and two optional biases for each group.
        - `group_sizes`: int32 `(groups,)`, the rows of each group.
        - `activation`: elementwise, of gate and up, or of one argument. Hashable, and equal to
            every activation that computes the same.
        - `scales`: `(rows,)`, a factor of every row's output, by default 1.
        """
        if scales is None:
            scales = jax.lax.full_like(rows, 1, shape=(rows.shape[0],))
        operands = varying_alike((rows, scales, weights, group_sizes))
        if self.kernel.plain or not (is_array(weights.up) and is_array(weights.down)):
            return network.forward_saving(self, *operands, activation)[0]
        return _feed_forward(self.kernel, *operands, activation)


def _unpacked(weight: Any) -> Float[Array, "groups a b"]:
    """All matrices of packed numbers at once."""
    groups = jnp.arange(weight.shape[0])
    return jax.vmap(lambda group: weight.of_group(group, weight.dtype))(groups)


def _kernel_for(kernel: AbstractGroupedMatmul, weight: Any) -> AbstractGroupedMatmul:
    """Only the loop over blocks reads packed weights, which it decodes group by group."""
    return Blocks() if is_packed(weight) and not isinstance(kernel, Blocks) else kernel


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _multiply(kernel, rows, weight, group_sizes, transposed, out_dtype):
    call = partial(kernel.cleared_multiply, transposed=transposed, out_dtype=out_dtype)
    return mapped_multiply(call)(rows, weight, group_sizes)


def _multiply_forward(kernel, rows, weight, group_sizes, transposed, out_dtype):
    product = _multiply(kernel, rows, weight, group_sizes, transposed, out_dtype)
    return product, (rows, weight, group_sizes)


def _multiply_backward(kernel, transposed, out_dtype, residuals, cotangent):
    del out_dtype
    rows, weight, group_sizes = residuals
    cotangent = cotangent.astype(jnp.result_type(rows.dtype, weight.dtype))
    rows_cotangent = _multiply(
        kernel, cotangent, weight, group_sizes, not transposed, jnp.dtype(rows.dtype)
    )
    if is_packed(weight):
        return rows_cotangent, None, None  # packed numbers are constants
    left, right = (cotangent, rows) if transposed else (rows, cotangent)
    return rows_cotangent, _outer(kernel, left, right, group_sizes, jnp.dtype(weight.dtype)), None


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _outer(kernel, left, right, group_sizes, out_dtype):
    return mapped_outer(partial(kernel.cleared_outer, out_dtype=out_dtype))(
        left, right, group_sizes
    )


def _outer_forward(kernel, left, right, group_sizes, out_dtype):
    return _outer(kernel, left, right, group_sizes, out_dtype), (left, right, group_sizes)


def _outer_backward(kernel, out_dtype, residuals, cotangent):
    del out_dtype
    left, right, group_sizes = residuals
    cotangent = cotangent.astype(jnp.result_type(left, right))
    return (
        _multiply(kernel, right, cotangent, group_sizes, True, jnp.dtype(left.dtype)),
        _multiply(kernel, left, cotangent, group_sizes, False, jnp.dtype(right.dtype)),
        None,
    )


_multiply.defvjp(_multiply_forward, _multiply_backward)
_outer.defvjp(_outer_forward, _outer_backward)


def _closed(kernel: Callable, reference: Callable) -> Callable:
    """`kernel`, with `reference` in its place under `jax.vmap` and under differentiation."""
    batched = mapped_by(reference, kernel)

    @jax.custom_vjp
    def call(*operands):
        return batched(*operands)

    def forward(*operands):
        return call(*operands), operands

    def backward(operands, cotangents):
        return jax.vjp(reference, *operands)[1](cotangents)

    call.defvjp(forward, backward)
    return call


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _feed_forward(kernel, rows, scales, weights, group_sizes, activation):
    def fused(rows, scales, weights, group_sizes):
        output = kernel.forward(rows, scales, weights, group_sizes, activation)
        return clear_nobody(output, group_sizes)

    def composed(*operands):
        return _composed(kernel, *operands, activation=activation)[0]

    return mapped_by(composed, fused)(rows, scales, weights, group_sizes)


def _feed_forward_forward(kernel, rows, scales, weights, group_sizes, activation):
    def fused(rows, scales, weights, group_sizes):
        operands = (rows, scales, weights, group_sizes)
        output, before = kernel.forward_saving(*operands, activation)
        return clear_nobody(output, group_sizes), before

    composed = partial(_composed, kernel, activation=activation)
    operands = (rows, scales, weights, group_sizes)
    output, before = _closed(fused, composed)(*operands)
    return output, (*operands, before)


def _feed_forward_backward(kernel, activation, residuals, cotangent):
    def fused(*operands):
        return kernel.cleared_backward(*operands, activation)

    multiply, outer = _closed_products(kernel)
    composed = partial(network.backward, multiply, outer, activation=activation)
    return *_closed(fused, composed)(*residuals, cotangent), None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def _composed(kernel, rows, scales, weights, group_sizes, activation):
    multiply, _ = _closed_products(kernel)
    return network.forward_saving(multiply, rows, scales, weights, group_sizes, activation)


def _closed_products(
    kernel: AbstractGroupedMatmul,
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    def outer(left, right, group_sizes, *, out_dtype):
        return _outer(kernel, left, right, group_sizes, out_dtype)

    return GroupedMatmul(kernel), outer

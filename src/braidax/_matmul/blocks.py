"""A loop over blocks of rows: portable, and the default on CPUs and GPUs.

The loop runs over the blocks that exist, so the work follows the assignments whatever their
skew. A block never crosses a group. Operands are widened to float32 block by block, which is
exact, and faster on a CPU than a product of narrow numbers.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .base import AbstractGroupedMatmul
from .block_loop import Window, dot, loop_over_blocks
from .few_rows import forward_few_rows, tile_size
from .network import Activation, FeedForwardWeights, accumulation_dtype, activate
from .single_rows import are_single_rows, forward_single_rows
from .stacks import of_group


class Blocks(AbstractGroupedMatmul):
    """A loop over blocks of rows, in plain XLA: the work follows the assignments everywhere.

    Both products of a network are made of a block while it is in cache. A forward pass of few rows
    for each group reads the weights in place instead. Reads packed weights, too.

    **Example:**

        >>> import braidax as bx, jax
        >>> dispatch = bx.SortedDispatch(bx.matmul.Blocks())
        >>> block = bx.top_k_moe(32, 16, 8, 2, dispatch=dispatch, key=jax.random.key(0))
    """

    clears_empty_groups: ClassVar[bool] = True

    def multiply(self, rows, weight, group_sizes, *, transposed, out_dtype):
        """As `AbstractGroupedMatmul.multiply`."""
        return _multiply(rows, weight, group_sizes, transposed, out_dtype)

    def outer(self, left, right, group_sizes, *, out_dtype):
        """As `AbstractGroupedMatmul.outer`."""
        return _outer(left, right, group_sizes, out_dtype)

    def forward(self, rows, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward`."""
        return _forward(rows, weights, group_sizes, activation)

    def forward_saving(self, rows, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward_saving`."""
        return _forward_saving(rows, weights, group_sizes, activation)

    def backward(self, rows, weights, group_sizes, before, cotangent, activation):
        """As `AbstractGroupedMatmul.backward`."""
        return _backward(rows, weights, group_sizes, before, cotangent, activation)


# Jitted: compiled once for each shape, also when a product is called outside of `jax.jit`.


@partial(jax.jit, static_argnums=(3, 4))
def _multiply(
    rows: Float[Array, "rows size_in"],
    weight: Any,
    group_sizes: Int[Array, " groups"],
    transposed: bool,
    out_dtype: jnp.dtype,
) -> Float[Array, "rows size_out"]:
    size_out = weight.shape[1 if transposed else 2]
    dtype = accumulation_dtype(rows, weight)
    output = jax.lax.full_like(rows, 0, dtype, (rows.shape[0], size_out))

    def compute(window: Window, matrix: Array, outputs: tuple[Array, ...]):
        return (dot(window.take(rows, dtype), matrix, 1, 1 if transposed else 0),), ()

    outputs, _ = loop_over_blocks(
        group_sizes, (output,), (), lambda group: of_group(weight, group, dtype), compute
    )
    return outputs[0].astype(out_dtype)


@partial(jax.jit, static_argnums=3)
def _outer(
    left: Float[Array, "rows a"],
    right: Float[Array, "rows b"],
    group_sizes: Int[Array, " groups"],
    out_dtype: jnp.dtype,
) -> Float[Array, "groups a b"]:
    dtype = accumulation_dtype(left, right)
    shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
    sums = jax.lax.full_like(left, 0, dtype, shape)

    def compute(window: Window, nothing: None, outputs: tuple[Array, ...]):
        taken = (window.take_live(rows).astype(dtype) for rows in (left, right))
        return (), (dot(*taken, 0, 0),)

    _, sums = loop_over_blocks(
        group_sizes, (), (sums,), lambda group: None, compute, num_rows=left.shape[0]
    )
    return sums[0].astype(out_dtype)


@partial(jax.jit, static_argnums=3)
def _forward(
    rows: Float[Array, "rows hidden"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    activation: Activation,
) -> Float[Array, "rows hidden"]:
    num_rows, num_groups = rows.shape[0], weights.up.shape[0]
    if are_single_rows(num_rows, num_groups):
        return forward_single_rows(rows, weights, group_sizes, activation)
    size = tile_size(num_rows, num_groups)
    if size is not None:
        return forward_few_rows(rows, weights, group_sizes, activation, size)

    def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
        # Nobody needs the rows any more: a block's are replaced by what comes of them, in place.
        (rows,) = outputs
        return (_through(window.take(rows, rows.dtype), matrices, activation)[0],), ()

    dtype = _dtype(rows, weights)
    read = partial(_of_group, weights, dtype)
    outputs, _ = loop_over_blocks(group_sizes, (rows.astype(dtype),), (), read, compute)
    return outputs[0]


@partial(jax.jit, static_argnums=3)
def _forward_saving(
    rows: Float[Array, "rows hidden"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    activation: Activation,
) -> tuple[Float[Array, "rows hidden"], Float[Array, "rows up"]]:
    dtype = _dtype(rows, weights)
    sizes = (weights.down.shape[2], weights.up.shape[1])
    outputs = tuple(jax.lax.full_like(rows, 0, dtype, (rows.shape[0], size)) for size in sizes)

    def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
        return _through(window.take(rows, dtype), matrices, activation), ()

    read = partial(_of_group, weights, dtype)
    outputs, _ = loop_over_blocks(group_sizes, outputs, (), read, compute)
    return outputs[0], outputs[1]


@partial(jax.jit, static_argnums=5)
def _backward(
    rows: Float[Array, "rows hidden"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    before: Float[Array, "rows up"],
    cotangent: Float[Array, "rows hidden"],
    activation: Activation,
) -> tuple[Float[Array, "rows hidden"], FeedForwardWeights]:
    dtype = _dtype(rows, weights)
    narrow = jnp.result_type(rows, weights.up)
    present = [weight for weight in weights if weight is not None]
    sums = tuple(jax.lax.full_like(rows, 0, dtype, weight.shape) for weight in present)

    def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
        # A block's cotangent is replaced by what comes of it, in place.
        (cotangent,) = outputs
        block, pre, back = map(window.take_live, (rows, before, cotangent))
        block = block.astype(dtype)
        activations, pullback = jax.vjp(partial(activate, activation), pre)
        (inner,) = pullback(dot(back, matrices.down, 1, 1))
        inner = inner.astype(narrow).astype(dtype)
        products = (dot(inner, block, 0, 0), dot(activations, back, 0, 0))
        if weights.up_bias is not None:
            products += (inner.sum(axis=0),)
        if weights.down_bias is not None:
            products += (back.sum(axis=0),)
        return (dot(inner, matrices.up, 1, 0),), products

    read = partial(_of_group, weights, dtype)
    outputs, sums = loop_over_blocks(group_sizes, (cotangent.astype(dtype),), sums, read, compute)
    totals = iter(sums)
    cotangents = (
        None if weight is None else next(totals).astype(weight.dtype) for weight in weights
    )
    return outputs[0].astype(rows.dtype), FeedForwardWeights(*cotangents)


def _through(block: Array, matrices: FeedForwardWeights, activation: Activation):
    """The output and the pre-activations of a block of rows."""
    before = dot(block, matrices.up, 1, 1)
    if matrices.up_bias is not None:
        before = before + matrices.up_bias
    output = dot(activate(activation, before), matrices.down, 1, 0)
    if matrices.down_bias is not None:
        output = output + matrices.down_bias
    return output, before


def _dtype(rows: Array, weights: FeedForwardWeights) -> jnp.dtype:
    return accumulation_dtype(rows, weights.up, weights.down)


def _of_group(weights: FeedForwardWeights, dtype: jnp.dtype, group: Array) -> FeedForwardWeights:
    """One group's matrices, `(a, b)`, and biases, `(1, size)`, widened to `dtype`."""
    biases = (
        None if bias is None else bias[group][None].astype(dtype)
        for bias in (weights.up_bias, weights.down_bias)
    )
    return FeedForwardWeights(
        of_group(weights.up, group, dtype), of_group(weights.down, group, dtype), *biases
    )

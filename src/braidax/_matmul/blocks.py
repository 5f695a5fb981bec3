"""A loop over blocks of rows: portable, and the default on CPUs and GPUs.

The loop runs over the blocks that exist, so the work follows the assignments whatever their
skew. A block never crosses a group. Operands are widened to float32 block by block, which is
exact, and faster on a CPU than a product of narrow numbers.
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array

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

    # Jitted: compiled once for each shape, also when a product is called outside of `jax.jit`.

    @partial(jax.jit, static_argnames=("self", "transposed", "out_dtype"))
    def multiply(self, rows, weight, group_sizes, *, transposed, out_dtype):
        """As `AbstractGroupedMatmul.multiply`."""
        size_out = weight.shape[1 if transposed else 2]
        dtype = accumulation_dtype(rows, weight)
        output = jax.lax.full_like(rows, 0, dtype, (rows.shape[0], size_out))

        def compute(window: Window, matrix: Array, outputs: tuple[Array, ...]):
            return (dot(window.take(rows, dtype), matrix, 1, 1 if transposed else 0),), ()

        read = partial(of_group, weight, dtype=dtype)
        outputs, _ = loop_over_blocks(group_sizes, rows.shape[0], (output,), (), read, compute)
        return outputs[0].astype(out_dtype)

    @partial(jax.jit, static_argnames=("self", "out_dtype"))
    def outer(self, left, right, group_sizes, *, out_dtype):
        """As `AbstractGroupedMatmul.outer`."""
        dtype = accumulation_dtype(left, right)
        shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
        sums = (jax.lax.full_like(left, 0, out_dtype, shape),)

        def compute(window: Window, nothing: None, outputs: tuple[Array, ...]):
            taken = (window.take_live(rows).astype(dtype) for rows in (left, right))
            return (), (dot(*taken, 0, 0),)

        operands = (group_sizes, left.shape[0], (), sums, lambda group: None, compute)
        _, sums = loop_over_blocks(*operands, sum_dtype=dtype)
        return sums[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def forward(self, rows, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward`."""
        num_rows, num_groups = rows.shape[0], weights.up.shape[0]
        known = not is_symbolic_dim(num_rows)
        if known and are_single_rows(num_rows, num_groups):
            return forward_single_rows(rows, weights, group_sizes, activation)
        size = tile_size(num_rows, num_groups) if known else None
        if size is not None:
            return forward_few_rows(rows, weights, group_sizes, activation, size)

        def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
            # Nobody needs the rows any more: a block's are replaced by its outputs, in place.
            block = window.take(outputs[0], outputs[0].dtype)
            return (_through(block, matrices, activation)[0],), ()

        read, dtype = _reader(rows, weights)
        outputs = (rows.astype(dtype),)
        outputs, _ = loop_over_blocks(group_sizes, num_rows, outputs, (), read, compute)
        return outputs[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def forward_saving(self, rows, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward_saving`."""
        read, dtype = _reader(rows, weights)
        sizes = (weights.down.shape[2], weights.up.shape[1])
        outputs = tuple(jax.lax.full_like(rows, 0, dtype, (rows.shape[0], size)) for size in sizes)

        def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
            return _through(window.take(rows, dtype), matrices, activation), ()

        return loop_over_blocks(group_sizes, rows.shape[0], outputs, (), read, compute)[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def backward(self, rows, weights, group_sizes, before, cotangent, activation):
        """As `AbstractGroupedMatmul.backward`."""
        read, dtype = _reader(rows, weights)
        narrow = jnp.result_type(rows, weights.up)
        present, tree = jax.tree.flatten(weights)
        sums = tuple(jax.lax.full_like(rows, 0, weight.dtype, weight.shape) for weight in present)

        def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
            # A block's cotangent is replaced by that of its rows, in place.
            block, pre, back = map(window.take_live, (rows, before, outputs[0]))
            activations, pullback = jax.vjp(partial(activate, activation), pre)
            (inner,) = pullback(dot(back, matrices.down, 1, 1))
            # Neighbours' rows were 0, and an activation need not be finite there.
            inner, activations = (jnp.where(window.live(), a, 0) for a in (inner, activations))
            inner = inner.astype(narrow).astype(dtype)
            terms = FeedForwardWeights(
                dot(inner, block.astype(dtype), 0, 0),
                dot(activations, back, 0, 0),
                None if weights.up_bias is None else inner.sum(axis=0),
                None if weights.down_bias is None else back.sum(axis=0),
            )
            return (dot(inner, matrices.up, 1, 0),), tuple(jax.tree.leaves(terms))

        operands = (group_sizes, rows.shape[0], (cotangent.astype(dtype),), sums, read, compute)
        outputs, sums = loop_over_blocks(*operands, sum_dtype=dtype)
        return outputs[0].astype(rows.dtype), tree.unflatten(sums)


def _through(block: Array, matrices: FeedForwardWeights, activation: Activation):
    """The output and the pre-activations of a block of rows."""
    before = dot(block, matrices.up, 1, 1)
    if matrices.up_bias is not None:
        before = before + matrices.up_bias
    output = dot(activate(activation, before), matrices.down, 1, 0)
    if matrices.down_bias is not None:
        output = output + matrices.down_bias
    return output, before


def _reader(rows: Array, weights: FeedForwardWeights):
    """What reads one group's matrices `(a, b)` and biases `(1, size)`, and their dtype: float32,
    or that of the widest operand."""
    dtype = accumulation_dtype(rows, weights.up, weights.down)

    def read(group: Array) -> FeedForwardWeights:
        biases = (
            None if bias is None else bias[group][None].astype(dtype)
            for bias in (weights.up_bias, weights.down_bias)
        )
        matrices = (of_group(stack, group, dtype) for stack in (weights.up, weights.down))
        return FeedForwardWeights(*matrices, *biases)

    return read, dtype

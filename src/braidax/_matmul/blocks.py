"""A loop over blocks of rows: portable, and the default on CPUs and GPUs.

The loop runs over the blocks that exist, so the work follows the assignments whatever their
skew. A block never crosses a group. Operands are widened to float32 block by block, which is
exact. Where rounding is asked for, narrow numbers are multiplied as they are.
"""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array

from .._checks import boolean
from .base import AbstractGroupedMatmul
from .block_loop import Window, dot, dot_of_columns, loop_over_blocks
from .few_rows import forward_few_rows, tile_size
from .network import Activation, FeedForwardWeights, accumulation_dtype, activate
from .single_rows import are_single_rows, forward_single_rows
from .stacks import of_group


class Blocks(AbstractGroupedMatmul):
    """A loop over blocks of rows, in plain XLA: the work follows the assignments everywhere.

    Both products of a network are made of a block while it is in cache. A forward pass of few rows
    for each group reads the weights in place instead. Reads packed weights, too.

    - `round_operands`: whether rows and activations are rounded to the dtype of the weights before
      each product, forward and backward, as PyTorch does: for processors that multiply bfloat16
      natively. A network's forward pass of few rows for each group rounds nothing, because
      reading the weights is what takes its time. Packed weights are decoded to float32, so
      nothing is rounded for them.

    **Example:** an exact product, and one of bfloat16 numbers.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> dispatch = bx.SortedDispatch(bx.matmul.Blocks())
        >>> block = bx.top_k_moe(32, 16, 8, 2, dispatch=dispatch, key=jax.random.key(0))
        >>> rounded = bx.SortedDispatch(bx.matmul.Blocks(round_operands=True))
        >>> block = bx.top_k_moe(32, 16, 8, 2, dispatch=rounded, dtype=jnp.bfloat16,
        ...     key=jax.random.key(0))

    **Raises:** `TypeError` unless `round_operands` is a bool.
    """

    round_operands: bool = eqx.field(static=True, default=False)

    clears_empty_groups: ClassVar[bool] = True

    def __check_init__(self):
        boolean("round_operands", self.round_operands)

    # Jitted: compiled once for each shape, also when a product is called outside of `jax.jit`.

    @partial(jax.jit, static_argnames=("self", "transposed", "out_dtype"))
    def multiply(self, rows, weight, group_sizes, *, transposed, out_dtype):
        """As `AbstractGroupedMatmul.multiply`."""
        size_out = weight.shape[1 if transposed else 2]
        dtype = accumulation_dtype(rows, weight)
        output = jax.lax.full_like(rows, 0, dtype, (rows.shape[0], size_out))

        def compute(window: Window, matrix: Array, outputs: tuple[Array, ...]):
            block = window.take(rows, matrix.dtype)
            return (dot(block, matrix, 1, 1 if transposed else 0, dtype),), ()

        read = partial(of_group, weight, dtype=self._operand(weight, dtype))
        outputs, _ = loop_over_blocks(group_sizes, rows.shape[0], (output,), (), read, compute)
        return outputs[0].astype(out_dtype)

    @partial(jax.jit, static_argnames=("self", "out_dtype"))
    def outer(self, left, right, group_sizes, *, out_dtype):
        """As `AbstractGroupedMatmul.outer`."""
        dtype = accumulation_dtype(left, right)
        shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
        sums = (jax.lax.full_like(left, 0, out_dtype, shape),)
        operand = out_dtype if self.round_operands else dtype

        def compute(window: Window, nothing: None, outputs: tuple[Array, ...]):
            taken = (window.take_live(rows).astype(operand) for rows in (left, right))
            return (), (dot_of_columns(*taken, dtype),)

        operands = (group_sizes, left.shape[0], (), sums, lambda group: None, compute)
        _, sums = loop_over_blocks(*operands, sum_dtype=dtype)
        return sums[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def forward(self, rows, scales, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward`."""
        num_rows, num_groups = rows.shape[0], weights.up.shape[0]
        known = not is_symbolic_dim(num_rows)
        few = None
        if known and are_single_rows(num_rows, num_groups):
            few = forward_single_rows(rows, weights, group_sizes, activation)
        elif known and (size := tile_size(num_rows, num_groups)) is not None:
            few = forward_few_rows(rows, weights, group_sizes, activation, size)
        if few is not None:
            return few * scales[:, None].astype(few.dtype)
        read, dtype = self._reader(rows, weights)
        column = scales[:, None].astype(dtype)

        def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
            # Nobody needs the rows any more: a block's are replaced by its outputs, in place.
            block, scale = (window.take(array, array.dtype) for array in (outputs[0], column))
            return (_through(block, scale, matrices, activation)[0],), ()

        outputs = (rows.astype(dtype),)
        outputs, _ = loop_over_blocks(group_sizes, num_rows, outputs, (), read, compute)
        return outputs[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def forward_saving(self, rows, scales, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward_saving`."""
        read, dtype = self._reader(rows, weights)
        column = scales[:, None].astype(dtype)
        before = jax.lax.full_like(rows, 0, dtype, (rows.shape[0], weights.up.shape[1]))
        outputs = (rows.astype(dtype), before)

        def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
            block, scale = (window.take(array, array.dtype) for array in (outputs[0], column))
            return _through(block, scale, matrices, activation), ()

        return loop_over_blocks(group_sizes, rows.shape[0], outputs, (), read, compute)[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def backward(self, rows, scales, weights, group_sizes, before, cotangent, activation):
        """As `AbstractGroupedMatmul.backward`."""
        read, dtype = self._reader(rows, weights)
        narrow = jnp.result_type(rows, weights.up)
        present, tree = jax.tree.flatten(weights)
        sums = tuple(jax.lax.full_like(rows, 0, weight.dtype, weight.shape) for weight in present)
        column = scales[:, None].astype(dtype)

        def compute(window: Window, matrices: FeedForwardWeights, outputs: tuple[Array, ...]):
            # A block's cotangents are replaced by those of its rows and scales, in place.
            taken = map(window.take_live, (rows, before, outputs[0], outputs[1]))
            block, pre, back, scale = taken
            activations, pullback = jax.vjp(partial(activate, activation), pre)
            inner = dot(back.astype(matrices.down.dtype), matrices.down, 1, 1, dtype)
            (before_cotangent,) = pullback(inner * scale)
            # Neighbours' rows were 0, and an activation need not be finite there.
            before_cotangent, activations = (
                jnp.where(window.live(), array, 0) for array in (before_cotangent, activations)
            )
            scale_cotangent = (inner * activations).sum(axis=1, keepdims=True)
            if matrices.down_bias is not None:
                biased = (back * matrices.down_bias).sum(axis=1, keepdims=True)
                scale_cotangent = scale_cotangent + biased
            wide = before_cotangent.astype(narrow)
            up, down = matrices.up.dtype, matrices.down.dtype
            inner = wide.astype(up)
            terms = FeedForwardWeights(
                dot_of_columns(inner, block.astype(up), dtype),
                dot_of_columns((activations * scale).astype(down), back.astype(down), dtype),
                None if weights.up_bias is None else wide.astype(dtype).sum(axis=0),
                None if weights.down_bias is None else (back * scale).sum(axis=0),
            )
            results = (dot(inner, matrices.up, 1, 0, dtype), scale_cotangent)
            return results, tuple(jax.tree.leaves(terms))

        outputs = (cotangent.astype(dtype), column)
        operands = (group_sizes, rows.shape[0], outputs, sums, read, compute)
        (d_rows, d_scales), sums = loop_over_blocks(*operands, sum_dtype=dtype)
        d_scales = d_scales[:, 0].astype(scales.dtype)
        return d_rows.astype(rows.dtype), d_scales, tree.unflatten(sums)

    def _operand(self, weight: Any, dtype: jnp.dtype) -> jnp.dtype:
        """What a matrix and its rows are multiplied in."""
        return weight.dtype if self.round_operands else dtype

    def _reader(self, rows: Array, weights: FeedForwardWeights):
        """What reads one group's matrices `(a, b)` and biases `(1, size)`, and the dtype of sums
        and biases: float32, or that of the widest operand."""
        dtype = accumulation_dtype(rows, weights.up, weights.down)

        def read(group: Array) -> FeedForwardWeights:
            biases = (
                None if bias is None else bias[group][None].astype(dtype)
                for bias in (weights.up_bias, weights.down_bias)
            )
            matrices = (
                of_group(stack, group, self._operand(stack, dtype))
                for stack in (weights.up, weights.down)
            )
            return FeedForwardWeights(*matrices, *biases)

        return read, dtype


def _through(block: Array, scale: Array, matrices: FeedForwardWeights, activation: Activation):
    """The output and the pre-activations of a block of rows, with a column of scales."""
    dtype = scale.dtype
    before = dot(block.astype(matrices.up.dtype), matrices.up, 1, 1, dtype)
    if matrices.up_bias is not None:
        before = before + matrices.up_bias
    activations = activate(activation, before)
    output = dot(activations.astype(matrices.down.dtype), matrices.down, 1, 0, dtype)
    if matrices.down_bias is not None:
        output = output + matrices.down_bias
    return output * scale, before

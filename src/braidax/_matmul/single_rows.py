"""The feed-forward network of decoding a token or a few: about one row for each expert, or less.

Every row reads the matrices of its group, as matrix-vector products in loops. XLA on a CPU does
not copy a weight slice that is only used in `vector @ slice.T`, if the vector is smaller than
16 KB. The up-projection is stored in that layout, so it is read exactly once. The down-projection
is copied before it is multiplied, in parts that are still in cache then.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .network import Activation, FeedForwardWeights, accumulation_dtype, activate
from .stacks import part_of_group

_VECTOR_BYTES = 2**14  # XLA:CPU reads the slice in place below this
_AT_ONCE = 2  # measured: a sixth faster than one product after the other, more gain nothing
_COPY_BYTES = 2**22  # measured: copies of 1 to 4 MB are fastest, being still in cache when read


def are_single_rows(num_rows: int, num_groups: int) -> bool:
    """Whether a group has one row or fewer on average, from static shapes alone. Measured: with
    one and a half, tiles are as fast or faster."""
    return 0 < num_rows <= num_groups


def forward_single_rows(
    rows: Float[Array, "rows hidden"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    activation: Activation,
) -> Float[Array, "rows hidden"]:
    """The output; rows of no group cost nothing."""
    dtype = accumulation_dtype(rows, weights.up, weights.down)
    stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)
    group = jnp.searchsorted(stops, row, side="right").astype(jnp.int32)
    before = _products(rows.astype(dtype), weights.up, group, stops[-1], transposed=True)
    activations = activate(activation, _biased(before, weights.up_bias, group))
    output = _products(activations, weights.down, group, stops[-1], transposed=False)
    return _biased(output, weights.down_bias, group)


def _biased(rows, bias, group):
    if bias is None:
        return rows
    return rows + bias.at[group].get(mode="clip").astype(rows.dtype)


def _products(rows, stack, group, count, *, transposed: bool):
    """`rows[i] @ stack[group[i]]`, or with its transpose, for the first `count` rows, zero for the
    others. A product is that of a part of the contracted axis; a step makes two of them."""
    num_rows, contracted = rows.shape
    size_out = stack.shape[1 if transposed else 2]
    if contracted == 0 or size_out == 0:
        return jax.lax.full_like(rows, 0, rows.dtype, (num_rows, size_out))
    most_bytes = _VECTOR_BYTES - 1 if transposed else _COPY_BYTES // size_out
    size = _part(contracted, max(most_bytes // rows.dtype.itemsize, 1))
    parts = contracted // size

    def product(i):
        row, begin = i // parts, i % parts * size
        vector = jax.lax.dynamic_slice(rows, (row, begin), (1, size))
        if transposed:
            corner, shape = (0, begin), (size_out, size)
        else:
            corner, shape = (begin, 0), (size, size_out)
        part = part_of_group(stack, group[row], corner, shape, rows.dtype)
        result = vector @ (part.T if transposed else part)
        return jnp.where(i < count * parts, result, 0)

    def step(i, outputs):
        begin = i * _AT_ONCE
        products = jnp.concatenate([product(begin + j) for j in range(_AT_ONCE)])
        return jax.lax.dynamic_update_slice_in_dim(outputs, products, begin, 0)

    # Like the rows: inside `jax.shard_map` a carry has to vary over the mesh as they do.
    padded = -(-num_rows * parts // _AT_ONCE) * _AT_ONCE
    outputs = jax.lax.full_like(rows, 0, rows.dtype, (padded, size_out))
    turns = jax.lax.platform_dependent(
        -(-count * parts // _AT_ONCE),
        cpu=lambda turns: turns,
        # A known number: the host of an accelerator need not wait for each turn.
        default=lambda turns: jax.lax.full_like(turns, padded // _AT_ONCE),
    )
    outputs = jax.lax.fori_loop(0, turns, step, outputs)
    return outputs[: num_rows * parts].reshape(num_rows, parts, size_out).sum(1)


def _part(size: int, most: int) -> int:
    """The largest divisor up to `most`, or all where that would make too many steps."""
    part = max(part for part in range(1, min(size, most) + 1) if size % part == 0)
    return part if 4 * part >= min(size, most) else size

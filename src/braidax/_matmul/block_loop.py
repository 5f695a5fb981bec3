"""The loop over blocks: which rows make a block, and where its results are written."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int

from .stacks import GroupSums

LARGEST_BLOCK = 512
_AT_ONCE = 4  # off the CPU: the host waits for the device once a turn
_UNKNOWN_MEAN = 51  # rows of a group where a program is exported for any number of tokens


class _Blocks(NamedTuple):
    """Where each block lies. Entries past `count` hold no rows."""

    count: Int[Array, ""]
    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    stop: Int[Array, " blocks"]
    first: Bool[Array, " blocks"]


class Window(NamedTuple):
    """`size` rows from `begin` on that hold the rows `start` to `stop` of one block.

    A window may begin before its block, at the end of the array: `size` is one of few."""

    begin: Int[Array, ""]
    size: int
    start: Int[Array, ""]
    stop: Int[Array, ""]

    def take(
        self, array: Float[Array, "rows width"], dtype: jnp.dtype
    ) -> Float[Array, "window width"]:
        """The window's rows of `array` in `dtype`, those of neighbours among them."""
        return jax.lax.dynamic_slice_in_dim(array, self.begin, self.size).astype(dtype)

    def take_live(self, array: Float[Array, "rows width"]) -> Float[Array, "window width"]:
        """The window's rows of `array`, with those of neighbours 0: a select, as 0 * NaN is NaN."""
        return jnp.where(self.live(), self.take(array, array.dtype), 0)

    def live(self) -> Bool[Array, "window 1"]:
        """Which rows of the window are the block's own."""
        row = self.begin + jnp.arange(self.size, dtype=jnp.int32)
        return ((row >= self.start) & (row < self.stop))[:, None]


def dot(a: Array, b: Array, contract_a: int, contract_b: int, dtype: jnp.dtype) -> Array:
    """The matrix product of `a` and `b`, contracted over those axes, summed in `dtype`."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def dot_of_columns(
    left: Float[Array, "rows a"], right: Float[Array, "rows b"], dtype: jnp.dtype
) -> Float[Array, "a b"]:
    """`left^T right`, summed in `dtype`."""
    if left.dtype.itemsize >= 4:
        return dot(left, right, 0, 0, dtype)
    # XLA:CPU multiplies narrow numbers natively if the contracted axis is the last of `left` in
    # memory. Only a transpose that it cannot fold into the product is carried out.
    columns = jax.lax.platform_dependent(left, cpu=_transposed, default=jnp.transpose)
    return dot(columns, right, 1, 0, dtype)


def _transposed(left: Float[Array, "rows a"]) -> Float[Array, "a rows"]:
    padded = jnp.pad(left.T, ((0, 0), (0, 8)))
    return jax.lax.optimization_barrier(padded)[:, : left.shape[0]]


def block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """The row counts a block may have, ascending, from static shapes alone.

    The largest is the mean group and a quarter more, in steps of 8 and at most 512. Most groups
    are then one block, with enough rows to pay for reading the group's weights, and few enough to
    stay in cache. A block uses the smallest size that holds its rows. Larger groups are split
    evenly, into blocks of more than half the largest, so the sizes are dense there: in eighths,
    and a half and a quarter for small groups. Each size is compiled, which rules out more. Under 8
    rows the choice costs more than it saves.
    """
    mean = _UNKNOWN_MEAN if is_symbolic_dim(num_rows) else -(-num_rows // num_groups)
    largest = min(-(-mean * 5 // 32) * 8, LARGEST_BLOCK, num_rows)
    smaller = {-(-largest * eighths // 64) * 8 for eighths in (2, 4, 5, 6, 7)}
    return (*sorted(size for size in smaller if 8 <= size < largest), largest)


def loop_over_blocks(
    group_sizes: Int[Array, " groups"],
    num_rows: int,
    row_outputs: tuple[Float[Array, "rows _"], ...],
    group_sums: tuple[Float[Array, "groups ..."], ...],
    read: Callable[[Array], Any],
    compute: Callable[[Window, Any, tuple[Array, ...]], tuple[tuple, tuple]],
    *,
    sum_dtype: jnp.dtype | None = None,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """`row_outputs` and `group_sums` with the results of every block written into them.

    A CPU takes the smallest of several sizes for each block. An accelerator has one size, because
    the host would have to choose, and takes several blocks in a turn.

    **Arguments:**

    - `group_sizes`: int32 `(groups,)`.
    - `num_rows`: of all arrays of rows.
    - `row_outputs`: arrays `(rows, _)`. A block's rows are replaced by its results.
    - `group_sums`: arrays `(groups, ...)` of zeros. The results of a group's blocks add up, in
        `sum_dtype`, and are rounded once.
    - `read(group)`: what all sizes of a block need of its group.
    - `compute(window, what was read, row_outputs)`: results for the rows of the window, and terms
        of the group's sums.
    """
    if num_rows == 0:
        return row_outputs, group_sums
    sizes = block_sizes(num_rows, group_sizes.shape[0])

    def loop(sizes, at_once, row_outputs, group_sums):
        blocks = _plan(group_sizes, num_rows, sizes[-1], at_once)
        step = partial(_step, blocks, sizes, num_rows, read, compute)

        def turn(i, carry):
            for offset in range(at_once):
                carry = step(i * at_once + offset, *carry)
            return carry

        sums = tuple(GroupSums.of(stack, sum_dtype) for stack in group_sums)
        turns = -(-blocks.count // at_once)
        row_outputs, sums = jax.lax.fori_loop(0, turns, turn, (row_outputs, sums))
        return row_outputs, tuple(total.stacked() for total in sums)

    # One at a time with sums: XLA's rematerialization takes each update of a stack for a new one.
    at_once = 1 if group_sums else _AT_ONCE
    return jax.lax.platform_dependent(
        *(row_outputs, group_sums),
        cpu=partial(loop, sizes, 1),
        default=partial(loop, sizes[-1:], at_once),
    )


def _step(
    blocks: _Blocks, sizes, num_rows: int, read, compute, i: Array, row_outputs, sums
) -> tuple[tuple, tuple]:
    """`row_outputs` and `sums` with the results of block `i` in them."""
    start, stop, group = blocks.start[i], blocks.stop[i], blocks.group[i]
    matrices = read(group)
    whole = _window(start, stop, sizes[-1], num_rows)

    def at_size(size):
        window = _window(start, stop, size, num_rows)
        results, terms = compute(window, matrices, row_outputs)
        return tuple(_place(r, sizes[-1], window.begin - whole.begin) for r in results), terms

    results, terms = _at_smallest_size(sizes, stop - start, at_size)
    written = map(_write, row_outputs, results, [whole] * len(results))
    added = (s.add(term, group, blocks.first[i]) for s, term in zip(sums, terms, strict=True))
    return tuple(written), tuple(added)


def _plan(
    group_sizes: Int[Array, " groups"], num_rows: int, block_size: int, at_once: int = 1
) -> _Blocks:
    """The blocks of all groups, and entries without rows up to a multiple of `at_once`."""
    num_groups = group_sizes.shape[0]
    group_stops = jnp.cumsum(group_sizes, dtype=jnp.int32)
    blocks_per_group = -(-group_sizes // block_size)
    last_blocks = jnp.cumsum(blocks_per_group, dtype=jnp.int32)
    most = -(-(num_rows // block_size + num_groups) // at_once) * at_once
    block = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last_blocks, block, side="right").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    within = block - (last_blocks - blocks_per_group)[group]
    # The rows of a group are split evenly: a full block and a short one waste more.
    share = -(-group_sizes // jnp.maximum(blocks_per_group, 1))[group]
    start = (group_stops - group_sizes)[group] + within * share
    stop = jnp.minimum(start + share, group_stops[group])
    return _Blocks(last_blocks[-1], group, start, stop, within == 0)


def _window(start: Array, stop: Array, size: int, num_rows: int) -> Window:
    return Window(jnp.minimum(start, num_rows - size), size, start, stop)


def _at_smallest_size(sizes: tuple[int, ...], live: Array, compute: Callable[[int], Any]) -> Any:
    """`compute` at the smallest of `sizes` that holds `live` rows. Its results have one shape:
    a branch that returned the whole output would copy it."""
    if len(sizes) == 1:
        return compute(sizes[0])
    branch = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), live)
    return jax.lax.switch(branch, [lambda size=size: compute(size) for size in sizes])


def _place(result: Array, largest: int, offset: Array) -> Array:
    """`result` among the rows of the largest window, the other rows zero."""
    if result.shape[0] == largest:
        return result
    padded = jnp.zeros((largest, result.shape[1]), result.dtype)
    return jax.lax.dynamic_update_slice_in_dim(padded, result, offset, 0)


def _write(array: Array, result: Array, window: Window) -> Array:
    """Only the block's own rows are written: its window reaches into its neighbours'."""
    result = jnp.where(window.live(), result, window.take(array, array.dtype))
    return jax.lax.dynamic_update_slice_in_dim(array, result, window.begin, 0)

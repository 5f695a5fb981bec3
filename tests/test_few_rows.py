"""Inference with a handful of rows per expert: the `blocks` backend's path for decoding."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close

import braidax as bx
from braidax._backends import find_backend
from braidax._experts.few_rows import tile_size

GROUPS, HIDDEN, INTERMEDIATE, LIMIT = 6, 10, 7, 1.0
ROWS = 13  # In no tile and no step of four tiles a whole number of times.
# With float32 weights, half of the groups or more in use are multiplied with the whole stack first.
GROUP_SIZES = {
    "whole stack, tiles overflow": [9, 1, 0, 3, 0, 0],
    "whole stack, every group": [2, 3, 2, 1, 3, 2],
    "whole stack, rows of no group": [0, 1, 3, 0, 2, 1],
    "blocks, all on the first": [13, 0, 0, 0, 0, 0],
    "blocks, all on the last": [0, 0, 0, 0, 0, 13],
    "blocks, full tiles and rows of no group": [0, 8, 0, 0, 4, 0],
    "blocks, nothing": [0, 0, 0, 0, 0, 0],
}
patterns = pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def make_experts(dtype, groups=GROUPS):
    return bx.SwiGLUExperts(
        groups, HIDDEN, INTERMEDIATE, limit=LIMIT, dtype=dtype, key=jax.random.key(0)
    )


def make_rows(num_rows):
    return 2 * jax.random.normal(jax.random.key(1), (num_rows, HIDDEN))


@eqx.filter_jit
def infer(experts, rows, group_sizes):
    return experts(rows, group_sizes, find_backend("blocks").grouped_matmul)


def exact(experts, rows, sizes):
    """In float64, row by row; rows past the groups are 0."""
    rows, gate_up, down = (
        np.asarray(array, np.float64) for array in (rows, experts.gate_up, experts.down)
    )
    output = np.zeros_like(rows)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        output[row] = oracle.swiglu(rows[row], gate_up[group], down[group], LIMIT)
    return output


@dtypes
@patterns
def test_equals_the_oracle(sizes, dtype):
    """bfloat16 weights are widened, which is exact, and rows of float32 stay so."""
    experts, rows = make_experts(dtype), make_rows(ROWS)
    output = infer(experts, rows, jnp.array(sizes, jnp.int32))
    assert output.dtype == jnp.float32
    assert_close(output, exact(experts, rows, sizes))
    assert not np.asarray(output)[sum(sizes) :].any()


@dtypes
@pytest.mark.parametrize("num_rows, groups", [(1, 1), (2, 1), (16, 1), (1, 9), (3, 2), (64, 4)])
def test_sizes_at_the_edges(num_rows, groups, dtype):
    """Fewer rows than blocks at once, one group, fewer rows than groups, the largest tile."""
    experts, rows = make_experts(dtype, groups), make_rows(num_rows)
    even = [num_rows // groups + (group < num_rows % groups) for group in range(groups)]
    for sizes in (even, [*[0] * (groups - 1), num_rows]):
        output = infer(experts, rows, jnp.array(sizes, jnp.int32))
        assert_close(output, exact(experts, rows, sizes))


@dtypes
@patterns
def test_nan_stays_with_its_own(sizes, dtype):
    """In one row, in the rows of no group and in one expert, used or not."""
    experts, rows = make_experts(dtype), make_rows(ROWS)
    desired, owned = exact(experts, rows, sizes), sum(sizes)
    group = np.repeat(np.arange(GROUPS), sizes)
    row = owned // 2
    bad_rows = rows.at[jnp.array([row, *range(owned, ROWS)])].set(jnp.nan)
    for bad in range(GROUPS):
        poisoned = jax.tree.map(lambda stack, bad=bad: stack.at[bad].set(jnp.nan), experts)
        output = np.asarray(infer(poisoned, bad_rows, jnp.array(sizes, jnp.int32)))
        reached = np.zeros(ROWS, bool)
        reached[:owned] = group == bad
        reached[row] |= row < owned
        assert np.isnan(output[reached]).all()
        assert_close(output[~reached], desired[~reached])


@pytest.mark.parametrize(
    "num_rows, num_groups, size",
    [
        (1, 1, 8),
        (6, 256, 8),  # One token of DeepSeek-V4-Flash: no tile under 8 rows.
        (768, 256, 8),  # 128 tokens.
        (1024, 256, 8),
        (1025, 256, 16),  # Twice the mean is a little more than 8.
        (4096, 256, 32),
        (4097, 256, None),  # The mean group is larger than 16 rows.
        (17, 1, None),
        (0, 4, None),
    ],
)
def test_tile_size(num_rows, num_groups, size):
    assert tile_size(num_rows, num_groups) == size


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_layer(tokens):
    """A whole layer, from one token on."""
    router = bx.TopKRouter(HIDDEN, GROUPS, 2, key=jax.random.key(2))
    moe = bx.RoutedMoE(router, make_experts(jnp.float32), backend="blocks")
    hidden_states = make_rows(tokens)
    output, routing = eqx.filter_jit(moe)(hidden_states)
    weights, gate_up, down = (
        np.asarray(array, np.float64)
        for array in (routing.weights, moe.experts.gate_up, moe.experts.down)
    )
    tokens_in_float64 = np.asarray(hidden_states, np.float64)
    indices = np.asarray(routing.indices)
    assert_close(output, oracle.routed(tokens_in_float64, indices, weights, gate_up, down, LIMIT))

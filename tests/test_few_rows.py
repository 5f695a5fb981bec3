"""Inference with a handful of rows per expert, or one: the paths of `blocks` for decoding."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assert_close, make_dispatch

import braidax as bx
from braidax._matmul.few_rows import tile_size
from braidax._matmul.single_rows import are_single_rows

pytestmark = pytest.mark.optimized  # what is chosen for speed is what XLA optimizes

GROUPS, HIDDEN, INTERMEDIATE, LIMIT = 6, 10, 7, 1.0
ROWS = 13  # In no tile and no step of four tiles a whole number of times.
# With float32 weights, half of the groups or more in use are multiplied with the whole stack first.
GROUP_SIZES = {
    "whole stack, tiles overflow": (ROWS, [9, 1, 0, 3, 0, 0]),
    "whole stack, every group": (ROWS, [2, 3, 2, 1, 3, 2]),
    "whole stack, rows of no group": (ROWS, [0, 1, 3, 0, 2, 1]),
    "blocks, all on the first": (ROWS, [13, 0, 0, 0, 0, 0]),
    "blocks, all on the last": (ROWS, [0, 0, 0, 0, 0, 13]),
    "blocks, full tiles and rows of no group": (ROWS, [0, 8, 0, 0, 4, 0]),
    "blocks, nothing": (ROWS, [0, 0, 0, 0, 0, 0]),
    "whole stack, the smallest tiles overflow": (11, [7, 0, 1, 2, 0, 0]),
    "blocks, three of the smallest tiles": (9, [9, 0, 0, 0, 0, 0]),
    # More than 16 rows for a group: a loop over blocks that replaces them by their outputs.
    "large blocks and rows of no group": (150, [70, 0, 1, 40, 0, 30]),
    "large blocks, all on the last": (150, [0, 0, 0, 0, 0, 150]),
    # No more rows than groups.
    "single rows, one each": (6, [1, 1, 1, 1, 1, 1]),
    "single rows, odd, some groups twice": (5, [0, 2, 0, 1, 0, 2]),
    "single rows, odd, rows of no group": (5, [1, 0, 0, 0, 0, 2]),
    "single rows, nothing": (5, [0, 0, 0, 0, 0, 0]),
}
patterns = pytest.mark.parametrize("num_rows, sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
one_dtype = pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)


def make_experts(dtype, groups=GROUPS):
    return clamped_experts(groups, HIDDEN, INTERMEDIATE, dtype)


def clamped_experts(groups, hidden, intermediate, dtype, use_bias=False):
    return bx.Experts(
        groups,
        hidden,
        intermediate,
        activation=bx.activations.swiglu(LIMIT),
        use_bias=use_bias,
        dtype=dtype,
        key=jax.random.key(0),
    )


def make_rows(num_rows):
    return 2 * jax.random.normal(jax.random.key(1), (num_rows, HIDDEN))


@eqx.filter_jit
def infer(experts, rows, group_sizes):
    return experts(rows, group_sizes, bx.GroupedMatmul(bx.matmul.Blocks()))


def exact(experts, rows, sizes):
    """In float64, row by row; rows past the groups are 0."""
    rows, gate_up, down = (
        np.asarray(array, np.float64) for array in (rows, experts.gate_up, experts.down)
    )
    output = np.zeros_like(rows)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        output[row] = oracle.swiglu(rows[row], gate_up[group], down[group], LIMIT)
    return output


@one_dtype
@patterns
def test_equals_the_oracle(num_rows, sizes, dtype):
    """bfloat16 weights are widened, which is exact, and rows of float32 stay so."""
    experts, rows = make_experts(dtype), make_rows(num_rows)
    output = infer(experts, rows, jnp.array(sizes, jnp.int32))
    assert output.dtype == jnp.float32
    assert_close(output, exact(experts, rows, sizes))
    assert not np.asarray(output)[sum(sizes) :].any()


@one_dtype
@pytest.mark.parametrize("num_rows, groups", [(1, 1), (2, 1), (16, 1), (1, 9), (3, 2), (64, 4)])
def test_sizes_at_the_edges(num_rows, groups, dtype):
    """Fewer rows than blocks at once, one group, fewer rows than groups, the largest tile."""
    experts, rows = make_experts(dtype, groups), make_rows(num_rows)
    even = [num_rows // groups + (group < num_rows % groups) for group in range(groups)]
    for sizes in (even, [*[0] * (groups - 1), num_rows]):
        output = infer(experts, rows, jnp.array(sizes, jnp.int32))
        assert_close(output, exact(experts, rows, sizes))


@one_dtype
@patterns
def test_nan_stays_with_its_own(num_rows, sizes, dtype):
    """In one row, in the rows of no group and in one expert, used or not."""
    experts, rows = make_experts(dtype), make_rows(num_rows)
    desired, owned = exact(experts, rows, sizes), sum(sizes)
    group = np.repeat(np.arange(GROUPS), sizes)
    row = owned // 2
    bad_rows = rows.at[jnp.array([row, *range(owned, num_rows)])].set(jnp.nan)
    for bad in range(GROUPS):
        poisoned = jax.tree.map(lambda stack, bad=bad: stack.at[bad].set(jnp.nan), experts)
        output = np.asarray(infer(poisoned, bad_rows, jnp.array(sizes, jnp.int32)))
        reached = np.zeros(num_rows, bool)
        reached[:owned] = group == bad
        reached[row] |= row < owned
        assert np.isnan(output[reached]).all()
        assert_close(output[~reached], desired[~reached])


@pytest.mark.parametrize("num_rows", [3, 11, 150])
def test_float64(num_rows):
    """With single rows, tiles and blocks."""
    sizes = [num_rows - 2, 0, 1, 0, 0, 0]
    with jax.enable_x64(True):
        experts, rows = make_experts(jnp.float64), make_rows(num_rows).astype(jnp.float64)
        output = infer(experts, rows, jnp.array(sizes, jnp.int32))
    assert output.dtype == jnp.float64
    np.testing.assert_allclose(output, exact(experts, rows, sizes), rtol=1e-12, atol=1e-14)


@dtypes
@pytest.mark.parametrize(
    "hidden, intermediate",
    [
        (8192, 200),  # Both contracted axes in parts: a vector under 16 KB, copies under 4 MB.
        (4099, 7),  # A prime number has no parts.
    ],
)
def test_single_rows_of_real_width(hidden, intermediate, dtype):
    experts = clamped_experts(3, hidden, intermediate, dtype)
    rows, sizes = jax.random.normal(jax.random.key(1), (3, hidden)), [2, 0, 1]
    assert are_single_rows(3, 3)
    output = infer(experts, rows, jnp.array(sizes, jnp.int32))
    assert_close(output, exact(experts, rows, sizes))


@pytest.mark.parametrize("num_rows", [3, 9, 150])
def test_no_intermediate_width(num_rows):
    """Nothing is computed, nothing fails: each output is an empty sum."""
    experts = jax.tree.map(lambda stack: stack[..., :0, :], make_experts(jnp.float32, 3))
    output = infer(experts, make_rows(num_rows), jnp.array([num_rows, 0, 0], jnp.int32))
    assert output.shape == (num_rows, HIDDEN) and not np.asarray(output).any()


def test_single_rows_hold_two_parts_of_one_matrix():
    """The up-projection is read in place; of the down-projection two parts of 4 MB are copied."""
    experts = clamped_experts(8, 4096, 512, jnp.float32)
    arguments = (experts, jnp.zeros((4, 4096)), jnp.zeros(8, jnp.int32))
    memory = infer.lower(*arguments).compile().compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 9.5e6 < experts.down[0].nbytes + experts.gate_up[0].nbytes


@pytest.mark.parametrize(
    "num_rows, num_groups, single, size",
    [
        (0, 4, False, None),
        (1, 1, True, 4),
        (6, 256, True, 4),  # One token of DeepSeek-V4-Flash.
        (256, 256, True, 4),
        (257, 256, False, 4),
        (512, 256, False, 4),
        (513, 256, False, 8),
        (768, 256, False, 8),  # 128 tokens.
        (1536, 256, False, 8),  # A mean group and a third of it are 8.
        (1537, 256, False, 16),
        (4096, 256, False, 24),
        (4097, 256, False, None),  # The mean group is larger than 16 rows.
        (17, 1, False, None),
    ],
)
def test_what_is_chosen(num_rows, num_groups, single, size):
    assert are_single_rows(num_rows, num_groups) is single
    assert tile_size(num_rows, num_groups) == size


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_layer(tokens):
    """A whole layer, from one token on."""
    router = bx.TopKRouter(HIDDEN, GROUPS, 2, key=jax.random.key(2))
    moe = bx.RoutedMoE(router, make_experts(jnp.float32), dispatch=make_dispatch(bx, "blocks"))
    hidden_states = make_rows(tokens)
    output, routing = eqx.filter_jit(moe)(hidden_states)
    weights, gate_up, down = (
        np.asarray(array, np.float64)
        for array in (routing.weights, moe.experts.gate_up, moe.experts.down)
    )
    tokens_in_float64 = np.asarray(hidden_states, np.float64)
    indices = np.asarray(routing.indices)
    assert_close(output, oracle.routed(tokens_in_float64, indices, weights, gate_up, down, LIMIT))

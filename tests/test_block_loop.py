"""The loop over blocks, and the turns that an accelerator takes, which run here on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import braidax as bx
from braidax._matmul import FeedForwardWeights

HIDDEN, INTERMEDIATE = 6, 5
# A group of many blocks, one without rows, one row, one without rows at the end; 9 rows of nobody.
GROUP_SIZES = np.array([70, 0, 1, 20, 0], np.int32)
NUM_ROWS = int(GROUP_SIZES.sum()) + 9


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture(params=["cpu", "accelerator"])
def blocks(request, monkeypatch):
    """`blocks(method)` is that method of `Blocks()` as it is lowered for the platform."""
    if request.param == "accelerator":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *operands, default, **others: default(*operands)
        )

    # Without the library's own `jax.jit`, which would remember the program of the other platform.
    def call(method, *operands, round_operands=False, **options):
        kernel = bx.matmul.Blocks(round_operands)
        function = partial(getattr(bx.matmul.Blocks, method).__wrapped__, kernel, **options)
        return jax.jit(function)(*operands)

    return call


def by_group(function):
    """`function(group, rows of the group)` of every group."""
    stops = np.cumsum(GROUP_SIZES)
    return [function(g, slice(stops[g] - GROUP_SIZES[g], stops[g])) for g in range(len(stops))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_platform_gives_the_products_of_the_groups(blocks, dtype):
    # bfloat16 holds these integers, and float32 their sums, so no entry is rounded.
    draw = partial(np.random.default_rng(0).integers, -4, 5)
    rows, other = draw(size=(NUM_ROWS, HIDDEN)), draw(size=(NUM_ROWS, INTERMEDIATE))
    stack = draw(size=(len(GROUP_SIZES), HIDDEN, INTERMEDIATE))
    rows_, other_, stack_ = (jnp.asarray(array, dtype) for array in (rows, other, stack))
    options = {"transposed": False, "out_dtype": jnp.dtype("float32")}
    product = np.asarray(blocks("multiply", rows_, stack_, GROUP_SIZES, **options))
    want = np.concatenate(by_group(lambda g, own: rows[own] @ stack[g]))
    np.testing.assert_array_equal(product[: len(want)], want)
    sums = blocks("outer", rows_, other_, GROUP_SIZES, out_dtype=jnp.dtype(dtype))
    assert sums.dtype == dtype
    want = np.stack(by_group(lambda g, own: rows[own].T @ other[own]))
    np.testing.assert_array_equal(
        np.asarray(sums, "float32"), np.asarray(jnp.asarray(want, dtype), "float32")
    )


def test_every_platform_gives_the_same_network(blocks):
    """Forward and backward against the derivative of dense products, with NaN in rows of nobody."""
    rows, cotangent = random(1, NUM_ROWS, HIDDEN), random(2, NUM_ROWS, HIDDEN)
    scales = jnp.asarray(random(0, NUM_ROWS), "float32")
    groups, activation = len(GROUP_SIZES), bx.activations.swiglu(0.4)
    shapes = ((2 * INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (2 * INTERMEDIATE,), (HIDDEN,))
    weights = (random(3 + i, groups, *shape) for i, shape in enumerate(shapes))
    weights = FeedForwardWeights(*(jnp.asarray(weight, "float32") for weight in weights))
    rows, cotangent = (jnp.asarray(array, "float32") for array in (rows, cotangent))
    owner = np.repeat(np.arange(groups), GROUP_SIZES)

    def dense(rows, scales, weights):
        up, down, up_bias, down_bias = (weight[owner] for weight in weights)
        before = jnp.einsum("rh,rih->ri", rows, up) + up_bias
        inner = activation(*jnp.split(before, 2, axis=1))
        return scales[:, None] * (jnp.einsum("ri,rih->rh", inner, down) + down_bias), before

    count = len(owner)
    (want, before), transpose = jax.vjp(dense, rows[:count], scales[:count], weights)
    gradients = transpose((cotangent[:count], jnp.zeros_like(before)))
    poisoned = rows.at[count:].set(jnp.nan)
    operands = (poisoned, scales.at[count:].set(jnp.nan), weights, GROUP_SIZES)
    output, saved = blocks("forward_saving", *operands, activation=activation)
    assert_close(output[:count], want)
    assert_close(saved[:count], before)
    d_rows, d_scales, d_weights = blocks(
        "backward", *operands, saved, cotangent, activation=activation
    )
    ours, theirs = (d_rows[:count], d_scales[:count], *d_weights), (*gradients[:2], *gradients[2])
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def add(gate, up):
    return gate + up


def test_every_platform_rounds_operands_if_asked(blocks):
    """Integers, which float32 sums exactly: only the roundings to bfloat16 that are asked for."""
    rng = np.random.default_rng(0)
    groups, count = len(GROUP_SIZES), int(GROUP_SIZES.sum())
    rows, cotangent = (rng.integers(-m, m + 1, (NUM_ROWS, HIDDEN)) for m in (40, 300))
    up = rng.integers(-3, 4, (groups, 2 * INTERMEDIATE, HIDDEN))
    down = rng.integers(-3, 4, (groups, INTERMEDIATE, HIDDEN))
    scales = rng.choice([0.5, 1, 2], NUM_ROWS)

    def rounded(array):
        return np.asarray(jnp.asarray(array, "bfloat16"), "float64")

    def expected(rounded):
        """Output, cotangents of rows and scales, and of both stacks, before they are rounded."""
        d_up, d_down = np.zeros(up.shape), np.zeros(down.shape)
        output, d_rows = np.zeros((2, count, HIDDEN))
        d_scales = np.zeros(count)
        for g, own in enumerate(by_group(lambda _, own: own)):
            scale, back = scales[own, None], cotangent[own]
            activations = add(*np.split(rows[own] @ up[g].T, 2, axis=1))
            inner = rounded(back) @ down[g].T
            before = rounded(np.concatenate([inner, inner], axis=1) * scale)
            output[own] = scale * (rounded(activations) @ down[g])
            d_scales[own] = (inner * activations).sum(axis=1)
            d_rows[own], d_up[g] = before @ up[g], before.T @ rows[own]
            d_down[g] = rounded(activations * scale).T @ rounded(back)
        return output, d_rows, d_scales, d_up, d_down

    options = {"round_operands": True, "activation": add}
    weights = FeedForwardWeights(jnp.asarray(up, "bfloat16"), jnp.asarray(down, "bfloat16"))
    operands = (jnp.asarray(rows, "bfloat16"), jnp.asarray(scales, "float32"), weights, GROUP_SIZES)
    output, saved = blocks("forward_saving", *operands, **options)
    back = jnp.asarray(cotangent, "float32")
    d_rows, d_scales, d_weights = blocks("backward", *operands, saved, back, **options)
    found = (output[:count], d_rows[:count], d_scales[:count], *d_weights[:2])
    want, exact = expected(rounded), expected(lambda array: array)
    for one, other, unrounded in zip(found, want, exact, strict=True):
        other = np.asarray(jnp.asarray(other, one.dtype), "float64")
        np.testing.assert_array_equal(np.asarray(one, "float64"), other)
        assert (other != unrounded).any()


def test_every_platform_decodes_alike(blocks):
    """Three rows for five groups: one of nobody, whose NaN must not reach the others."""
    sizes, owner = np.array([0, 1, 0, 0, 1], np.int32), np.array([1, 4])
    up, down = random(7, 5, 2 * INTERMEDIATE, HIDDEN), random(8, 5, INTERMEDIATE, HIDDEN)
    rows = random(9, 3, HIDDEN)
    rows[2] = np.nan
    weights = FeedForwardWeights(jnp.asarray(up, "float32"), jnp.asarray(down, "float32"))
    options = {"activation": bx.activations.swiglu()}
    scales = np.array([2, -3, 1], np.float32)
    output = blocks("forward", jnp.asarray(rows, "float32"), scales, weights, sizes, **options)
    gate, value = np.split(np.einsum("rh,rih->ri", rows[:2], up[owner]), 2, axis=1)
    want = np.einsum("ri,rih->rh", gate / (1 + np.exp(-gate)) * value, down[owner])
    assert_close(output[:2], scales[:2, None] * want)


def test_narrow_gradients_are_rounded_once(blocks):
    """256 + 1 + 1, each in a block of its own: bfloat16 holds 258, and 256 + 1 rounds to 256."""
    num_rows = 3 * 512
    right = np.zeros((num_rows, 1), np.float32)
    right[[0, 600, 1200], 0] = 256, 1, 1
    left = jnp.ones((num_rows, 1), jnp.bfloat16)
    right = jnp.asarray(right, jnp.bfloat16)
    sizes, dtype = jnp.array([num_rows], jnp.int32), jnp.dtype(jnp.bfloat16)
    assert float(blocks("outer", left, right, sizes, out_dtype=dtype)[0, 0, 0]) == 258

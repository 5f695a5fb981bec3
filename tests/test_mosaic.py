"""`Mosaic()`: its kernels, interpreted on a CPU, and where `Auto()` takes them.

The operands are small integers. Every sum is exact then, in every dtype and order, and numbers are
compared exactly: the only rounding left is that of the result, which numpy does as well.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted

import braidax as bx
from braidax._matmul.elementwise import inlined, is_elementwise

KERNEL = bx.matmul.Mosaic(num_cores=2)
# Five groups. Rows past them are nobody's.
GROUP_SIZES = [
    [100, 0, 60, 1, 0],  # empty groups, and some that end inside of a tile
    [0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0],
    [0, 0, 0, 160, 40],
]
MORE_GROUP_SIZES = [
    [1, 1, 1, 1, 1],
    [64, 128, 8, 120, 8],  # aligned with tiles of 64 rows
    [63, 127, 63, 64, 13],
    [0, 0, 0, 0, 330],
    [2, 2, 1, 0, 0],
]


def slow_but(count, cases):
    """The first `count` cases in `nox -s tests`, and the others in `nox -s tests_slow`."""
    return [
        *cases[:count],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[count:]),
    ]


def integers(seed, shape, dtype, density=1.0):
    """Numbers from -2 to 2, and 0 where they are not dense."""
    generator = np.random.default_rng(seed)
    numbers = generator.integers(-2, 3, shape) * (generator.random(shape) < density)
    return jnp.asarray(numbers, dtype)


def slices(group_sizes):
    stops = np.cumsum(group_sizes)
    return [slice(stop - size, stop) for stop, size in zip(stops, group_sizes, strict=True)]


def rounded(array, dtype):
    return np.asarray(array).astype(dtype).astype(np.float64)


def as_float64(array):
    return np.asarray(array, np.float64)


def check_multiply(group_sizes, rows, weight, *, transposed, out_dtype):
    sizes, out_dtype = jnp.asarray(group_sizes, jnp.int32), jnp.dtype(out_dtype)
    product = KERNEL.cleared_multiply(
        rows, weight, sizes, transposed=transposed, out_dtype=out_dtype
    )
    want = np.zeros(product.shape)
    matrices = as_float64(weight).swapaxes(1, 2) if transposed else as_float64(weight)
    for own, matrix in zip(slices(group_sizes), matrices, strict=True):
        want[own] = as_float64(rows[own]) @ matrix
    assert product.dtype == out_dtype
    np.testing.assert_array_equal(as_float64(product), rounded(want, out_dtype))


def check_outer(group_sizes, left, right, *, out_dtype):
    sizes, out_dtype = jnp.asarray(group_sizes, jnp.int32), jnp.dtype(out_dtype)
    product = KERNEL.cleared_outer(left, right, sizes, out_dtype=out_dtype)
    want = [as_float64(left[own]).T @ as_float64(right[own]) for own in slices(group_sizes)]
    assert product.dtype == out_dtype
    np.testing.assert_array_equal(as_float64(product), rounded(np.stack(want), out_dtype))


def cases(num_rows, more):
    return [sizes for sizes in GROUP_SIZES + more * MORE_GROUP_SIZES if sum(sizes) <= num_rows]


# Tiles are low where groups have few rows, and high where they have many.
PRODUCTS = [
    ("bfloat16", "float32", False, 333, (128, 64), False),
    ("float16", "float16", True, 200, (64, 192), False),
    ("bfloat16", "bfloat16", True, 333, (192, 64), True),
    ("float16", "float32", True, 335, (64, 128), True),
    ("bfloat16", "bfloat16", False, 5, (64, 64), True),
]


@pytest.mark.parametrize(
    "dtype, out_dtype, transposed, num_rows, widths, more", slow_but(1, PRODUCTS)
)
def test_multiply(dtype, out_dtype, transposed, num_rows, widths, more):
    rows, weight = integers(0, (num_rows, widths[0]), dtype), integers(1, (5, *widths), dtype)
    weight = weight.swapaxes(1, 2) if transposed else weight
    options = {"transposed": transposed, "out_dtype": out_dtype}
    with interpreted():
        for sizes in cases(num_rows, more):
            check_multiply(sizes, rows, weight, **options)
        # NaN in a neighbour's row, in a row of nobody, and in the matrix of another group.
        rows = rows.at[jnp.array([2, 4])].set(jnp.nan)
        check_multiply([3, 0, 1, 0, 0], rows, weight.at[1].set(jnp.nan), **options)
        check_multiply([1, 0, 0, 2, 0], rows, weight.at[0].set(jnp.nan), **options)


SUMS = [
    ("bfloat16", "bfloat16", 333, (128, 64), False),
    ("float16", "float32", 333, (64, 192), True),
    ("float16", "float16", 5, (1, 64), True),
]


@pytest.mark.parametrize("dtype, out_dtype, num_rows, widths, more", slow_but(1, SUMS))
def test_outer(dtype, out_dtype, num_rows, widths, more):
    left, right = (integers(i, (num_rows, width), dtype) for i, width in enumerate(widths))
    with interpreted():
        for sizes in cases(num_rows, more):
            check_outer(sizes, left, right, out_dtype=out_dtype)
        left, right = left.at[2].set(jnp.nan), right.at[3].set(jnp.nan)
        check_outer([2, 0, 0, 0, 1], left, right, out_dtype=out_dtype)
        check_outer([3, 0, 0, 2, 0], left, right, out_dtype=out_dtype)


def bilinear(gate, up):
    return gate * up


def positive(up):
    return jax.nn.relu(up)


def not_elementwise(up):
    return jnp.flip(up, axis=-1)


def make_experts(activation, use_bias, dtype, *, experts=5, hidden=64, intermediate=128):
    """Experts whose numbers and gradients are exact in 16 bits."""
    initial = bx.Experts(
        experts,
        hidden,
        intermediate,
        activation=activation,
        use_bias=use_bias,
        dtype=dtype,
        key=jax.random.key(0),
    )
    leaves, tree = jax.tree.flatten(initial)
    leaves = [integers(i, leaf.shape, dtype, 0.1) for i, leaf in enumerate(leaves)]
    return tree.unflatten(leaves)


def make_routing(indices, num_experts):
    """Weights of a half and one. Nobody's are 0."""
    indices = jnp.asarray(indices, jnp.int32)
    weights = jnp.where(indices % 2 == 0, 0.5, 1.0) * (indices < num_experts)
    scores = jnp.zeros((len(indices), num_experts))
    return bx.Routing(indices, weights, scores, scores, None, jnp.zeros((), jnp.int32))


NETWORKS = [
    (bilinear, False, "bfloat16"),
    (positive, False, "float16"),
    (bilinear, True, "bfloat16"),
    (not_elementwise, False, "bfloat16"),
]


@pytest.mark.parametrize("activation, use_bias, dtype", slow_but(1, NETWORKS))
def test_a_layer_forward_and_backward(activation, use_bias, dtype):
    """Against every expert on every token, exactly: also with a token of nobody that holds NaN, and
    an expert without tokens."""
    experts = make_experts(activation, use_bias, dtype)
    indices = np.random.default_rng(3).integers(0, 4, (24, 2))
    indices[5:7] = 5
    indices[8, 1] = 5
    tokens = integers(4, (24, 64), dtype, 0.2).at[5].set(jnp.nan)
    cotangent = integers(5, (24, 64), jnp.float32, 0.2)

    def run(dispatch):
        def apply(experts, tokens):
            return dispatch(experts, tokens, make_routing(indices, 5))[0]

        output, vjp = jax.vjp(apply, experts, tokens)
        return output, apply(experts, tokens), *vjp(cotangent)

    with interpreted():
        got = jax.block_until_ready(jax.jit(lambda: run(bx.SortedDispatch(KERNEL)))())
    want = jax.jit(lambda: run(bx.DenseDispatch()))()
    assert np.abs(as_float64(want[0])).max() > 4
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(as_float64(ours), as_float64(theirs))


@pytest.mark.slow
def test_256_experts():
    group_sizes = np.zeros(256, int)
    group_sizes[[0, 3, 128, 200, 255]] = 1, 70, 9, 2, 40
    rows, weight = integers(0, (130, 64), "bfloat16"), integers(1, (256, 64, 64), "bfloat16")
    with interpreted():
        check_multiply(group_sizes, rows, weight, transposed=True, out_dtype="float32")
        check_outer(group_sizes, rows, rows, out_dtype="bfloat16")


@pytest.mark.parametrize(
    "dtype, widths, num_rows",
    [("float32", (64, 64), 7), ("bfloat16", (64, 12), 7), ("bfloat16", (64, 64), 0)],
)
def test_what_blocks_computes(dtype, widths, num_rows):
    """A kernel that is not interpreted would not run here."""
    rows, weight = integers(0, (num_rows, widths[0]), dtype), integers(1, (5, *widths), dtype)
    sizes = [3, 0, 1, 0, 1] if num_rows else [0] * 5
    check_multiply(sizes, rows, weight, transposed=False, out_dtype="float32")
    check_outer(sizes, rows, rows[:, : widths[1]], out_dtype=dtype)
    experts = make_experts(bilinear, False, dtype, hidden=widths[1])
    product, tokens = bx.GroupedMatmul(KERNEL), integers(2, (num_rows, widths[1]), dtype)
    if dtype == "float32":
        want = experts(tokens, jnp.asarray(sizes), bx.GroupedMatmul(bx.matmul.Blocks()))
        np.testing.assert_array_equal(experts(tokens, jnp.asarray(sizes), product), want)


@jax.custom_vjp
def with_rules(x):
    return x * jnp.tanh(x)


with_rules.defvjp(lambda x: (with_rules(x), x), lambda x, cotangent: (cotangent * x,))


@pytest.mark.parametrize(
    "activation, count",
    [
        (bx.activations.swiglu(2.0), 2),
        (jax.nn.relu, 1),
        (jax.nn.gelu, 1),
        (lambda x: jnp.clip(x, -1, 2) ** 3, 1),
        (with_rules, 1),
    ],
)
def test_an_activation_inside_of_a_kernel(activation, count):
    assert is_elementwise(activation, count)
    tiles = [jax.random.normal(jax.random.key(i), (8, 16)) for i in range(count)]
    np.testing.assert_array_equal(inlined(activation)(*tiles), activation(*tiles))
    names = {
        equation.primitive.name for equation in jax.make_jaxpr(inlined(activation))(*tiles).eqns
    }
    assert not {name for name in names if "jit" in name or "custom" in name}


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: x - x.mean(axis=-1, keepdims=True),
        lambda x: jnp.cumsum(x, axis=-1),
        lambda x: x[:, ::-1],
        lambda x: x * jnp.arange(64.0)[None],
        lambda x: (x > 0).astype(jnp.float32),
        lambda x: x**-2,
        jax.nn.softplus,
    ],
)
def test_an_activation_outside_of_the_kernel(activation):
    assert not is_elementwise(activation, 1)


@pytest.mark.parametrize(
    "capability, dtype, kernel",
    [
        ("9.0", "bfloat16", bx.matmul.Mosaic()),
        ("9.0", "float16", bx.matmul.Mosaic()),
        ("9.0", "float32", bx.matmul.Blocks()),
        ("9.0", None, bx.matmul.Blocks()),
        ("8.0", "bfloat16", bx.matmul.Blocks()),
        ("10.0", "bfloat16", bx.matmul.Blocks()),
        (None, "bfloat16", bx.matmul.Blocks()),
    ],
)
def test_auto_chooses_by_the_attached_gpu(monkeypatch, capability, dtype, kernel):
    gpu = None if capability is None else types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr("braidax._matmul.auto.attached_gpu", lambda: gpu)
    auto = bx.matmul.Auto()
    assert auto.chosen("cuda", dtype) == auto.chosen("gpu", dtype) == kernel
    assert auto.chosen("tpu", dtype) == bx.matmul.Ragged()
    assert auto.chosen("cpu", dtype) == bx.matmul.Blocks()


def test_auto_takes_the_kernel_that_is_named():
    auto = bx.matmul.Auto(cuda=KERNEL)
    assert auto.chosen("cuda", "bfloat16") == KERNEL
    assert auto.chosen("cuda", "float32") == bx.matmul.Blocks()
    assert bx.matmul.Auto(cuda=bx.matmul.Ragged()).chosen("cuda") == bx.matmul.Ragged()


def test_a_program_for_many_platforms_runs_on_this_one():
    experts = make_experts(bilinear, False, "bfloat16")
    tokens, routing = integers(4, (8, 64), "bfloat16"), make_routing(np.full((8, 2), 3), 5)
    outputs = [
        jax.jit(bx.SortedDispatch(matmul))(experts, tokens, routing)[0]
        for matmul in (bx.matmul.Auto(cuda=KERNEL), bx.matmul.Blocks())
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.usefixtures("unchecked")
def test_arguments():
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="num_cores"):
            bx.matmul.Mosaic(num_cores=wrong)
    for wrong in (bx.matmul.Dense(), "mosaic"):
        with pytest.raises(TypeError, match="`cuda` must be a kernel"):
            bx.matmul.Auto(cuda=wrong)

"""vmap, grad, scan, checkpoint, jit and serialisation of the block, with either router."""

import io
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BACKENDS, ROUTERS, assert_close, make_block, make_inputs, slow_but_one

import braidax as bx

every_kind = pytest.mark.parametrize("kind", slow_but_one(ROUTERS))
# The dense dispatch is what the others are compared with.
every_sorted_backend = pytest.mark.parametrize(
    "backend", slow_but_one([case.name for case in BACKENDS if case.name != "dense"])
)


def loss(block, hidden_states, input_ids):
    return jnp.sum(jnp.sin(block(hidden_states, input_ids)[0]))


# Compiled whole: called eagerly, a block has each of its operations compiled by itself.
@eqx.filter_jit
def forward(block, *inputs, mask=None):
    return block(*inputs, mask=mask)[0]


@eqx.filter_jit
def mapped(block, *inputs):
    """The outputs of `jax.vmap(block)` and of that mapped once more."""
    return jax.vmap(block)(*inputs)[0], jax.vmap(jax.vmap(block))(*inputs)[0]


@eqx.filter_jit
def grad_of_vmap(block, hidden_states, input_ids):
    def total(pair):
        block, hidden_states = pair
        return jnp.sum(jnp.sin(jax.vmap(block)(hidden_states, input_ids)[0]))

    return eqx.filter_grad(total)((block, hidden_states))


@eqx.filter_jit
def per_example(block, hidden_states, input_ids):
    return jax.vmap(lambda x, ids: eqx.filter_grad(loss)(block, x, ids))(hidden_states, input_ids)


def assert_trees_close(actual, desired):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert_close(a, b)


@pytest.fixture(scope="module", params=slow_but_one(["top_k", "hash"]))
def oracle(request):
    """The dense backend, one example at a time: outputs, weight gradients, input gradients."""
    block = make_block(bx, request.param, "dense")
    hidden_states, input_ids = make_inputs((3, 6))
    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    input_gradient = eqx.filter_jit(jax.grad(loss, argnums=1))
    examples = list(zip(hidden_states, input_ids, strict=True))
    return (
        request.param,
        jnp.stack([forward(block, x, ids) for x, ids in examples]),
        [gradient(block, x, ids) for x, ids in examples],
        jnp.stack([input_gradient(block, x, ids) for x, ids in examples]),
    )


@pytest.mark.hazard(46)
@every_sorted_backend
def test_vmap_and_grad_either_way_round(oracle, backend):
    kind, outputs, gradients, input_gradients = oracle
    block = make_block(bx, kind, backend)
    hidden_states, input_ids = make_inputs((3, 6))

    assert_close(forward(block, hidden_states, input_ids), outputs)
    for output in mapped(block, hidden_states, input_ids):
        assert_close(output, outputs)
    assert_trees_close(
        per_example(block, hidden_states, input_ids),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients),
    )
    block_gradient, hidden_gradient = grad_of_vmap(block, hidden_states, input_ids)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
    assert_trees_close(block_gradient, summed)
    assert_close(hidden_gradient, input_gradients)


def test_eager_vmap(oracle):
    """As in a notebook."""
    kind, outputs, _, _ = oracle
    block = make_block(bx, kind, "blocks")
    assert_close(jax.vmap(block)(*make_inputs((3, 6)))[0], outputs)


@every_sorted_backend
def test_vmap_with_masks_of_different_lengths(backend):
    """Padding leaves rows that belong to no group: they must not shift the other examples'."""
    hidden_states, input_ids = make_inputs((3, 6))
    mask = jnp.arange(6)[None] < jnp.asarray([6, 2, 0])[:, None]
    block, dense = make_block(bx, "top_k", backend), make_block(bx, "top_k", "dense")

    @eqx.filter_jit
    def mapped_with_gradient(block):
        def loss(block, x, ids, mask):
            output, _ = block(x, ids, mask=mask)
            return jnp.sum(jnp.sin(output)), output

        value_and_grad = eqx.filter_value_and_grad(loss, has_aux=True)
        run = jax.vmap(value_and_grad, in_axes=(None, 0, 0, 0))
        (_, output), gradient = run(block, hidden_states, input_ids, mask)
        return output, gradient

    (output, gradient), (_, desired) = map(mapped_with_gradient, (block, dense))
    assert_close(output, forward(dense, hidden_states, input_ids, mask=mask))
    assert_trees_close(gradient, desired)


def test_ensemble_of_blocks():
    """The weights mapped as well as the tokens, or the weights alone."""
    keys = jax.random.split(jax.random.key(5), 3)
    make = lambda key: make_block(bx, "top_k", "blocks", key)  # noqa: E731
    blocks = [make(key) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    hidden_states, _ = make_inputs((3, 6))
    both = eqx.filter_jit(eqx.filter_vmap(forward))(stacked, hidden_states)
    examples = zip(blocks, hidden_states, strict=True)
    assert_close(both, jnp.stack([forward(block, x) for block, x in examples]))
    alone = eqx.filter_jit(eqx.filter_vmap(lambda block: forward(block, hidden_states[0])))(stacked)
    assert_close(alone, jnp.stack([forward(block, hidden_states[0]) for block in blocks]))


@pytest.mark.hazard(46)
@every_kind
def test_scan_over_stacked_layers(kind):
    blocks = [make_block(bx, kind, "blocks", key) for key in jax.random.split(jax.random.key(6), 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    hidden_states, input_ids = make_inputs()

    def by_scan(stacked):
        def layer(x, block):
            output, routing = block(x, input_ids)
            return x + output, routing

        return jax.lax.scan(layer, hidden_states, stacked)

    def by_loop(stacked):
        output = hidden_states
        for i in range(3):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            output = output + block(output, input_ids)[0]
        return output, None

    def value_and_gradient(run):
        def loss(stacked):
            output, routings = run(stacked)
            return jnp.sum(jnp.sin(output)), (output, routings)

        (_, auxiliary), gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(
            stacked
        )
        return *auxiliary, gradient

    (output, routings, gradient), (desired, _, desired_gradient) = map(
        value_and_gradient, (by_scan, by_loop)
    )
    assert_close(output, desired)
    assert routings.indices.shape == (3, *input_ids.shape, 3)
    assert_trees_close(gradient, desired_gradient)


@pytest.mark.hazard(46)
@every_kind
def test_checkpoint_gives_the_same_gradient(kind):
    block = make_block(bx, kind, "blocks")
    hidden_states, input_ids = make_inputs()
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(block, hidden_states, input_ids)

    @eqx.filter_jit
    @eqx.filter_grad
    def recomputed(block):
        return eqx.filter_checkpoint(loss)(block, hidden_states, input_ids)

    assert_trees_close(recomputed(block), gradient)


def test_reverse_over_reverse():
    hidden_states, input_ids = make_inputs((4,))

    def curvature(backend):
        block = make_block(bx, "top_k", backend)
        inner = jax.grad(lambda x: loss(block, x, input_ids))
        return jax.jit(jax.grad(lambda x: jnp.sum(inner(x) ** 2)))(hidden_states)

    assert_close(curvature("blocks"), curvature("dense"))


def test_forward_mode_on_the_dense_backend():
    block = make_block(bx, "top_k", "dense")
    hidden_states, _ = make_inputs((4,))
    tangent = jax.random.normal(jax.random.key(8), hidden_states.shape)
    output = partial(forward, block)
    directional = jax.jvp(output, (hidden_states,), (tangent,))[1]
    jacobian = jax.jacrev(output)(hidden_states)
    assert_close(directional, jnp.tensordot(jacobian, tangent, axes=2))
    with pytest.raises(TypeError, match="forward-mode"):
        sorted_block = make_block(bx, "top_k", "blocks")
        jax.jvp(lambda x: sorted_block(x)[0], (hidden_states,), (tangent,))


@pytest.mark.hazard(46)
@every_kind
def test_filter_jit_compiles_once(kind):
    block = make_block(bx, kind, "blocks")
    hidden_states, input_ids = make_inputs()
    traces = []

    @eqx.filter_jit
    def call(block, hidden_states, input_ids):
        traces.append(None)
        return block(hidden_states, input_ids)

    call(block, hidden_states, input_ids)
    call(jax.tree.map(lambda leaf: leaf, block), hidden_states + 1, input_ids)
    assert len(traces) == 1


@pytest.mark.hazard(
    45, "files: the same bits back; another shape, dtype or a missing tensor is an error"
)
@every_kind
def test_serialisation_is_exact(kind):
    block = make_block(bx, kind, "blocks")
    other = make_block(bx, kind, "blocks", jax.random.key(77))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, block)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, other)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(block), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_loop_does_work_in_proportion_to_the_assignments():
    """Rows and not experts x rows: the loop's trip count is the number of non-empty blocks."""
    from braidax._matmul.block_loop import _plan, block_sizes

    sizes = block_sizes(4096, 64)
    everything_on_one = jnp.zeros(64, jnp.int32).at[7].set(4096)
    spread = jnp.full(64, 64, jnp.int32)
    assert sizes[-1] == 80  # the mean group of 64 and a quarter more
    assert int(_plan(everything_on_one, 4096, 80).count) == 52
    assert int(_plan(spread, 4096, 80).count) == 64
    assert int(_plan(jnp.zeros(64, jnp.int32), 4096, 80).count) == 0


@pytest.mark.slow
@pytest.mark.hazard(45)
@pytest.mark.parametrize("kind", ["hash", "top_k"])
def test_numpy_leaves_give_the_same_bits(kind):
    """As `jax.device_get` or a checkpoint restores them; compiled and not."""
    block = make_block(bx, kind, "blocks")
    hidden_states, input_ids = make_inputs((4,))
    group_sizes, product = jnp.asarray([1, 0, 2, 1, 0]), bx.GroupedMatmul(bx.matmul.Blocks())
    calls = {
        "block": (block, (hidden_states, input_ids)),
        "router": (block.routed.router, (hidden_states, input_ids)),
        "gate": (block.routed.router.gate, (hidden_states,)),
        "shared": (block.shared, (hidden_states,)),
        "experts": (block.routed.experts, (hidden_states, group_sizes, product)),
    }
    for name, (module, arguments) in calls.items():
        restored = jax.device_get(module)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored)), name
        for jit in (True, False):
            with jax.disable_jit(not jit):
                got, desired = restored(*arguments), module(*arguments)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(desired), strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@pytest.mark.slow
def test_looking_for_nan_finds_none_in_a_healthy_block():
    """Operation by operation: nothing makes a NaN that a select then leaves out."""
    block = make_block(bx, "hash", "blocks")
    hidden_states, input_ids = make_inputs((4,))
    with jax.disable_jit(), jax.debug_nans(True):
        value, gradient = eqx.filter_value_and_grad(loss)(block, hidden_states, input_ids)
        _, routing = block(hidden_states, input_ids)
        again, _ = block(hidden_states, routing=routing)
        losses = bx.sequence_balance_loss(routing) + bx.router_z_loss(routing)
        with pytest.raises(FloatingPointError):  # a token that has no answer
            block(hidden_states, input_ids.at[1].set(-1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient, losses)))
    assert_close(jnp.sum(jnp.sin(again)), value)

"""Muon over a whole model, matrix by matrix, against optax's own Muon of a single 2-D matrix.

The matrices are listed here by hand, input axis first, as optax has them.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow_but_one
from collectives import collectives
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers, muon

import braidax as bx

LAYERS, EXPERTS, HIDDEN, LATENT, INTERMEDIATE, VOCAB = 2, 4, 12, 6, 10, 7
MATRIX_ARRAYS = 12  # the arrays that `matrices` reads
OPTIONS = {"learning_rate": 0.5, "beta": 0.0}  # without momentum
CONFIG = bx.MoEConfig(
    *(HIDDEN, INTERMEDIATE, EXPERTS, 2),
    num_hash_layers=1,
    vocab_size=VOCAB,
    latent_size=LATENT,
    use_shared_gate=True,
    use_expert_bias=True,
)
FIRST, HEAD = (lambda model: model["first"]), (lambda model: model["head"].weight)


class Attention(eqx.Module):
    """A user's layer, with a matrix that only the user knows."""

    project: eqx.nn.Linear
    query: jax.Array  # (hidden, heads, head_size)


@functools.cache
def make_model():
    keys = jax.random.split(jax.random.key(0), LAYERS + 4)
    layer = lambda key: bx.RoutedAndSharedMoE.from_config(CONFIG, 1, key=key)  # noqa: E731
    return {
        "embedding": eqx.nn.Embedding(VOCAB, HIDDEN, key=keys[0]),
        "attention": Attention(
            eqx.nn.Linear(HIDDEN, 5, key=keys[1]), jax.random.normal(keys[1], (HIDDEN, 2, 3))
        ),
        "first": bx.RoutedMoE.from_config(CONFIG, 0, key=keys[2]),
        "layers": eqx.filter_vmap(layer)(keys[4:]),  # stacked
        "norm": eqx.nn.RMSNorm(HIDDEN),
        "head": eqx.nn.Linear(HIDDEN, VOCAB, key=keys[3]),
        "activation": jax.nn.silu,
    }


def trained(model):
    return eqx.filter(model, bx.trainable(model))


def matrices(model):
    """Every matrix of the model, `(input, output)`; stacks of some, matrix by matrix."""

    def feed_forward(network, *position):
        gate_up, down = network.gate_up[position], network.down[position]
        return [gate_up[0].T, gate_up[1].T, down]

    first, layers = model["first"], model["layers"]
    yield from (model["attention"].project.weight.T, model["head"].weight.T)
    yield from (first.latent.down.T, first.latent.up.T)
    for expert in range(EXPERTS):
        yield from feed_forward(first.experts, expert)
    for layer in range(LAYERS):
        yield from (layers.routed.latent.down[layer].T, layers.routed.latent.up[layer].T)
        yield from feed_forward(layers.shared, layer)
        for expert in range(EXPERTS):
            yield from feed_forward(layers.routed.experts, layer, expert)


def vectors(model):
    """What is left to AdamW, by name."""
    first, layers, attention = model["first"], model["layers"], model["attention"]
    return {
        "embedding": model["embedding"].weight,
        "query": attention.query,
        "biases": (attention.project.bias, model["head"].bias, model["norm"].bias),
        "norm": model["norm"].weight,
        "gates": (first.router.gate.weight, layers.routed.router.gate.weight),
        "shared gate": layers.shared_gate,
        "expert biases": [
            (experts.gate_up_bias, experts.down_bias)
            for experts in (first.experts, layers.routed.experts)
        ],
    }


@functools.cache
def gradients():
    """Random, and of quite another size in each expert, part and layer."""
    generator = np.random.default_rng(0)

    def random(leaf):
        sizes = 10.0 ** generator.integers(-2, 3, (*leaf.shape[:-2], 1, 1))
        return jnp.asarray(generator.normal(size=leaf.shape) * sizes, leaf.dtype).reshape(
            leaf.shape
        )

    return jax.tree.map(random, trained(make_model()))


def one_update(numbers=bx.muon_dimension_numbers, params=None, updates=None, **options):
    params = trained(make_model()) if params is None else params
    updates = gradients() if updates is None else updates
    optimizer = muon(**OPTIONS, **options, muon_weight_dimension_numbers=numbers)
    return jax.jit(optimizer.update)(updates, optimizer.init(params), params)[0]


@functools.cache
def plain_update():
    return one_update()


@functools.cache
def of_one_matrix(**options):
    optimizer = muon(**OPTIONS, **options)  # takes what has two axes
    return jax.jit(lambda matrix: optimizer.update(matrix, optimizer.init(matrix), matrix)[0])


def by_adamw(updates, params):
    """Muon's other optimizer, with the options that `optax.contrib.muon` hands on to it."""
    adamw = optax.adamw(OPTIONS["learning_rate"], weight_decay=0.0, nesterov=True)
    return jax.jit(adamw.update)(updates, adamw.init(params), params)[0]


@pytest.mark.parametrize("options", slow_but_one([{}, ({"consistent_rms": 0.2},)]))
def test_every_matrix_moves_as_by_its_own_muon(options):
    updates = one_update(**options) if options else plain_update()
    found, given = list(matrices(updates)), list(matrices(gradients()))
    assert len(found) == 4 + 3 * EXPERTS + LAYERS * (2 + 3 + 3 * EXPERTS)
    for update, gradient in zip(found, given, strict=True):
        np.testing.assert_allclose(update, of_one_matrix(**options)(gradient), atol=1e-5)


def test_every_matrix_is_orthogonal_up_to_the_factor_of_its_shape():
    """Newton-Schulz in five steps leaves singular values around 1, between 0.65 and 1.2.

    The factor, sqrt(max(1, outputs / inputs)), is wrong where inputs are taken for outputs.
    """
    for update in matrices(plain_update()):
        inputs, outputs = update.shape
        factor = OPTIONS["learning_rate"] * max(1, outputs / inputs) ** 0.5
        values = np.linalg.svd(np.asarray(update, np.float64), compute_uv=False) / factor
        assert 0.65 < values.min() and values.max() < 1.2


def test_everything_else_moves_as_by_adamw():
    params, given = vectors(trained(make_model())), vectors(gradients())
    found = vectors(plain_update())
    jax.tree.map(np.testing.assert_array_equal, found, by_adamw(given, params))
    assert len(jax.tree.leaves(found)) + MATRIX_ARRAYS == len(jax.tree.leaves(plain_update()))


def test_a_selection_bias_that_the_optimizer_sees_stays_bit_for_bit():
    block = bx.top_k_moe(HIDDEN, INTERMEDIATE, EXPERTS, 2, key=jax.random.key(0))
    bias = lambda block: block.router.score_correction_bias  # noqa: E731
    block = eqx.tree_at(bias, block, jnp.arange(4.0))
    params = eqx.filter(block, eqx.is_inexact_array)
    updates = eqx.tree_at(bias, jax.tree.map(jnp.ones_like, params), jnp.zeros(EXPERTS))
    moved = eqx.apply_updates(params, one_update(params=params, updates=updates, weight_decay=0.1))
    np.testing.assert_array_equal(bias(moved), bias(block))
    assert not np.array_equal(moved.router.gate.weight, block.router.gate.weight)


# --- the tree -----------------------------------------------------------------------------------


def is_number(node):
    return node is None or isinstance(node, MuonDimensionNumbers)


def test_every_form_of_a_model_has_its_own_structure():
    model = make_model()
    whole = bx.muon_dimension_numbers(model)
    shapes = eqx.filter_eval_shape(make_model.__wrapped__)
    masked = eqx.tree_at(FIRST, trained(model), optax.MaskedNode())
    forms = (model, shapes, trained(model), eqx.filter(model, eqx.is_inexact_array), masked)
    for params in forms:
        numbers = bx.muon_dimension_numbers(params)
        wanted = jax.tree.structure(params, is_leaf=lambda leaf: leaf is None)
        assert jax.tree.structure(numbers, is_leaf=is_number) == wanted
        assert numbers["layers"].routed.experts == whole["layers"].routed.experts
    assert numbers["first"] == optax.MaskedNode()
    found = jax.tree.leaves(whole, is_leaf=is_number)
    assert sum(number is not None for number in found) == MATRIX_ARRAYS


def test_what_the_user_knows_better_is_put_into_the_tree():
    """Inputs to a query of some heads are one matrix, and the head is left to AdamW."""

    def numbers(params):
        found = bx.muon_dimension_numbers(params)
        found = eqx.tree_at(HEAD, found, None, is_leaf=is_number)
        query = MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
        where = lambda numbers: numbers["attention"].query  # noqa: E731
        return eqx.tree_at(where, found, query, is_leaf=is_number)

    names = ("attention", "embedding", "head")
    params, given = ({n: tree[n] for n in names} for tree in (trained(make_model()), gradients()))
    updates = one_update(numbers, params, given)
    query = given["attention"].query.reshape(HIDDEN, -1)
    found = updates["attention"].query.reshape(HIDDEN, -1)
    np.testing.assert_allclose(found, of_one_matrix()(query), atol=1e-5)
    np.testing.assert_allclose(HEAD(updates), by_adamw(HEAD(given), HEAD(params)), atol=1e-5)
    project = lambda tree: tree["attention"].project.weight  # noqa: E731
    np.testing.assert_allclose(project(updates), project(plain_update()), atol=1e-5)


def test_adapters_and_routers_and_experts_of_a_user_are_left_to_adamw():
    class Adapter(eqx.Module):
        wide: jax.Array

    class Wrapped(bx.AbstractExperts):
        base: bx.Experts
        down: jax.Array

        def __call__(self, rows, group_sizes, matmul):
            raise NotImplementedError

    class OwnRouter(bx.AbstractRouter):
        gate: bx.Gate
        query: eqx.nn.Linear
        num_experts_per_token: int = eqx.field(static=True, default=1)

        def select(self, scores, logits, input_ids, *, key):
            raise NotImplementedError

    router = OwnRouter(*(make(4, 2, key=jax.random.key(0)) for make in (bx.Gate, eqx.nn.Linear)))
    assert jax.tree.leaves(bx.muon_dimension_numbers(router)) == []
    experts = bx.Experts(2, 4, 3, key=jax.random.key(0))
    adapted = eqx.tree_at(lambda e: e.down, experts, Adapter(jnp.ones((2, 3, 1))))
    numbers = bx.muon_dimension_numbers(Wrapped(adapted, jnp.ones((2, 3, 4))))
    assert numbers.down is None and numbers.base.down.wide is None
    assert numbers.base.gate_up == MuonDimensionNumbers(-1, -2)
    assert bx.muon_dimension_numbers({"up": jnp.ones((2, 2))}) == {"up": None}


def test_an_injected_hyperparameter_wants_the_name_of_the_function():
    params = trained(FIRST(make_model()))
    name = "muon_weight_dimension_numbers"
    given = {"learning_rate": 0.1, name: bx.muon_dimension_numbers}
    with pytest.raises(TypeError, match=r"`params` must.*step count"):
        optax.inject_hyperparams(muon)(**given).init(params)
    optimizer = optax.inject_hyperparams(muon, static_args=name)(**given)
    assert optimizer.init(params).hyperparams["learning_rate"] == np.float32(0.1)


# --- over devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_experts_over_devices_are_orthogonalized_where_they_lie(kind):
    """The same update, and no array leaves its device."""
    parallel = bx.ExpertParallel(jax.make_mesh((1, 4), ("data", "expert"), axis_types=(kind,) * 2))
    placed, updates = (parallel.shard(FIRST(tree)) for tree in (make_model(), gradients()))
    params = trained(placed)
    updates = jax.tree.map(lambda _, update: update, params, trained(updates))

    def compiled(numbers):
        optimizer = muon(**OPTIONS, muon_weight_dimension_numbers=numbers)
        state = parallel.shard(optimizer.init(params))
        program = jax.jit(optimizer.update).lower(updates, state, params).compile()
        return program, program(updates, state, params)[0]

    program, found = compiled(bx.muon_dimension_numbers)
    for one, other in zip(*map(jax.tree.leaves, (found, FIRST(plain_update()))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert found.experts.down.sharding.spec[0] == "expert"
    assert list(collectives(program.as_text())) == []


def test_an_expert_axis_taken_for_inputs_would_leave_its_device():
    """What the test above would see, of the mistake that stacks invite."""
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    weight = jax.device_put(jnp.ones((4, 3, 5)), jax.NamedSharding(mesh, jax.P("expert")))
    numbers = lambda _: MuonDimensionNumbers((0, 1), 2)  # noqa: E731
    optimizer = muon(**OPTIONS, muon_weight_dimension_numbers=numbers)
    state = optimizer.init(weight)
    program = jax.jit(optimizer.update).lower(weight, state, weight).compile()
    assert list(collectives(program.as_text())) != []

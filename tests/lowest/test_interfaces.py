"""Every interface once, on the lowest version of every direct dependency: `nox -s tests_lowest`.

What the numbers must be is the business of the other tests, which run on the newest versions. Here
each answer is compared with the dense dispatch, where every expert computes every token.
"""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import braidax as bx
from braidax import __main__ as program

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, VOCAB = 12, 8, 8, 2, 32
KEY = jax.random.key(0)
TABLE = bx.hash_tables.md5(VOCAB, EXPERTS, SLOTS)
TOKENS = jax.random.normal(KEY, (4, 5, HIDDEN))
IDS = jnp.arange(20).reshape(4, 5)
DISPATCHES = {
    "blocks": bx.SortedDispatch(bx.matmul.Blocks()),
    "ragged": bx.SortedDispatch(bx.matmul.Ragged()),
    "remat": bx.SortedDispatch(bx.matmul.Blocks(), remat=True),
    "dense": bx.DenseDispatch(),
}


class FirstExperts(bx.AbstractRouter):
    """A user's router."""

    gate: bx.Gate
    num_experts_per_token: int = eqx.field(static=True, default=SLOTS)

    def select(self, scores, logits, input_ids, *, key):
        indices = jnp.broadcast_to(jnp.arange(SLOTS), (*scores.shape[:-1], SLOTS))
        return indices, jnp.ones(scores.shape[:-1], bool)


SIZES = (HIDDEN, EXPERTS, SLOTS)
ROUTERS = {
    "top_k": bx.TopKRouter(*SIZES, key=KEY),
    "groups": bx.TopKRouter(*SIZES, num_groups=4, num_selected_groups=2, key=KEY),
    "softmax": bx.TopKRouter(*SIZES, score_function=jax.nn.softmax, use_bias=True, key=KEY),
    "sigmoid": bx.TopKRouter(*SIZES, score_function=jax.nn.sigmoid, scaling_factor=2.5, key=KEY),
    "hash": bx.HashRouter(*SIZES, table=TABLE, key=KEY),
    "own": FirstExperts(bx.Gate(HIDDEN, EXPERTS, key=KEY)),
}


def make_block(router="top_k", dispatch="blocks", **options):
    experts = bx.Experts(EXPERTS, HIDDEN, INTERMEDIATE, key=KEY, **options)
    routed = bx.RoutedMoE(ROUTERS[router], experts, dispatch=DISPATCHES[dispatch])
    return bx.RoutedAndSharedMoE(routed, bx.FeedForward(HIDDEN, INTERMEDIATE, key=KEY, **options))


def loss(block, tokens, ids):
    return jnp.sum(jnp.sin(block(tokens, ids)[0]))


def assert_close(actual, desired):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


CALLS = {
    "forward": lambda block: block(TOKENS, IDS),
    "gradient": lambda block: jax.tree.leaves(eqx.filter_grad(loss)(block, TOKENS, IDS)),
    "mapped": lambda block: jax.vmap(block)(TOKENS, IDS)[0],
    "mapped gradient": lambda block: jax.vmap(jax.grad(loss, 1), (None, 0, 0))(block, TOKENS, IDS),
    "one token": lambda block: block(TOKENS[0, 0], IDS[0, 0])[0],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dispatch", [name for name in DISPATCHES if name != "dense"])
def test_every_dispatch_in_every_transformation(dispatch, call):
    assert_close(
        CALLS[call](make_block("top_k", dispatch)), CALLS[call](make_block("top_k", "dense"))
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router):
    output, routing = make_block(router)(TOKENS, IDS)
    assert routing.indices.shape == (4, 5, SLOTS) and routing.indices.dtype == jnp.int32
    assert_close((output, routing), make_block(router, "dense")(TOKENS, IDS))
    assert int(bx.expert_load(routing).sum()) == 20 * SLOTS


@pytest.mark.parametrize("activation", [bx.activations.swiglu(0.4), jnp.tanh])
def test_activations_and_biases(activation):
    options = {"activation": activation, "use_bias": True}
    blocks = (make_block("hash", dispatch, **options) for dispatch in ("blocks", "dense"))
    assert_close(*(eqx.filter_grad(loss)(block, TOKENS, IDS) for block in blocks))


def test_bfloat16():
    block = bx.cast(make_block(), jnp.bfloat16)
    assert block(TOKENS.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_annotations_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        make_block()(TOKENS, IDS[0])


def test_padding_replay_and_capacity():
    block, mask = make_block(), np.arange(5) < np.array([[5], [3], [0], [1]])
    output, routing = block(TOKENS, mask=mask)
    assert not output[~mask].any() and int(bx.expert_load(routing).sum()) == 9 * SLOTS
    assert_close(block(TOKENS, routing=routing)[0], output)
    assert int(bx.over_capacity(routing, 1).dropped) > 0


def test_scan_over_stacked_layers_and_checkpoint():
    make = lambda key: bx.top_k_moe(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, key=key)  # noqa: E731
    layers, structure = eqx.partition(eqx.filter_vmap(make)(jax.random.split(KEY, 3)), eqx.is_array)

    @jax.checkpoint
    def layer(tokens, arrays):
        return tokens + eqx.combine(arrays, structure)(tokens)[0], None

    total = lambda layers: jnp.sum(jax.lax.scan(layer, TOKENS, layers)[0])  # noqa: E731
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(eqx.filter_grad(total)(layers)))


def test_serialization_and_export():
    file, block = io.BytesIO(), make_block("hash")
    eqx.tree_serialise_leaves(file, block)
    file.seek(0)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, make_block("hash")), block)
    exported = jax.export.export(jax.jit(lambda *inputs: block(*inputs)[0]))(TOKENS, IDS)
    assert_close(exported.call(TOKENS, IDS), block(TOKENS, IDS)[0])


@pytest.mark.parametrize("quantization", [None, "fp8", "fp4"])
def test_released_weights(tmp_path, quantization):
    config = bx.MoEConfig(64, 32, EXPERTS, SLOTS)
    block = bx.RoutedAndSharedMoE.from_config(config, 1, key=KEY)
    bx.save_moe(tmp_path / "layer.safetensors", block, 1, quantization=quantization)
    packed = "packed" if quantization else None
    loaded = bx.load_moe(tmp_path / "layer.safetensors", 1, config=config, dtype=packed)
    tokens = jnp.ones((3, 64))
    np.testing.assert_allclose(loaded(tokens)[0], block(tokens)[0], atol=0.2 if packed else 0)
    assert eqx.tree_equal(bx.from_state_dict(config, 1, bx.to_state_dict(block)), block)
    assert program.main(["summary", str(tmp_path)]) == 0


@pytest.mark.parametrize("exchange", [bx.exchange.Gather(), bx.exchange.AllToAll()], ids=repr)
def test_a_step_of_expert_parallelism(exchange):
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    parallel = bx.ExpertParallel(mesh, exchange=exchange)
    model = parallel.shard(make_block())
    arrays, static = eqx.partition(model, eqx.is_array)
    model = eqx.combine(jax.device_put(arrays, parallel.shardings(arrays)), static)
    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    assert_close(gradient(model, TOKENS, IDS), gradient(make_block("top_k", "dense"), TOKENS, IDS))


def test_a_training_step_under_optax():
    model = make_block()
    optimizer = optax.adamw(1e-2, mask=bx.decay_mask)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        def total(model):
            output, routing = model(TOKENS, IDS)
            balance = bx.sequence_balance_loss(routing) + bx.batch_balance_loss(routing)
            return jnp.mean((output - TOKENS) ** 2) + balance + bx.router_z_loss(routing), routing

        (value, routing), gradients = eqx.filter_value_and_grad(total, has_aux=True)(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return bx.rebalance(eqx.apply_updates(model, updates), routing, 1e-3), state, value

    losses = []
    for _ in range(3):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert losses[2] < losses[0] and model.routed.router.score_correction_bias.any()


def test_muon_orthogonalizes_every_matrix():
    block = make_block()
    params = eqx.filter(block, bx.trainable(block))
    options = {"beta": 0.0, "muon_weight_dimension_numbers": bx.muon_dimension_numbers}
    optimizer = optax.contrib.muon(1.0, **options)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    gate_up, down = updates.routed.experts.gate_up, updates.routed.experts.down
    values = jnp.linalg.svd(gate_up, compute_uv=False)
    assert values.shape == (EXPERTS, 2, INTERMEDIATE) and 0.6 < values.min() < values.max() < 1.25
    values = jnp.linalg.svd(down, compute_uv=False) / (HIDDEN / INTERMEDIATE) ** 0.5
    assert 0.6 < values.min() < values.max() < 1.25


def test_a_training_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("routers choose, experts compute. " * 200)
    sizes = "--steps 2 --batch 2 --length 8 --hidden 16 --layers 2 --heads 2 --experts 4"
    options = f"{sizes} --intermediate 8 --eval-windows 4 --text {text} --out {tmp_path / 'run'}"
    assert program.main(["train", *options.split()]) == 0
    assert program.main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "balance.png").exists()


ROUTING = ROUTERS["hash"](TOKENS, IDS)
PLOTS = {
    "plot_load": lambda: bx.plot_load(ROUTING),
    "plot_weights": lambda: bx.plot_weights(ROUTING),
    "plot_coactivation": lambda: bx.plot_coactivation(ROUTING),
    "plot_token_experts": lambda: bx.plot_token_experts(ROUTING, "abcdefghijklmnopqrst"),
    "plot_balance": lambda: bx.plot_balance([1, 2], np.ones((2, 3))),
    "plot_bias": lambda: bx.plot_bias([1, 2], np.ones((2, 3))),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot(plot):
    file = io.BytesIO()
    PLOTS[plot]().figure.savefig(file)
    assert file.tell() > 1000


def test_reports():
    assert "8" in repr(bx.report(ROUTING, input_ids=IDS, decode=str))
    assert str(EXPERTS) in repr(bx.summary(make_block())) and repr(bx.plan)

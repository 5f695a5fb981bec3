"""The classes of docs/guide/extending.md on a mesh of four devices, forward and backward."""

import functools
import pathlib
from contextlib import nullcontext

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import make_mesh
from pages import blocks, run_page

import braidax as bx

ROOT = pathlib.Path(__file__).parents[2]
EXTENSIONS = ("router", "experts", "kernel", "dispatch")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_a_reader_has_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def page():
    """What the page defines. Its own checks hold on four devices, too."""
    assert jax.device_count() == 4
    names = run_page(ROOT / "docs" / "guide" / "extending.md")
    assert names["mesh"].size == 4
    return names


def one_device(extension):
    """A block with the extension in it."""
    names = page()
    experts = names["adapted" if extension == "experts" else "experts"]
    dispatches = {
        "kernel": bx.SortedDispatch(names["Gathered"]()),
        "dispatch": names["InTurn"](),
    }
    dispatch = dispatches.get(extension, bx.SortedDispatch())
    return bx.RoutedMoE(names["router"], experts, dispatch=dispatch)


def many_devices(extension):
    """The same block on two by two devices."""
    block, mesh = one_device(extension), make_mesh()
    if extension == "dispatch":  # the compiler spreads it
        sharding = jax.NamedSharding(mesh, jax.P("expert"))
        return eqx.tree_at(lambda b: b.experts, block, eqx.filter_shard(block.experts, sharding))
    options = {"matmul": page()["Gathered"]()} if extension == "kernel" else {}
    return bx.ExpertParallel(mesh, **options).shard(block)


def loss_of(output):
    return jnp.sum(jnp.sin(3 * output))


@eqx.filter_jit
def evaluate(block, tokens, ids):
    """The output, and the gradients of all weights and of the tokens."""

    def loss(trained):
        block, tokens = trained
        output, _ = block(tokens, ids)
        return loss_of(output), output

    gradients, output = eqx.filter_grad(loss, has_aux=True)((block, tokens))
    weights = eqx.filter(gradients[0], eqx.is_inexact_array)
    return output, (weights.router.gate.weight, weights.experts, gradients[1])


@functools.cache
def answer(extension):
    """The same from the definition: one gathered matrix for every token and slot."""
    names = page()
    router, experts = names["router"], names["adapted" if extension == "experts" else "experts"]
    ids, language = np.asarray(names["ids"]), np.asarray(router.language)
    allowed = np.arange(8) // 4 == language[ids][:, None]

    def loss(trained):
        gate, experts, tokens = trained
        scores = 1 / (1 + jnp.exp(-tokens @ gate.T))
        # The best two of the allowed, by a full sort.
        chosen = np.argsort(-np.where(allowed, jax.lax.stop_gradient(scores), -1), axis=1)[:, :2]
        weights = jnp.take_along_axis(scores, chosen, axis=1)
        weights = weights / weights.sum(1, keepdims=True)
        base = getattr(experts, "base", experts)
        before = jnp.einsum("th,tkpih->ptki", tokens, base.gate_up[chosen])
        inner = before[0] / (1 + jnp.exp(-before[0])) * before[1]
        outputs = jnp.einsum("tki,tkih->tkh", inner, base.down[chosen])
        if extension == "experts":
            narrow = jnp.einsum("th,tkhr->tkr", tokens, experts.narrow[chosen])
            outputs += jnp.einsum("tkr,tkrh->tkh", narrow, experts.wide[chosen])
        output = jnp.sum(weights[..., None] * outputs, axis=1)
        return loss_of(output), output

    with jax.default_matmul_precision("highest"):
        trained = (router.gate.weight, experts, names["tokens"])
        gradients, output = eqx.filter_grad(loss, has_aux=True)(trained)
    return output, gradients


def assert_close(actual, desired):
    actual, desired = (
        jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (actual, desired)
    )
    assert len(actual) == len(desired) >= 5
    for one, other in zip(actual, desired, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape and np.abs(other).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("make", [one_device, many_devices])
def test_an_extension_gives_the_answer_of_the_definition(make, extension):
    block = make(extension)
    if make is many_devices:
        arrays = jax.tree.leaves(eqx.filter(block.experts, eqx.is_array))
        assert all(leaf.sharding.spec[0] == "expert" for leaf in arrays)
    assert_close(evaluate(block, page()["tokens"], page()["ids"]), answer(extension))


def test_the_readme_spreads_a_model_as_written():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = [source for _, source in blocks(readme) if source.startswith("auto = ")]
    model = one_device("router")
    state = optax.adamw(1e-3).init(eqx.filter(model, eqx.is_inexact_array))
    names = {"bx": bx, "jax": jax, "model": model, "optimizer_state": state}
    names |= {"hidden_states": page()["tokens"], "input_ids": page()["ids"]}
    exec(source.replace("(2, 4)", "(2, 2)"), names)
    expected, _ = model(page()["tokens"], page()["ids"])
    np.testing.assert_allclose(names["output"], expected, rtol=0, atol=1e-5)
    for moment in (names["optimizer_state"][0].mu, names["optimizer_state"][0].nu):
        assert moment.experts.down.sharding == names["model"].experts.down.sharding
    # What its page says of a mesh without `axis_types`, and of this one.
    for mesh, error in ((jax.make_mesh((4,), ("data",)), True), (names["mesh"], False)):
        table = jax.device_put(jnp.ones((20, 4)), jax.NamedSharding(mesh, jax.P()))
        ids = jax.device_put(page()["ids"], jax.NamedSharding(mesh, jax.P("data")))
        with pytest.raises(Exception, match="out_sharding") if error else nullcontext():
            jax.eval_shape(lambda table, ids: table[ids], table, ids)

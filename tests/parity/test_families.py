"""Every family in the table: a tiny model of transformers, saved, loaded by us and compared."""

import copy
import importlib.metadata
import json
import re

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import as_released, load_moe, read_config
from safetensors import safe_open
from tiny_models import HIDDEN, TINY, VOCAB, make_model, mixtures, text_layers

import braidax as bx

pytestmark = pytest.mark.usefixtures("one_thread")
# What else a layer has: attention, norms, and LongCat's dense networks.
NOT_A_MIXTURE = re.compile("attn|norm|mlps|mamba|conv|q_proj|k_proj|v_proj|o_proj")
every_family = pytest.mark.parametrize("model_type", TINY)


class WithShared(torch.nn.Module):
    """A mixture and the shared expert that a Granite layer has beside it."""

    def __init__(self, block_sparse_moe, shared_mlp):
        super().__init__()
        self.block_sparse_moe, self.shared_mlp = block_sparse_moe, shared_mlp

    def forward(self, hidden_states):
        return self.block_sparse_moe(hidden_states) + self.shared_mlp(hidden_states)


def reference(model, layer_idx):
    """What transformers computes where one layer of ours stands."""
    layer = text_layers(model)[layer_idx]
    if hasattr(layer, "shared_mlp"):
        return WithShared(layer.block_sparse_moe, layer.shared_mlp)
    return mixtures(model)[layer_idx]


def first(output):
    """Some modules return what the router said, too."""
    return output[0] if isinstance(output, tuple) else output


@eqx.filter_jit
def output_and_vjp(block, hidden_states, cotangent):
    trained, rest = eqx.partition(block, eqx.is_inexact_array)
    apply = lambda trained, hidden_states: eqx.combine(trained, rest)(hidden_states)[0]  # noqa: E731
    output, vjp = jax.vjp(apply, trained, hidden_states)
    return output, *vjp(cotangent)


def error(ours, theirs):
    """The largest difference, relative to the largest entry."""
    theirs = theirs.detach().double().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def weight_error(ours, theirs):
    """LongCat's gate and up projections have rows for the experts that do nothing."""
    assert not theirs[len(ours) :].any()
    return error(ours, theirs[: len(ours)])


@every_family
def test_every_layer(model_type, record):
    model, folder = make_model(model_type)
    config = bx.MoEConfig.from_hf(folder)
    found = [i for i in range(len(text_layers(model))) if config.is_moe_layer(i)]
    assert found == list(mixtures(model))
    for layer_idx in found:
        block = load_moe(folder, layer_idx)
        module = reference(model, layer_idx)
        rng = np.random.default_rng(layer_idx)
        hidden_states, cotangent = rng.standard_normal((2, 2, 9, HIDDEN), np.float32)
        given = torch.from_numpy(hidden_states).requires_grad_()
        module.zero_grad()
        theirs = first(module(given)).reshape(given.shape)  # some drop the batch
        theirs.backward(torch.from_numpy(cotangent))
        ours, gradient, hidden_gradient = output_and_vjp(block, hidden_states, cotangent)
        named = bx.to_state_dict(as_released(gradient), model_type=config.model_type)
        wanted = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        errors = {
            "output": error(ours, theirs),
            "hidden states": error(hidden_gradient, given.grad),
            "weights": max(weight_error(named.pop(name), grad) for name, grad in wanted.items()),
        }
        # A bias of selection has no gradient there, and a gradient of 0 here.
        assert all("correction_bias" in name and not named[name].any() for name in named), set(
            named
        )
        record(model_type, f"layer {layer_idx}", errors)
        assert max(errors.values()) <= 1e-5, errors


@every_family
def test_a_state_dict_of_transformers_both_ways(model_type):
    """The module's own tensors make the layer, and the layer gives them back, bit by bit."""
    model, folder = make_model(model_type)
    config = read_config(folder)
    for layer_idx in mixtures(model):
        theirs = {k: v.numpy() for k, v in reference(model, layer_idx).state_dict().items()}
        block = bx.from_state_dict(config, layer_idx, theirs)
        ours = bx.to_state_dict(block, model_type=config.model_type)
        assert set(ours) == set(theirs)
        for name, tensor in ours.items():
            np.testing.assert_array_equal(tensor, theirs[name][: len(tensor)], err_msg=name)


@every_family
def test_golden_file(model_type, request):
    """One layer as transformers wrote it, and its output: what `tests/test_families.py` needs."""
    model, folder = make_model(model_type)
    layer_idx = max(mixtures(model))
    with safe_open(folder / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if f".layers.{layer_idx}." in name]  # noqa: SIM118
        names = [name for name in names if not NOT_A_MIXTURE.search(name)]
        tensors = {name: file.get_tensor(name).astype(np.float16) for name in names}
    hidden_states = np.float32(np.float16(np.random.default_rng(0).standard_normal((9, HIDDEN))))
    with torch.no_grad():
        output = first(reference(model, layer_idx)(torch.from_numpy(hidden_states)[None]))
    found = golden.GoldenFamily(
        json.loads((folder / "config.json").read_text()),
        layer_idx,
        {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        tensors,
        hidden_states,
        output.reshape(9, HIDDEN).numpy(),
    )
    if request.config.getoption("--write-golden"):
        golden.save(f"families/{model_type}", found)
    kept = golden.load(f"families/{model_type}")
    assert kept.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, kept.tensors[name])
    np.testing.assert_allclose(found.output, kept.output, rtol=0, atol=1e-6 * kept.output.max())


class BraidaxBlock(torch.nn.Module):
    """Stands where a mixture of transformers stood, and returns what that one returned."""

    def __init__(self, moe, module):
        super().__init__()
        self.moe, self.rest = moe, (None,) * (model_outputs(module) - 1)

    def forward(self, hidden_states, *_, **__):
        output, _ = self.moe(jnp.asarray(hidden_states.detach().numpy()))
        output = torch.from_numpy(np.array(output))
        return (output, *self.rest) if self.rest else output


def model_outputs(module):
    output = module(torch.zeros(1, 1, HIDDEN))
    return len(output) if isinstance(output, tuple) else 1


@every_family
def test_whole_model(model_type, record):
    """Every block replaced by ours: the same logits."""
    model, folder = make_model(model_type)
    prompts = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    ours = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if module not in mixtures(model).values():
            continue
        layer_idx = next(i for i, mixture in mixtures(model).items() if mixture is module)
        block = load_moe(folder, layer_idx)
        layer = text_layers(model)[layer_idx]
        if hasattr(layer, "shared_mlp"):  # beside the block, where transformers computes it
            block = block.routed
        ours.set_submodule(name, BraidaxBlock(block, module))
    with torch.no_grad():
        wanted, got = model(prompts).logits, ours(prompts).logits
    assert wanted.std() > 1
    largest = error(got, wanted)
    record(model_type, "whole model, logits", {"output": largest})
    assert largest <= 1e-5

"""The whole DeepSeek-V4 of transformers with our MoE layers in it: the same logits and tokens."""

import copy

import numpy as np
import pytest
import torch
from whole_model import (
    EXPERTS,
    HASH_LAYERS,
    LAYERS,
    SLOTS,
    VOCAB,
    make_config,
    make_model,
    with_our_layers,
)

import braidax as bx

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    """The reference and its copy with our layers."""
    theirs = make_model()
    return theirs, with_our_layers(theirs)


@pytest.fixture(scope="module")
def prompts():
    """Two sequences: long enough to fill the attention's window and its compressed blocks."""
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def relative_difference(actual, desired):
    return float((actual - desired).abs().max() / desired.abs().max())


def test_the_same_logits(models, prompts, record):
    theirs, ours = models
    desired, actual = theirs(prompts).logits, ours(prompts).logits
    assert desired.shape == (2, 24, VOCAB)
    assert desired.std() > 1
    # Measured: 1.4e-6, a third of the distance between the reference's float32 and its float64.
    error = relative_difference(actual, desired)
    record("whole model", f"{LAYERS} layers, {HASH_LAYERS} hashed, logits", {"output": error})
    assert error <= 1e-5


def test_as_close_to_float64_as_the_reference_is(models, prompts):
    theirs, ours = models
    # Its norms and hyper-connections compute in float32 whatever the dtype of the model.
    exact = copy.deepcopy(theirs).double()(prompts).logits
    assert relative_difference(theirs(prompts).logits, exact) <= 1e-5
    assert relative_difference(ours(prompts).logits, exact) <= 1e-5


def test_the_layers_do_what_the_logits_are_to_show(models, prompts):
    theirs, ours = models
    gates = []
    hooks = [
        layer.mlp.shared_experts.gate_proj.register_forward_hook(
            lambda module, inputs, output: gates.append(output)
        )
        for layer in theirs.model.layers
    ]
    theirs(prompts)
    for hook in hooks:
        hook.remove()
    ours(prompts)
    for layer_idx in range(LAYERS):
        clamped = (gates[layer_idx] > theirs.config.swiglu_limit).float().mean()
        assert 0.1 < clamped < 0.9
        block = ours.model.layers[layer_idx].mlp
        assert isinstance(block.moe.routed.router, bx.HashRouter) == (layer_idx < HASH_LAYERS)
        assert len(np.unique(block.chosen[-1])) > EXPERTS // 2


def test_a_changed_layer_changes_the_logits(models, prompts):
    """That each layer matters: without its selection bias or with another table, other logits."""
    theirs, _ = models
    desired = theirs(prompts).logits
    for layer_idx in range(LAYERS):
        changed = copy.deepcopy(theirs)
        gate = changed.model.layers[layer_idx].mlp.gate
        if layer_idx < HASH_LAYERS:
            gate.tid2eid.copy_((gate.tid2eid + 1) % EXPERTS)
        else:
            gate.e_score_correction_bias.zero_()
        assert relative_difference(with_our_layers(changed)(prompts).logits, desired) > 1e-2


def test_the_same_greedy_tokens(models, prompts):
    theirs, ours = models
    options = {"do_sample": False, "max_new_tokens": 32}
    desired, actual = theirs.generate(prompts, **options), ours.generate(prompts, **options)
    assert desired.shape == (2, 24 + 32)
    np.testing.assert_array_equal(actual.numpy(), desired.numpy())
    generated = desired[:, 24:].numpy()
    assert all(len(np.unique(row)) >= 8 for row in generated)
    assert (generated[0] != generated[1]).any()


def test_the_configuration_is_read(tmp_path):
    config = make_config()
    config.save_pretrained(tmp_path)
    wanted = bx.MoEConfig(
        hidden_size=64,
        intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_token=SLOTS,
        vocab_size=VOCAB,
        num_shared_experts=1,
        score_function="sqrtsoftplus",
        normalize=True,
        scaling_factor=1.5,
        num_hash_layers=HASH_LAYERS,
        swiglu_limit=1.0,
    )
    for source in (config.to_dict(), tmp_path, tmp_path / "config.json"):
        assert bx.MoEConfig.from_hf(source) == wanted


def test_the_released_sizes_are_the_defaults_of_the_reference():
    assert bx.MoEConfig.from_hf(type(make_config())().to_dict()) == bx.MoEConfig.deepseek_v4_flash()

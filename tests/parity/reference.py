"""The torch side: transformers' `DeepseekV4SparseMoeBlock`, its tensors and its gradients."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

import braidax as bx

TOLERANCE = 1e-5
# A selection that hangs on less than this is rounding, not a rule.
SMALLEST_GAP = 1e-6


class _KeepsSoftmaxScores:
    """Released DeepSeek code does not normalize softmax scores, which sum to 1 over all experts.

    transformers knows no "softmax" activation and always normalizes.
    """

    def forward(self, hidden_states, *input_ids):
        logits, _, indices = super().forward(hidden_states, *input_ids)
        weights = self.score_fn(logits).gather(1, indices)
        return logits, weights * self.routed_scaling_factor, indices


class SoftmaxTopKRouter(_KeepsSoftmaxScores, modeling.DeepseekV4TopKRouter):
    """Top-k of softmax scores."""


class SoftmaxHashRouter(_KeepsSoftmaxScores, modeling.DeepseekV4HashRouter):
    """Softmax scores of a table's experts."""


def make_reference_config(
    *,
    hidden: int,
    intermediate: int,
    experts: int,
    per_token: int,
    hash_layers: int = 0,
    layers: int = 1,
    vocab: int = 64,
    score: str = "sqrtsoftplus",
    scaling: float = 1.5,
    limit: float = 10.0,
    **others,
) -> DeepseekV4Config:
    """transformers' configuration; `others` are the fields that the block does not read.

    One of these says for braidax what the router does: softmax scores are not normalized."""
    others.setdefault("norm_topk_prob", score != "softmax")
    return DeepseekV4Config(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        n_routed_experts=experts,
        num_experts_per_tok=per_token,
        num_hidden_layers=layers,
        mlp_layer_types=["hash_moe"] * hash_layers + ["moe"] * (layers - hash_layers),
        vocab_size=vocab,
        scoring_func=score,
        routed_scaling_factor=scaling,
        swiglu_limit=limit,
        experts_implementation="eager",
        **others,
    )


def moe_config(config: DeepseekV4Config) -> bx.MoEConfig:
    """The same numbers as braidax reads them from a saved `config.json`."""
    return bx.MoEConfig.from_hf(config.to_dict())


def make_reference_block(
    config: DeepseekV4Config,
    layer_idx: int = 0,
    *,
    seed: int = 0,
    spread: float = 1.0,
    bias: np.ndarray | None = None,
    table: np.ndarray | None = None,
) -> torch.nn.Module:
    """A block with random weights: logits of standard deviation 1 and activations of `spread`,
    for hidden states of standard deviation 1. `bias` and `table` are for the router that has one.
    """
    block = modeling.DeepseekV4SparseMoeBlock(_without_softmax(config), layer_idx)
    if config.scoring_func == "softmax":
        softmax_router = SoftmaxHashRouter if block.is_hash else SoftmaxTopKRouter
        block.gate = softmax_router(_without_softmax(config))
        block.gate.score_fn = torch.nn.Softmax(dim=-1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in block.named_parameters():
            scale = 1.0 if name.startswith("gate.") or "down" in name else spread
            weight.normal_(0, scale * weight.shape[-1] ** -0.5, generator=generator)
        if bias is not None:
            block.gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
        if table is not None:
            block.gate.tid2eid.copy_(torch.from_numpy(table))
    return block


def _without_softmax(config: DeepseekV4Config) -> DeepseekV4Config:
    if config.scoring_func != "softmax":
        return config
    config = copy.deepcopy(config)
    config.scoring_func = "sigmoid"
    return config


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, as `bx.from_state_dict` takes them."""
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients of every parameter by name. A parameter without one is an error here."""
    return {name: weight.grad.numpy() for name, weight in module.named_parameters()}


def to_torch(array: np.ndarray | None) -> torch.Tensor | None:
    """A copy, with int64 for ids: torch indexes with nothing narrower."""
    if array is None:
        return None
    return torch.tensor(array, dtype=torch.float32 if array.dtype.kind == "f" else torch.int64)


class Inspection(NamedTuple):
    """What a block does, computed in float64."""

    biased_scores: np.ndarray  # (tokens, experts): what top-k selection ranks
    indices: np.ndarray  # (tokens, experts_per_token)
    gate: tuple[np.ndarray, np.ndarray]  # pre-activations, of the routed and the shared experts
    up: tuple[np.ndarray, np.ndarray]


def inspect_block(
    block: torch.nn.Module, hidden_states: np.ndarray, input_ids: np.ndarray | None = None
) -> Inspection:
    """Run a float64 copy of `block` and look inside."""
    wide = copy.deepcopy(block).double()
    seen, routed = {}, []

    def watch(name, module):
        module.register_forward_hook(lambda _, inputs, output: seen.update({name: output}))

    def apply_gate(gate_up):
        routed.append(gate_up)
        return type(wide.experts)._apply_gate(wide.experts, gate_up)

    watch("gate", wide.gate)
    watch("shared gate", wide.shared_experts.gate_proj)
    watch("shared up", wide.shared_experts.up_proj)
    wide.experts._apply_gate = apply_gate
    with torch.no_grad():
        wide(to_torch(hidden_states).double(), to_torch(input_ids))
    logits, _, indices = seen["gate"]
    scores = wide.gate.score_fn(logits)
    bias = getattr(wide.gate, "e_score_correction_bias", torch.zeros(()))
    gate, up = torch.cat(routed).chunk(2, dim=-1)
    return Inspection(
        (scores + bias).numpy(),
        indices.numpy(),
        (gate.numpy(), seen["shared gate"].numpy()),
        (up.numpy(), seen["shared up"].numpy()),
    )


def selection_gaps(biased_scores: np.ndarray, per_token: int) -> np.ndarray:
    """How far the last selected score is above the first one left out, for each token."""
    if per_token == biased_scores.shape[-1]:
        return np.full(len(biased_scores), np.inf)
    descending = -np.sort(-biased_scores, axis=-1)
    return descending[:, per_token - 1] - descending[:, per_token]


def relative_error(actual, reference, scale: float | None = None) -> float:
    """Largest difference over the largest entry of the reference, or over `scale`."""
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    scale = np.abs(reference).max() if scale is None else scale
    return float(np.abs(actual - reference).max() / scale)


def compare_routing(
    actual: tuple[np.ndarray, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    gaps: np.ndarray,
) -> tuple[float, float]:
    """Error of the weights and share of excluded rows, from (indices, weights) of each side.

    Indices must be the same multiset in every row whose gap is wide enough to have an answer.
    """
    decided = gaps > SMALLEST_GAP
    excluded = 1 - float(decided.mean())
    assert excluded < 0.01
    (indices, weights), (wanted_indices, wanted_weights) = (
        [np.take_along_axis(part, np.argsort(side[0], axis=-1), axis=-1)[decided] for part in side]
        for side in (actual, reference)
    )
    np.testing.assert_array_equal(indices, wanted_indices)
    return relative_error(weights, wanted_weights), excluded


def assert_within_tolerance(errors: Mapping[str, float]) -> None:
    """Every error by name, so that a failure shows which tensors are off."""
    failed = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not failed, failed

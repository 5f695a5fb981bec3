"""Whole blocks against transformers: routing, output and every gradient."""

from typing import NamedTuple

import numpy as np
import pytest
import reference as ref
import torch
from cases import output_and_vjp
from grid import GRID, VOCAB, Case, hash_table, selection_bias

import braidax as bx


class Setup(NamedTuple):
    """A reference block, the same block of braidax, and what both are given."""

    block: torch.nn.Module
    moe: bx.RoutedAndSharedMoE
    hidden_states: np.ndarray
    input_ids: np.ndarray | None
    cotangent: np.ndarray


def make_setup(case: Case) -> Setup:
    rng = np.random.default_rng(case.seed)
    is_hash = case.kind == "hash"
    config = ref.make_reference_config(
        hidden=case.hidden,
        intermediate=case.intermediate,
        experts=case.experts,
        per_token=case.per_token,
        hash_layers=int(is_hash),
        vocab=VOCAB,
        score=case.score,
        scaling=case.scaling,
        limit=case.limit,
    )
    block = ref.make_reference_block(
        config,
        seed=case.seed,
        spread=case.limit if case.clips else case.limit / 8,
        bias=None if is_hash else selection_bias(case, rng),
        table=hash_table(case, rng) if is_hash else None,
    )
    moe = bx.from_state_dict(ref.moe_config(config), 0, ref.tensors(block))
    shape = (*case.batch, case.hidden)
    hidden_states, cotangent = rng.standard_normal((2, *shape), np.float32)
    input_ids = None
    if is_hash:
        input_ids = rng.integers(0, VOCAB, case.batch).astype(np.int32)
        input_ids[0, 0] = 0  # a row that repeats an expert
    return Setup(block, moe, hidden_states, input_ids, cotangent)


class Outcome(NamedTuple):
    """What the reference computes, beside the gradients that it keeps in its parameters."""

    output: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    d_hidden: np.ndarray
    d_weights: np.ndarray


def run_reference(setup: Setup) -> Outcome:
    routing = []

    def watch(module, inputs, output):
        output[1].retain_grad()
        routing.extend(output)

    hook = setup.block.gate.register_forward_hook(watch)
    hidden_states = ref.to_torch(setup.hidden_states).requires_grad_()
    output = setup.block(hidden_states, ref.to_torch(setup.input_ids))
    output.backward(ref.to_torch(setup.cotangent))
    hook.remove()
    _, weights, indices = routing
    arrays = (output, indices, weights, hidden_states.grad, weights.grad)
    return Outcome(*(array.detach().numpy() for array in arrays))


def check_case(case: Case, seen: ref.Inspection) -> None:
    """The case is what it says: clamps, load, bias and repeated experts are there."""
    for part in (0, 1):  # routed and shared
        gate, up = seen.gate[part], np.abs(seen.up[part])
        assert (gate > case.limit).any() == case.clips
        assert (up > case.limit).any() == case.clips
        # Nearer than this, rounding decides whether the derivative is 0.
        for values in (gate, up):
            assert np.abs(values - case.limit).min() > 1e-6 * case.limit
    load = np.bincount(seen.indices.reshape(-1), minlength=case.experts)
    if case.load == "half idle":
        assert not load[case.experts // 2 :].any() and load.any()
    if case.load == "one":
        assert (load > 0).sum() == (1 if case.kind == "hash" else case.per_token)
    if case.kind == "hash" and case.per_token > 1:
        assert (np.diff(np.sort(seen.indices, axis=-1), axis=-1) == 0).any()


def changed_by_bias(setup: Setup, seen: ref.Inspection) -> bool:
    """Whether some token would select other experts without the bias."""
    scores = seen.biased_scores - ref.tensors(setup.block)["gate.e_score_correction_bias"]
    per_token = seen.indices.shape[-1]
    without = np.sort(np.argsort(-scores, axis=-1)[:, :per_token], axis=-1)
    return bool((without != np.sort(seen.indices, axis=-1)).any())


def column_of(name: str) -> str:
    """The table's heading: `experts.down_proj` is "d down", the shared one "d shared down"."""
    parts = name.removesuffix(".weight").removesuffix("_proj").removeprefix("experts.")
    return "d " + parts.replace("shared_experts.", "shared ")


def gradient_errors(case: Case, setup: Setup, wanted: Outcome, d_moe) -> dict[str, float]:
    """One error for each parameter of the reference, by its name."""
    ours, theirs = bx.to_state_dict(d_moe), ref.gradients(setup.block)
    if case.kind == "top_k":
        # The reference has no gradient for its bias: a buffer, and only selection sees it.
        assert not ours.pop("gate.e_score_correction_bias").any()
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, gradient in theirs.items():
        scale = None
        if name == "gate.weight" and case.weights_are_constant:
            # Nothing but rounding on both sides: measured against the terms that cancel.
            tokens = setup.hidden_states.reshape(-1, 1, case.hidden)
            scale = np.abs(wanted.d_weights[..., None] * tokens).max()
            assert np.abs(ours[name]).max() <= ref.TOLERANCE * scale
        errors[column_of(name)] = ref.relative_error(ours[name], gradient, scale)
    return errors


def test_the_grid_is_large():
    assert len(set(GRID)) >= 60


@pytest.mark.parametrize("case", GRID, ids=lambda case: f"{case.kind} {case.score} {case}")
def test_block(case, record):
    setup = make_setup(case)
    seen = ref.inspect_block(setup.block, setup.hidden_states, setup.input_ids)
    check_case(case, seen)
    assert not case.bias or changed_by_bias(setup, seen)
    gaps = np.full(len(seen.indices), np.inf)
    if case.kind == "top_k":
        gaps = ref.selection_gaps(seen.biased_scores, case.per_token)

    wanted = run_reference(setup)
    output, routing, d_moe, d_hidden = output_and_vjp(
        setup.moe, setup.hidden_states, setup.input_ids, setup.cotangent
    )
    shape = wanted.indices.shape
    ours = (np.reshape(routing.indices, shape), np.reshape(routing.weights, shape))
    weight_error, excluded = ref.compare_routing(ours, (wanted.indices, wanted.weights), gaps)
    errors = {
        "output": ref.relative_error(output, wanted.output),
        "weights": weight_error,
        "d hidden": ref.relative_error(d_hidden, wanted.d_hidden),
        **gradient_errors(case, setup, wanted, d_moe),
    }
    record(f"{case.kind} {case.score}", str(case), errors, excluded)
    # Output and gradients are compared whole, so no row may be left out.
    assert excluded == 0
    ref.assert_within_tolerance(errors)

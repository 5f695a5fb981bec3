"""The golden files are what the reference gives in the versions that they name;
`--write-golden` renews them."""

import dataclasses
import importlib.metadata
import zlib

import golden
import numpy as np
import pytest
import torch
from reference import (
    SMALLEST_GAP,
    gradients,
    inspect_block,
    make_reference_block,
    make_reference_config,
    relative_error,
    selection_gaps,
    tensors,
    to_torch,
)

SMALL = {"hidden": 32, "intermediate": 16, "experts": 8, "per_token": 2, "vocab": 40}
# Arguments of `make_reference_config`; a layer is hashed where it has hash layers.
BLOCKS = {
    "top_k": {**SMALL, "limit": 10.0},
    "top_k_clamped": {**SMALL, "limit": 0.5, "scaling": 2.5},
    "top_k_sigmoid": {**SMALL, "score": "sigmoid", "experts": 12, "per_token": 5},
    "top_k_softmax": {**SMALL, "score": "softmax"},
    "hash": {**SMALL, "hash_layers": 1},
    "hash_sigmoid_clamped": {**SMALL, "hash_layers": 1, "score": "sigmoid", "limit": 0.75},
}
ROUTERS = {
    "router_v4_flash": {"experts": 256, "hidden": 4096, "per_token": 6, "scaling": 1.5},
    "router_v4_pro": {"experts": 384, "hidden": 7168, "per_token": 6, "scaling": 2.5},
}


def our_config(config):
    """The arguments of `MoEConfig` that say the same, spelled out once more on purpose: reading a
    config is not what a golden file is for."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size,
        "num_experts": config.n_routed_experts,
        "num_experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "score_function": config.scoring_func,
        "scaling_factor": config.routed_scaling_factor,
        "num_hash_layers": config.mlp_layer_types.count("hash_moe"),
        "swiglu_limit": config.swiglu_limit,
        **({} if config.norm_topk_prob else {"normalize": False}),
    }


def versions():
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}


def make_block(options):
    rng = np.random.default_rng(zlib.crc32(repr(options).encode()))
    config = make_reference_config(**options)
    bias = rng.normal(size=config.n_routed_experts).astype(np.float32) * 0.2
    shape = (config.vocab_size, config.num_experts_per_tok)
    table = rng.integers(0, config.n_routed_experts, shape)  # some rows name an expert twice
    hashed = config.mlp_layer_types[0] == "hash_moe"
    block = make_reference_block(
        config, table=table if hashed else None, bias=None if hashed else bias
    )
    hidden_states = rng.normal(size=(2, 12, config.hidden_size)).astype(np.float32)
    input_ids = rng.integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    cotangent = rng.normal(size=hidden_states.shape).astype(np.float32)

    states, ids = to_torch(hidden_states).requires_grad_(), to_torch(input_ids)
    output = block(states, ids)
    output.backward(to_torch(cotangent))
    _, weights, indices = block.gate(*((states, ids) if hashed else (states,)))
    seen = inspect_block(block, hidden_states, input_ids)
    clipped = bool((seen.gate[0] > config.swiglu_limit).any())
    assert clipped == (config.swiglu_limit < 1)
    if not hashed:
        assert selection_gaps(seen.biased_scores, config.num_experts_per_tok).min() > SMALLEST_GAP
        unbiased = np.argsort(-(seen.biased_scores - bias), axis=-1)[
            :, : config.num_experts_per_tok
        ]
        assert (np.sort(unbiased) != np.sort(seen.indices)).any()
    return golden.GoldenBlock(
        config=our_config(config),
        layer_idx=0,
        versions=versions(),
        tensors=tensors(block),
        hidden_states=hidden_states,
        input_ids=input_ids,
        cotangent=cotangent,
        indices=indices.numpy().astype(np.int32).reshape(2, 12, -1),
        weights=weights.detach().numpy().reshape(2, 12, -1),
        output=output.detach().numpy(),
        hidden_states_gradient=states.grad.numpy(),
        gradients=gradients(block),
    )


def make_router(options):
    config = make_reference_config(intermediate=1, **options)
    ours = our_config(config)
    weight, bias, hidden_states = map(torch.from_numpy, golden.router_inputs(ours))
    router = make_reference_block(config).gate
    with torch.no_grad():
        router.weight.copy_(weight)
        router.e_score_correction_bias.copy_(bias)
        _, weights, indices = router(hidden_states)
    # The reference leaves the order within a token open.
    indices, order = indices.sort(dim=-1)
    weights = weights.gather(1, order)
    logits = hidden_states.double() @ weight.double().T
    scores = np.sqrt(np.logaddexp(0, logits.numpy())) + bias.numpy()
    gap = float(selection_gaps(scores, config.num_experts_per_tok).min())
    return golden.GoldenRouter(
        config=ours,
        versions=versions(),
        smallest_gap=gap,
        indices=indices.numpy().astype(np.int16),
        weights=weights.numpy(),
    )


MAKERS = {name: (make_block, options) for name, options in BLOCKS.items()}
MAKERS |= {name: (make_router, options) for name, options in ROUTERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_golden_file(name, request):
    make, options = MAKERS[name]
    fresh = make(options)
    if request.config.getoption("--write-golden"):
        golden.save(name, fresh)
        return
    kept = golden.load(name)
    assert kept.config == fresh.config and kept.versions == fresh.versions
    for field in dataclasses.fields(fresh):
        new, old = getattr(fresh, field.name), getattr(kept, field.name)
        if isinstance(new, np.ndarray):
            new, old = {field.name: new}, {field.name: old}
        elif field.name not in ("tensors", "gradients"):
            continue
        assert new.keys() == old.keys()
        for key, array in new.items():
            if array.dtype.kind == "i":
                np.testing.assert_array_equal(old[key], array, err_msg=key)
            else:
                assert relative_error(old[key], array) <= 1e-5, key

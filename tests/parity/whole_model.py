"""A small random DeepSeek-V4 of transformers, and the same model with our MoE layers inside."""

import copy

import jax.numpy as jnp
import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import braidax as bx

HASH_LAYERS, LAYERS, EXPERTS, SLOTS, VOCAB = 2, 5, 12, 3, 128


def make_config():
    """Two hash layers of five, every kind of attention, and a clamp that random weights reach."""
    return DeepseekV4Config(
        vocab_size=VOCAB,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_hash_layers=HASH_LAYERS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=SLOTS,
        swiglu_limit=1.0,
        num_attention_heads=4,
        head_dim=32,
        partial_rotary_factor=0.5,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        sliding_window=16,
        hc_mult=2,
        max_position_embeddings=256,
        # Far above the usual 0.02: the logits of an untrained model hardly vary with it.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )


def make_model():
    """The reference in float32, with selection biases and hash tables as a trained one has."""
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(make_config()).eval().requires_grad_(False)
    # The plain loop over experts; the default, a grouped product, has no float64.
    model.set_experts_implementation("eager")
    for layer_idx, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate
        if layer.mlp.is_hash:
            table = bx.hash_tables.md5(VOCAB, EXPERTS, SLOTS, salt=layer_idx)
            gate.tid2eid.copy_(torch.from_numpy(np.array(table)))
        else:
            gate.e_score_correction_bias.normal_(std=0.5)
    return model


class BraidaxBlock(torch.nn.Module):
    """Stands where a `DeepseekV4SparseMoeBlock` stood; keeps the experts that it chose."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe
        self.chosen = []

    def forward(self, hidden_states, input_ids=None):
        output, routing = self.moe(
            jnp.asarray(hidden_states.numpy()), jnp.asarray(input_ids.numpy())
        )
        self.chosen.append(np.asarray(routing.indices))
        return torch.from_numpy(np.array(output))


def with_our_layers(model):
    """A copy of `model` whose MoE layers are ours, made from their own state dicts."""
    config = bx.MoEConfig.from_hf(model.config.to_dict())
    model = copy.deepcopy(model)
    for layer_idx, layer in enumerate(model.model.layers):
        tensors = {name: tensor.numpy() for name, tensor in layer.mlp.state_dict().items()}
        layer.mlp = BraidaxBlock(bx.from_state_dict(config, layer_idx, tensors))
    return model

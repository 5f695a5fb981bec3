"""The routers of DeepSeek-V4-Flash and -Pro at their real sizes, against transformers."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref

import braidax as bx

TOKENS = 1024


class Shape(NamedTuple):
    """A released router; `braidax.MoEConfig` has the same numbers, which the test asserts."""

    name: str
    hidden: int
    experts: int
    per_token: int
    scaling: float
    vocab: int


SHAPES = [
    Shape("deepseek_v4_flash", 4096, 256, 6, 1.5, 129_280),
    Shape("deepseek_v4_pro", 7168, 384, 6, 2.5, 129_280),
]


@eqx.filter_jit
def value_and_vjp(router, hidden_states, input_ids, cotangent):
    """Routing, and the gradients of `cotangent[token, expert]` times the weights of the chosen."""
    weight, others = eqx.partition(router, lambda leaf: leaf is router.gate.weight)

    def call(weight, hidden_states):
        routing = eqx.combine(weight, others)(hidden_states, input_ids)
        chosen = jnp.take_along_axis(cotangent, routing.indices, axis=-1)
        return (routing.weights * chosen).sum(), routing

    gradients, routing = jax.grad(call, argnums=(0, 1), has_aux=True)(weight, hidden_states)
    return routing, *gradients


def run_reference(gate, hidden_states, input_ids, cotangent):
    """(indices, weights) and the gradient of the hidden states."""
    hidden_states = ref.to_torch(hidden_states).requires_grad_()
    arguments = (hidden_states,) if input_ids is None else (hidden_states, ref.to_torch(input_ids))
    _, weights, indices = gate(*arguments)
    weights.backward(ref.to_torch(cotangent).gather(1, indices))
    return (indices.numpy(), weights.detach().numpy()), hidden_states.grad.numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", ["top_k", "hash"])
def test_router(kind, shape, record):
    released = getattr(bx.MoEConfig, shape.name)()
    sizes = (released.hidden_size, released.num_experts, released.num_experts_per_token)
    assert (*sizes, released.scaling_factor, released.vocab_size) == shape[1:]
    rng = np.random.default_rng(0)
    is_hash = kind == "hash"
    config = ref.make_reference_config(
        hidden=shape.hidden,
        intermediate=1,  # the experts are not compared here
        experts=shape.experts,
        per_token=shape.per_token,
        scaling=shape.scaling,
        vocab=shape.vocab,
        hash_layers=int(is_hash),
    )
    bias = 0.1 * rng.standard_normal(shape.experts, np.float32)
    table = bx.hash_tables.md5(shape.vocab, *sizes[1:]) if is_hash else None
    block = ref.make_reference_block(config, bias=None if is_hash else bias, table=table)
    moe = bx.from_state_dict(ref.moe_config(config), 0, ref.tensors(block))
    hidden_states = rng.standard_normal((TOKENS, shape.hidden), np.float32)
    cotangent = rng.standard_normal((TOKENS, shape.experts), np.float32)
    input_ids = rng.integers(0, shape.vocab, TOKENS).astype(np.int32) if is_hash else None

    wanted, d_hidden = run_reference(block.gate, hidden_states, input_ids, cotangent)
    router = moe.routed.router
    routing, d_router, our_d_hidden = value_and_vjp(router, hidden_states, input_ids, cotangent)
    gaps = np.full(TOKENS, np.inf)
    if not is_hash:
        logits = hidden_states.astype(np.float64) @ np.asarray(router.gate.weight, np.float64).T
        gaps = ref.selection_gaps(np.sqrt(np.logaddexp(0, logits)) + bias, shape.per_token)
    ours = (np.asarray(routing.indices), np.asarray(routing.weights))
    weight_error, excluded = ref.compare_routing(ours, wanted, gaps)
    errors = {
        "weights": weight_error,
        "d hidden": ref.relative_error(our_d_hidden, d_hidden),
        "d gate": ref.relative_error(d_router.gate.weight, block.gate.weight.grad.numpy()),
    }
    configuration = f"{shape.hidden} {shape.experts}/{shape.per_token} {TOKENS} tokens"
    record(f"{kind} {shape.name}", f"{configuration} s={shape.scaling:g}", errors, excluded)
    # No row may be left out: the gradients are compared whole.
    assert excluded == 0
    ref.assert_within_tolerance(errors)

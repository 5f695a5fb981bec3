"""One shape for the properties of the experts: each backend compiles once for all of them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from cases import BACKENDS, EXPERTS, HIDDEN, SLOTS, make_block
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import braidax as bx

TOKENS = 8
BACKEND_NAMES = [case.name for case in BACKENDS]
# Every router on the default backend, and every backend.
LAYERS = [("hash", "blocks"), *(("top_k", name) for name in BACKEND_NAMES)]

index_tables = arrays(np.int32, (TOKENS, SLOTS), elements=st.integers(0, EXPERTS - 1))
seeds = st.integers(0, 2**32 - 1)
token_positions = st.integers(0, TOKENS - 1)


def random_tokens(seed):
    """Hidden states, combine weights and a cotangent of the output, float32."""
    rng = np.random.default_rng(seed)
    tokens = 1.5 * rng.normal(size=(TOKENS, HIDDEN))
    weights = rng.uniform(0.1, 1, (TOKENS, SLOTS))
    cotangent = rng.normal(size=tokens.shape)
    return [array.astype(np.float32) for array in (tokens, weights, cotangent)]


@functools.cache
def layer(kind, backend="blocks"):
    """The same small clamped layer for all tests: building one takes longer than a call."""
    return make_block(bx, kind, backend)


def replay(indices, weights):
    """A routing that says exactly this."""
    scores = jnp.zeros((*indices.shape[:-1], EXPERTS))
    dropped = jnp.zeros((), jnp.int32)
    return bx.Routing(jnp.asarray(indices), jnp.asarray(weights), scores, scores, None, dropped)


@eqx.filter_jit
def _output_and_gradients(block, tokens, indices, weights, cotangent):
    def apply(tokens, weights, gate_up, down):
        where = lambda b: (b.experts.gate_up, b.experts.down)  # noqa: E731
        changed = eqx.tree_at(where, block, (gate_up, down))
        return changed(tokens, routing=replay(indices, weights))[0]

    experts = block.experts
    output, vjp = jax.vjp(apply, tokens, weights, experts.gate_up, experts.down)
    return output, *vjp(cotangent)


def output_and_gradients(block, tokens, indices, weights, cotangent):
    """Output, then the gradients of tokens, combine weights, `gate_up` and `down`, as numpy."""
    arrays_ = [jnp.asarray(a) for a in (tokens, indices, weights, cotangent)]
    return [np.asarray(a) for a in _output_and_gradients(block, *arrays_)]


def by_hand(logits, bias=0.0, *, k=2, **options):
    """The routing of given logits: hidden states are the logits, the gate is the identity."""
    router = identity_router("top_k", np.shape(logits)[-1], k, **options)
    size = np.shape(logits)[-1]
    bias = jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (size,))
    router = eqx.tree_at(lambda r: r.score_correction_bias, router, bias)
    return route(router, jnp.asarray(logits, jnp.float32))


def identity_router(kind, size, k, **options):
    """A router whose logits are its hidden states. The hash one sends id `t` to `t, t+1, ...`."""
    if kind == "hash":
        table = (np.arange(size)[:, None] + np.arange(k)) % size
        router = bx.HashRouter(size, size, k, table=table, key=jax.random.key(0), **options)
    else:
        router = bx.TopKRouter(size, size, k, key=jax.random.key(0), **options)
    return eqx.tree_at(lambda r: r.gate.weight, router, jnp.eye(size))


@eqx.filter_jit
def route(router, hidden_states, input_ids=None, mask=None):
    return router(hidden_states, input_ids, mask=mask)

"""Tables of what is tested: a new backend, router or shape is one more row."""

import importlib.util
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, VOCAB = 12, 7, 5, 3, 20


class BackendCase(NamedTuple):
    """A dispatch with its kernel, and what it promises beyond the right numbers."""

    name: str
    isolates_expert_nan: bool  # NaN in one expert's weights stays with its tokens.
    forward_mode: bool
    wide_activations: bool  # Not rounded to the dtype of narrower weights.


BACKENDS = [
    BackendCase("blocks", isolates_expert_nan=True, forward_mode=False, wide_activations=True),
    # On a CPU `ragged_dot` lowers to a masked product over all experts: 0 * NaN leaks.
    BackendCase("ragged", isolates_expert_nan=False, forward_mode=False, wide_activations=False),
    # Every expert computes every token: its backward pass multiplies by unused weights.
    BackendCase("dense", isolates_expert_nan=False, forward_mode=True, wide_activations=True),
]
if importlib.util.find_spec("tokamax") is not None:
    # On a CPU it is `ragged_dot` as well.
    BACKENDS.append(BackendCase("tokamax", False, forward_mode=False, wide_activations=False))


def slow_but_one(cases):
    """The first of the cases in `nox -s tests`, and the others in `nox -s tests_slow`."""
    cases = list(cases)
    others = (case if isinstance(case, tuple | list) else (case,) for case in cases[1:])
    return [cases[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


def make_dispatch(bx, name, **options):
    """The dispatch of each row of `BACKENDS`, or of any other kernel by its name."""
    if name == "dense":
        return bx.DenseDispatch()
    return bx.SortedDispatch(getattr(bx.matmul, name.capitalize())(), **options)


def random_indices(seed, tokens):
    return np.random.default_rng(seed).integers(0, EXPERTS, (tokens, SLOTS)).astype(np.int32)


# Assignments that a dispatch gets wrong first. Rows may name an expert twice.
ASSIGNMENTS = {
    "random": random_indices(0, 33),
    "one token": random_indices(1, 1),
    "all on one expert": np.full((17, SLOTS), 3, np.int32),
    "first and last only": np.tile(np.array([0, EXPERTS - 1, 0], np.int32), (9, 1)),
    "one expert unused": np.array([0, 1, 3, 4], np.int32)[random_indices(2, 25) % 4],
    "many rows": random_indices(3, 300),
}


def _hash_router(bx, key, **options):
    table = bx.hash_tables.md5(VOCAB, EXPERTS, SLOTS, salt=1)
    return bx.HashRouter(HIDDEN, EXPERTS, SLOTS, table=table, key=key, **options)


def _top_k_router(bx, key, **options):
    router = bx.TopKRouter(HIDDEN, EXPERTS, SLOTS, key=key, **options)
    bias = 0.1 * jax.random.normal(jax.random.key(9), (EXPERTS,))
    return eqx.tree_at(lambda router: router.score_correction_bias, router, bias)


# Routers at the sizes above, with a bias that matters.
ROUTERS = {"top_k": _top_k_router, "hash": _hash_router}


def make_router(bx, kind, key, **options):
    """A router of each kind of `ROUTERS`."""
    return ROUTERS[kind](bx, key, **options)


@eqx.filter_jit
def output_and_vjp(block, hidden_states, input_ids, cotangent):
    """Output, routing, and the gradients of the block and of its hidden states, in one compile."""
    parameters, static = eqx.partition(block, eqx.is_inexact_array)

    def apply(parameters, hidden_states):
        return eqx.combine(parameters, static)(hidden_states, input_ids)

    output, vjp, routing = jax.vjp(apply, parameters, hidden_states, has_aux=True)
    return output, routing, *vjp(cotangent)


def make_block(bx, kind, backend, key=None, **options):
    """A `RoutedAndSharedMoE` with small clamped experts."""
    keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    router = make_router(bx, kind, keys[0], **{"scaling_factor": 1.5, **options})
    clamped = {"activation": bx.activations.swiglu(0.4)}
    experts = bx.Experts(EXPERTS, HIDDEN, INTERMEDIATE, **clamped, key=keys[1])
    shared = bx.FeedForward(HIDDEN, INTERMEDIATE, **clamped, key=keys[2])
    routed = bx.RoutedMoE(router, experts, dispatch=make_dispatch(bx, backend))
    return bx.RoutedAndSharedMoE(routed, shared)


def make_inputs(batch=(2, 6)):
    """Hidden states that do reach the clamp, and ids within the vocabulary."""
    hidden_states = 1.5 * jax.random.normal(jax.random.key(1), (*batch, HIDDEN))
    input_ids = jax.random.randint(jax.random.key(2), batch, 0, VOCAB, dtype=jnp.int32)
    return hidden_states, input_ids


def as_float64(tree):
    """The floating-point leaves of a module as float64 numpy, by field name."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def assert_close(actual, desired, tolerance=1e-5):
    """Within `tolerance` of the largest entry: 1e-5 unless a comment at the call says why."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    scale = max(1.0, float(np.abs(desired).max(initial=0.0)))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * scale)

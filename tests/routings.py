"""Routings made by hand, for the tests of reports and plots."""

import jax.numpy as jnp
import numpy as np

import braidax as bx


def one_routing(indices, weights=None, scores=None, mask=None, experts=4, dropped=0):
    """Weights and scores are 1 unless given."""
    indices = jnp.asarray(indices, jnp.int32)
    weights = jnp.ones(indices.shape) if weights is None else weights
    scores = jnp.ones((*indices.shape[:-1], experts)) if scores is None else scores
    weights, scores = (jnp.asarray(array, jnp.float32) for array in (weights, scores))
    mask = None if mask is None else jnp.asarray(mask)
    return bx.Routing(indices, weights, scores, scores, mask, jnp.asarray(dropped, jnp.int32))


def random_routing(tokens, experts, experts_per_token, mask=None):
    """Different experts for each token, weights with sum 1, by NumPy's generator."""
    generator = np.random.default_rng(0)
    order = np.argsort(generator.random((tokens, experts)), axis=1)
    weights = generator.random((tokens, experts_per_token)) + 0.1
    weights /= weights.sum(axis=1, keepdims=True)
    return one_routing(order[:, :experts_per_token], weights, mask=mask, experts=experts)

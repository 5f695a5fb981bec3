"""Counts and sums over the tokens of a layer, on the host in int64 and float64."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Real

from .assignments import Assignments


def token_sums(layer: Assignments) -> dict[str, Any]:
    """Sums over the tokens of one layer of a batch, by the names of the report's fields.

    `confidence` and `router_entropy` are followed by their number of tokens. Both leave out the
    tokens that are `undefined`, and `confidence` tokens whose experts are all nobody.
    """
    layer, num_experts = layer.unmasked(), layer.num_experts
    defined = np.isfinite(layer.weights).all(axis=1) & np.isfinite(layer.scores).all(axis=1)
    weights, scores = (array[defined].astype(np.float64) for array in (layer.weights, layer.scores))
    indices = layer.indices[defined]
    somebody = (indices < num_experts).any(axis=1)
    indices, shares = indices[somebody], _shares(weights[somebody])
    # Weights of one expert are added up.
    same = indices[:, :, None] == indices[:, None, :]
    largest = np.einsum("tij,tj->ti", same, shares).max(axis=1)
    return {
        "num_tokens": len(layer.indices),
        "dropped": layer.dropped,
        "undefined": np.sum(~defined),
        "load": expert_load(layer),
        "coactivation": coactivations(layer.indices, num_experts),
        "confidence": np.array([largest.sum(), len(largest)]),
        "router_entropy": np.array([entropy(_shares(scores)).sum(), len(scores)]),
    }


def expert_load(layer: Assignments) -> Int64[np.ndarray, " experts"]:
    """`braidax.expert_load` in int64."""
    used = layer.indices[layer.mask].reshape(-1)
    return np.bincount(used, minlength=layer.num_experts + 1)[:-1].astype(np.int64)


def mean_or_nan(
    total: Real[np.ndarray, " layers"], number: Real[np.ndarray, " layers"]
) -> Float64[np.ndarray, " layers"]:
    """The mean of `number` values with the sum `total`. NaN for the mean of none."""
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def max_violation(load: Int64[np.ndarray, "*layers experts"]) -> Float64[np.ndarray, "*layers"]:
    """`braidax.max_violation` in float64, which is exact for counts above 2**24 too."""
    total, largest = load.sum(axis=-1), load.max(axis=-1)
    return np.where(total > 0, largest * load.shape[-1] / np.maximum(total, 1) - 1, 0.0)


def entropy(shares: Real[np.ndarray, "*rows experts"]) -> Float64[np.ndarray, "*rows"]:
    """Entropy of shares that add up to 1, divided by `log(experts)`. 1 for a single expert."""
    if shares.shape[-1] == 1:
        return shares[..., 0].astype(np.float64)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    # The 0.0 turns -0.0, which would be printed with its sign, into 0.0.
    return -np.sum(shares * logs, axis=-1) / math.log(shares.shape[-1]) + 0.0


def coactivations(
    indices: Int64[np.ndarray, "tokens experts_per_token"], num_experts: int
) -> Int64[np.ndarray, "experts experts"]:
    """Number of tokens that select both `i` and `j`; on the diagonal, of tokens that select `i`.

    An expert that a token names twice counts once. Nobody is not counted.
    """
    indices, size = np.sort(indices, axis=1), num_experts + 1
    # Repetitions are nobody, whose row and column the last line cuts off.
    indices[:, 1:][indices[:, 1:] == indices[:, :-1]] = num_experts
    counts = np.zeros(size * size, np.int64)
    for column in indices.T:
        pairs = column[:, None] * size + indices
        counts += np.bincount(pairs.reshape(-1), minlength=size * size)
    return counts.reshape(size, size)[:num_experts, :num_experts]


def _shares(values: Float64[np.ndarray, "rows size"]) -> Float64[np.ndarray, "rows size"]:
    """Each row divided by its sum. A sum of 0 gives equal shares."""
    total = values.sum(axis=1, keepdims=True)
    equal = np.full_like(values, 1 / values.shape[1])
    return np.divide(values, total, out=equal, where=total > 0)

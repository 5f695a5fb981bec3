"""What a report counts of one layer, batch after batch: on the host, in int64 and float64."""

import math

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer, Real

from .plots.coactivation import coactivations
from .top_tokens import TokenCounts


class LayerCounts:
    """Sums over the tokens of one layer; a batch is gone once it is added."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.load = np.zeros(num_experts, np.int64)
        self.coactivation = np.zeros((num_experts, num_experts), np.int64)
        self.num_tokens = self.undefined = self.dropped = 0
        self.batch_max_violation: list[float] = []
        self._largest_share = self._entropy = 0.0
        self.tokens = TokenCounts()

    def add(
        self,
        indices: Integer[np.ndarray, "tokens experts_per_token"],
        weights: Float[np.ndarray, "tokens experts_per_token"],
        scores: Float[np.ndarray, "tokens experts"],
        ids: Integer[np.ndarray, " tokens"] | None,
        dropped: int,
    ) -> None:
        """Count one batch, of which masked tokens have been taken out."""
        self.dropped += dropped
        load = np.bincount(indices.reshape(-1), minlength=self.num_experts).astype(np.int64)
        self.load += load
        # Nothing was balanced where nothing was routed: a 0 would flatter the mean over batches.
        self.batch_max_violation.append(float(max_violation(load)) if len(indices) else math.nan)
        self.num_tokens += len(indices)
        self.coactivation += coactivations(indices, self.num_experts)
        if ids is not None:
            self.tokens.add(indices, ids)
        defined = np.isfinite(weights).all(axis=1) & np.isfinite(scores).all(axis=1)
        self.undefined += int(np.sum(~defined))
        weights, scores = weights[defined].astype(np.float64), scores[defined].astype(np.float64)
        self._largest_share += float(_largest_share(indices[defined], weights).sum())
        self._entropy += float(entropy(_shares(scores)).sum())

    @property
    def confidence(self) -> float:
        """Mean of the largest share of one expert in a token's weights; NaN without a token."""
        return self._mean(self._largest_share)

    @property
    def router_entropy(self) -> float:
        """Mean entropy of a token's scores, 1 for equal ones; NaN without a token."""
        return self._mean(self._entropy)

    def _mean(self, total: float) -> float:
        count = self.num_tokens - self.undefined
        return total / count if count else math.nan


def max_violation(load: Int64[np.ndarray, "*layers experts"]) -> Float64[np.ndarray, "*layers"]:
    """As `braidax.max_violation`, but exact for counts beyond 2**24."""
    total = load.sum(axis=-1)
    ratio = load.max(axis=-1) * load.shape[-1] / np.where(total > 0, total, 1)
    return np.where(total > 0, np.maximum(ratio - 1, 0.0), 0.0)


def entropy(shares: Real[np.ndarray, "*rows experts"]) -> Float64[np.ndarray, "*rows"]:
    """Entropy of shares that add up to 1, divided by `log(experts)`; 1 for a single expert."""
    if shares.shape[-1] == 1:
        return shares[..., 0].astype(np.float64)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    # Not -0.0, which prints as such, where one expert has everything.
    return -np.sum(shares * logs, axis=-1) / math.log(shares.shape[-1]) + 0.0


def _largest_share(
    indices: Integer[np.ndarray, "tokens experts_per_token"],
    weights: Float64[np.ndarray, "tokens experts_per_token"],
) -> Float64[np.ndarray, " tokens"]:
    """Of each token's weights; what it gives to the same expert twice adds up."""
    # Weights that are all 0 choose nothing: as unsure as can be.
    shares = _shares(weights)
    largest = np.zeros(len(shares))
    for slot in range(indices.shape[1]):
        same = indices == indices[:, slot : slot + 1]
        largest = np.maximum(largest, np.sum(shares, axis=1, where=same))
    return largest


def _shares(values: Float64[np.ndarray, "rows size"]) -> Float64[np.ndarray, "rows size"]:
    """Each row divided by its sum; equal shares where that is 0."""
    total = values.sum(axis=1, keepdims=True)
    equal = np.full_like(values, 1 / values.shape[1])
    return np.divide(values, total, out=equal, where=total > 0)

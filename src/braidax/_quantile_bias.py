"""Quantile balancing: the bias that balances a batch, without a rate."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from ._loss_moments import nth_largest
from ._mesh import placed_by_compiler, varying_alike
from ._routing import Routing, check_routing
from ._sign_bias import check_layers

# Bins of rises: 16 to each power of two from 2**-20 to 2**10, of either sign, numbered by the
# leading bits of a float32. One bin in the middle holds what is nearer to 0.
_SHIFT, _LOWEST, _SIDE = 19, (127 - 20) << 4, 16 * 30
_EDGES = (np.arange(_LOWEST, _LOWEST + _SIDE + 1, dtype=np.int32) << _SHIFT).view(np.float32)
_UPPER = (_EDGES[1:] + _EDGES[:-1]) / 2
# The outermost two hold infinity: no bias makes a choice of what is never or always chosen.
_CENTERS = np.concatenate([[0], -_UPPER[::-1], [0], _UPPER, [0]]).astype(np.float32)


class BiasHistogram(eqx.Module):
    """For how many tokens the bias of each expert lacks how much, to be chosen.

    `bias_histogram` makes it and `quantile_bias` takes it. Histograms made with one bias add up,
    exactly: over micro-batches by `+` or `jax.tree.map`, over devices by `jax.lax.psum`.

    - `counts`: `(*layers, experts, bins)` int32, the valid tokens in each bin.
    - `num_experts_per_token`: of the routings.

    **Source:** as for `quantile_bias`.

    **Example:** two micro-batches.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> tokens, bias = jax.random.normal(jax.random.key(1), (6, 32)), jax.numpy.zeros(8)
        >>> first = bx.bias_histogram(bias, router(tokens[:4]))
        >>> both = first + bx.bias_histogram(bias, router(tokens[4:]))
        >>> whole = bx.bias_histogram(bias, router(tokens))
        >>> isinstance(both, bx.BiasHistogram), bool((both.counts == whole.counts).all())
        (True, True)
    """

    counts: Int32[Array, "*layers experts bins"]
    num_experts_per_token: int = eqx.field(static=True)

    def __add__(self, other: "BiasHistogram") -> "BiasHistogram":
        ours, theirs = self.num_experts_per_token, other.num_experts_per_token
        if ours != theirs:
            raise ValueError(
                f"Histograms must be of the same number of experts per token. Got {ours} and "
                f"{theirs}."
            )
        return jax.tree.map(jnp.add, self, other)


def _rises(
    bias: Float[Array, "*layers experts"], routing: Routing
) -> tuple[Float[Array, "*layers tokens experts"], Bool[Array, "*layers tokens experts"]]:
    """What the bias of each expert lacks for each token to choose the expert, and what counts."""
    *layers, num_experts = bias.shape
    tokens = math.prod(routing.scores.shape[len(layers) : -1])
    shape = (*layers, tokens, num_experts)
    biased = routing.scores.reshape(shape) + jnp.expand_dims(bias.astype(jnp.float32), -2)
    # A score underflows to 0 at a finite logit too, and is chosen. At -inf it never is.
    biased = jnp.where(jnp.isneginf(routing.logits.reshape(shape)), -jnp.inf, biased)
    valid = jnp.max(biased, axis=-1, keepdims=True) < jnp.inf  # False for a token with a NaN
    if routing.mask is not None:
        valid &= routing.mask.reshape(*layers, tokens, 1)
    biased = jnp.where(valid, biased, 0)
    cutoff = nth_largest(biased, routing.indices.shape[-1] + 1)
    rises = jnp.where(jnp.isneginf(biased), jnp.inf, cutoff - biased)
    return rises, jnp.broadcast_to(valid, shape)


def _rank(num_tokens: Int32[Array, "..."], num_chosen: int, num_experts: int) -> Array:
    """`num_tokens * num_chosen // num_experts`, without a product that could overflow."""
    quotient, remainder = num_tokens // num_experts, num_tokens % num_experts
    return quotient * num_chosen + remainder * num_chosen // num_experts


def _exact(
    bias: Float[Array, "*layers experts"], routing: Routing
) -> Float[Array, "*layers experts"]:
    """The bias by the rise that makes as many tokens choose each expert as balance wants.

    The rise is found by counting alone, a bit at a time: a sort would gather the tokens of a mesh.
    """
    rises, valid = _rises(bias, routing)

    def ordered(bits):  # a float32 and its bits as an integer, in the same order; own inverse
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    keys = ordered(jax.lax.bitcast_convert_type(rises, jnp.int32))
    num_tokens = jnp.sum(valid, axis=-2, dtype=jnp.int32)
    rank = _rank(num_tokens, routing.indices.shape[-1], rises.shape[-1])

    def with_bit(position, found):
        candidate = found + (jnp.int32(1) << jnp.int32(31 - position))
        below = jnp.sum(valid & (keys < jnp.expand_dims(candidate, -2)), axis=-2, dtype=jnp.int32)
        return jnp.where(below <= rank, candidate, found)

    lowest = jnp.full_like(rank, jnp.iinfo(jnp.int32).min)
    lowest, rank, keys, valid = varying_alike((lowest, rank, keys, valid))
    found = jax.lax.fori_loop(0, 32, with_bit, lowest)
    rise = jax.lax.bitcast_convert_type(ordered(found), jnp.float32)
    return _risen(bias, jnp.where(jnp.isfinite(rise), rise, 0), num_tokens)


def _risen(bias: Array, rise: Array, num_tokens: Int32[Array, "*layers experts"]) -> Array:
    """The centered sum of `bias` and `rise`, or `bias` where no token was counted."""
    moved = bias + rise
    centered = moved - jnp.mean(moved, axis=-1, keepdims=True)
    return jnp.where(num_tokens > 0, centered, bias)


@jax.jit
def _by_tokens(bias: Array, routing: Routing) -> Float[Array, "*layers experts"]:
    return placed_by_compiler(_exact, bias, routing)


@jax.jit
def _by_counts(bias: Array, histogram: BiasHistogram) -> Float[Array, "*layers experts"]:
    counts = histogram.counts
    if bias.ndim == 1:
        counts = counts.reshape(-1, *counts.shape[-2:]).sum(axis=0, dtype=jnp.int32)
    num_tokens = jnp.sum(counts, axis=-1, dtype=jnp.int32)
    rank = _rank(num_tokens, histogram.num_experts_per_token, bias.shape[-1])
    reached = jnp.cumsum(counts, axis=-1) > rank[..., None]
    return _risen(bias, jnp.asarray(_CENTERS)[jnp.argmax(reached, axis=-1)], num_tokens)


@jax.jit
def _histogram(bias: Array, routing: Routing) -> Int32[Array, "*layers experts bins"]:
    def counted(bins, valid):  # of one expert of one layer
        return jnp.zeros(_CENTERS.size, jnp.int32).at[bins].add(valid)

    def counts(bias, routing):
        rises, valid = _rises(bias, routing)
        bits = jax.lax.bitcast_convert_type(jnp.abs(rises), jnp.int32)
        bins = jnp.clip((bits >> _SHIFT) - _LOWEST + 1, 0, _SIDE)
        bins = jnp.where(jnp.isinf(rises), _SIDE + 1, bins)
        bins = _SIDE + 1 + jnp.sign(rises).astype(jnp.int32) * bins
        function = jax.vmap(counted, -1)
        for _ in bias.shape[:-1]:
            function = jax.vmap(function)
        return function(bins, valid.astype(jnp.int32))

    return placed_by_compiler(counts, bias, routing)


def bias_histogram(bias: Float[Array, "*layers experts"], routing: Routing) -> BiasHistogram:
    """What `quantile_bias` needs of a micro-batch: a record that adds up.

    A token chooses an expert if the biased score of the expert is above the token's cutoff. The
    histogram counts, over valid tokens, how far each expert's `bias` has to rise for that, in 963
    bins. A bin spans at most a 16th of the rise, so no range of scores has to be known. Rises below
    1e-6 share a bin, and so do those above 1024. No token is sorted or gathered.

    - `bias`: `(*layers, experts)`, the bias that `routing` was made with.
    - `routing`: stacked over these layers and over nothing else. For a bias of one layer, all axes
        in front are tokens.

    **Returns:** a `BiasHistogram`. **Source:** as for `quantile_bias`.

    **Raises:** `TypeError` unless `routing` is a Routing, and for a `bias` narrower than float32.
    `ValueError` for shapes that differ.

    **Example:** each of three tokens is counted once for each expert.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> routing = router(jax.numpy.ones((3, 32)))
        >>> bx.bias_histogram(router.score_correction_bias, routing).counts.sum(axis=-1).tolist()
        [3, 3, 3, 3, 3, 3, 3, 3]
    """
    check_layers("routing", check_routing(routing).stacked, routing.scores.shape[-1], bias)
    num_experts_per_token = routing.indices.shape[-1]
    if num_experts_per_token == bias.shape[-1]:  # nobody is left out, and there is no cutoff
        return BiasHistogram(jnp.zeros((*bias.shape, _CENTERS.size), jnp.int32), bias.shape[-1])
    return BiasHistogram(_histogram(bias, routing), num_experts_per_token)


def quantile_bias(
    bias: Float[Array, "*layers experts"], routing: Routing | BiasHistogram
) -> Float[Array, "*layers experts"]:
    """The bias that balances the tokens of `routing` if their cutoffs stay, float32, centered.

    The cutoff of a token is the `experts_per_token + 1`-th largest of `score + bias`. A token
    chooses an expert whose bias is above `cutoff - score`. The new bias of an expert is the
    quantile of these differences over all valid tokens, at `experts_per_token / experts`. Exactly:
    the difference with `floor(tokens * experts_per_token / experts)` smaller ones. A balanced bias
    stays. The mean over experts is subtracted, which leaves selection alone.

    There is no rate, for the step follows from the scores. Cutoffs move with the bias, so balance
    is reached in a few calls. Masked tokens and tokens with a NaN score are left out. Without any
    other token, and where every token chooses every expert, the bias stays.

    The rule knows no groups. Under a `TopKRouter` with `num_groups` above 1 it balances a selection
    without groups, and promises nothing about the limited one.

    - `bias`: `(*layers, experts)`, float32 or wider, what `routing` was made with.
    - `routing`: a Routing, stacked over the layers of `bias` and over nothing else. For a bias of
        one layer, all axes in front are tokens. Or a `BiasHistogram`, summed over micro-batches
        and devices. A histogram gives the middle of a bin, off by at most a 32nd of the rise.

    **Raises:** `TypeError` for anything else, and for a `bias` narrower than float32. `ValueError`
    for shapes that differ.

    **Source:** Kimi K3 technical report, section 2.3.3, eq. 13-14.

    **Example:** a gate that prefers the first of four experts for every token.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> scores = jax.random.uniform(jax.random.key(0), (64, 4)).at[:, 0].add(1)
        >>> indices = jax.lax.top_k(scores, 1)[1]
        >>> routing = bx.Routing(indices, jnp.ones((64, 1)), scores, scores, None, jnp.array(0))
        >>> bias = bx.quantile_bias(jnp.zeros(4), routing)
        >>> bx.expert_load(routing).tolist(), bool(bias[0] < bias[1:].min())
        ([64, 0, 0, 0], True)
    """
    if isinstance(routing, BiasHistogram):
        stacked, num_experts = routing.counts.shape[:-2], routing.counts.shape[-2]
        num_experts_per_token, moved = routing.num_experts_per_token, _by_counts
    else:
        stacked, num_experts = check_routing(routing).stacked, routing.scores.shape[-1]
        num_experts_per_token, moved = routing.indices.shape[-1], _by_tokens
    check_layers("routing", stacked, num_experts, bias)
    bias = bias.astype(jnp.float32)
    return bias if num_experts_per_token == num_experts else moved(bias, routing)

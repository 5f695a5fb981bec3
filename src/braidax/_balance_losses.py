"""Balance losses: pure functions of a `Routing`, to be weighted and added by whoever trains.

Stacked routings have a loss each: layers merged into one would balance their sum, and not them.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._routing import Mask, Routing, of_each_call
from ._scoring import normalized


def nth_largest(scores: Float[Array, "*batch experts"], count: int) -> Float[Array, "*batch 1"]:
    """The `count`-th largest of the scores, equal ones counted apart.

    By comparisons alone, because the partitioner would gather all tokens' scores for `top_k`.
    """

    def lower(_, threshold):
        enough = jnp.sum(scores >= threshold, axis=-1, keepdims=True) >= count
        below = jnp.max(jnp.where(scores < threshold, scores, -jnp.inf), axis=-1, keepdims=True)
        return jnp.where(enough, threshold, below)

    return jax.lax.fori_loop(0, count, lower, jnp.full_like(scores[..., :1], jnp.inf))


def _largest(
    scores: Float[Array, "groups tokens experts"], count: int
) -> Bool[Array, "groups tokens experts"]:
    """Which entries `jax.lax.top_k` selects, that is the first of equal ones."""
    smallest = nth_largest(scores, count)
    above, equal = scores > smallest, scores == smallest
    left = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= left))


def _balance_loss(routing: Routing, groups: int, tokens: int) -> Float[Array, ""]:
    """The balance loss of each group of tokens, averaged over the groups with a valid token."""
    num_experts, experts_per_token = routing.scores.shape[-1], routing.indices.shape[-1]
    scores = routing.scores.reshape(groups, tokens, num_experts)
    mask = _token_mask(routing).reshape(groups, tokens)
    # Replaced before any arithmetic: a masked NaN must not reach the value or the gradient.
    scores = jnp.where(mask[..., None], scores.astype(jnp.float32), 1)
    # The selection of the unbiased scores, which the bias update does not move.
    selected = _largest(jax.lax.stop_gradient(scores), experts_per_token) & mask[..., None]
    counts = jnp.sum(selected, axis=1, dtype=jnp.int32)
    num_tokens = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    divisor = jnp.maximum(num_tokens, 1)[:, None].astype(jnp.float32)
    fractions = counts.astype(jnp.float32) * (num_experts / experts_per_token) / divisor
    shares = jnp.sum(jnp.where(mask[..., None], normalized(scores), 0), axis=1) / divisor
    losses = jnp.sum(fractions * shares, axis=-1)
    num_groups = jnp.sum(num_tokens > 0, dtype=jnp.int32)
    return jnp.sum(losses) / jnp.maximum(num_groups, 1).astype(jnp.float32)


def _token_mask(routing: Routing) -> Mask:
    return jnp.ones(routing.scores.shape[:-1], bool) if routing.mask is None else routing.mask


@of_each_call
def sequence_balance_loss(routing: Routing) -> Float[Array, "*stacked"]:
    """Sequence-wise balance loss of a `routing`, unweighted, float32 `(*stacked,)`.

    The loss is `sum_i f_i P_i`. `f_i` is `experts` times the share of selections of expert `i`,
    by the top-k of the scores **without** the bias. No gradient flows through `f_i`. `P_i` is
    the mean over tokens of the scores divided by their sum. The loss is 1 when the `f_i` are
    equal or the scores flat. It is at most `experts / experts_per_token`, when all scores lie on
    the same experts.

    The last batch axis holds the tokens of one sequence, and the loss is the mean over sequences.
    A single token is a sequence of one. Masked tokens are left out, and so are sequences without
    a valid token; with none at all the loss is 0. A hash layer has nothing to balance.

    **Source:** DeepSeek-V3 (arXiv:2412.19437), eq. 17-20.

    **Example:** a gate that has no preferences, whose two first experts win every tie.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> round(float(bx.sequence_balance_loss(router(jax.numpy.zeros((4, 32))))), 4)
        1.0
    """
    *lead, tokens = routing.scores.shape[:-1] or (1,)
    return _balance_loss(routing, math.prod(lead), tokens)


@of_each_call
def batch_balance_loss(routing: Routing) -> Float[Array, "*stacked"]:
    """As `sequence_balance_loss`, with all tokens of a call as one sequence, whatever their axes.

    Of a `routing`, float32 `(*stacked,)`. **Example:** two sequences on opposite halves.

        >>> import braidax as bx, jax.numpy as jnp
        >>> scores = jnp.array([[[0.5, 0.5, 0, 0]] * 4, [[0, 0, 0.5, 0.5]] * 4])
        >>> indices = jnp.array([[[0, 1]] * 4, [[2, 3]] * 4])
        >>> routing = bx.Routing(indices, jnp.ones((2, 4, 2)), scores, scores, None, jnp.array(0))
        >>> float(bx.sequence_balance_loss(routing)), float(bx.batch_balance_loss(routing))
        (2.0, 1.0)
    """
    return _balance_loss(routing, 1, math.prod(routing.scores.shape[:-1]))


@of_each_call
def router_z_loss(routing: Routing) -> Float[Array, "*stacked"]:
    """Mean over valid tokens of `logsumexp(logits) ** 2`, unweighted, float32 `(*stacked,)`.

    The logits are those of `routing`: a scalar for one call, and for stacked routings one each.
    0 without a valid token. **Source:** arXiv:2202.08906, eq. 5.

    **Raises:** `TypeError` unless `routing` is a Routing.

    **Example:** `log(8) ** 2` for logits that are all 0.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> round(float(bx.router_z_loss(router(jax.numpy.zeros((4, 32))))), 4)
        4.3241
    """
    mask = _token_mask(routing)
    logits = jnp.where(mask[..., None], routing.logits.astype(jnp.float32), 0)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    num_tokens = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(mask, squares, 0)) / num_tokens

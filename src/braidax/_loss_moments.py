"""Sums over tokens of which every loss is a function, and which add up over micro-batches."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ._routing import Routing, of_each_call
from ._scoring import normalized


class LossMoments(eqx.Module):
    """What the losses need of a micro-batch: sums over its valid tokens.

    `loss_moments` makes it, and every loss takes it in place of a Routing. Moments of micro-batches
    add up by `+`, and those of devices by `jax.lax.psum`. A loss of the sum is the loss of the
    whole batch, also where masks leave different numbers of tokens.

    - `counts`: `(*stacked, experts)` int32, selections by the scores without the bias.
    - `shares`: `(*stacked, experts)` float32, sums of the scores divided by their sum.
    - `squares`: `(*stacked,)` float32, the sum of `logsumexp(logits) ** 2`.
    - `num_tokens`: `(*stacked,)` int32.
    - `sequence_losses`: `(*stacked,)` float32, the sum of the losses of all sequences.
    - `num_sequences`: `(*stacked,)` int32, sequences with a valid token.

    **Source:** the sums in DeepSeek-V3 (arXiv:2412.19437), eq. 17-20, and arXiv:2202.08906, eq. 5.

    **Example:** two micro-batches, of three tokens and of one.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> tokens = jax.random.normal(jax.random.key(1), (4, 32))
        >>> both = bx.loss_moments(router(tokens[:3])) + bx.loss_moments(router(tokens[3:]))
        >>> isinstance(both, bx.LossMoments), int(both.num_tokens)
        (True, 4)
        >>> bool(abs(bx.batch_balance_loss(both) - bx.batch_balance_loss(router(tokens))) < 1e-6)
        True
    """

    counts: Int32[Array, "*stacked experts"]
    shares: Float[Array, "*stacked experts"]
    squares: Float[Array, "*stacked"]
    num_tokens: Int32[Array, "*stacked"]
    sequence_losses: Float[Array, "*stacked"]
    num_sequences: Int32[Array, "*stacked"]

    def __add__(self, other: "LossMoments") -> "LossMoments":
        return jax.tree.map(jnp.add, self, other)

    def with_gradient_of(self, part: "LossMoments") -> "LossMoments":
        """These moments, to be differentiated as if all but `part` were constant.

        These are the sum over all micro-batches, and `part` is one of the summands, `(*stacked,)`
        as these are. The gradients of a loss of the result, summed over the micro-batches, are the
        gradient of the loss of the large batch. So each micro-batch can be differentiated alone.

        **Example:** half of the gradient comes from each of two equal parts.

            >>> import braidax as bx, jax, jax.numpy as jnp
            >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
            >>> part = bx.loss_moments(router(jnp.ones((4, 32))))
            >>> both = part + part
            >>> loss = lambda moments: bx.router_z_loss(both.with_gradient_of(moments))
            >>> bool(loss(part) == bx.router_z_loss(both))
            True
        """

        def replaced(whole: Array, ours: Array) -> Array:
            return jax.lax.stop_gradient(whole) + (ours - jax.lax.stop_gradient(ours))

        return jax.tree.map(replaced, self, part)


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


def balance_loss(
    counts: Int32[Array, "*stacked experts"],
    shares: Float[Array, "*stacked experts"],
    num_tokens: Int32[Array, "*stacked"],
) -> Float[Array, "*stacked"]:
    """`sum_i f_i P_i` of tokens that have these sums, 0 without a token."""
    total = jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1).astype(jnp.float32)
    fractions = counts.astype(jnp.float32) * (counts.shape[-1] / total)
    return mean(jnp.sum(fractions * shares, axis=-1), num_tokens)


def mean(total: Float[Array, "..."], count: Int32[Array, "..."]) -> Float[Array, "..."]:
    """`total / count`, 0 where nothing is counted."""
    return total / jnp.maximum(count, 1).astype(jnp.float32)


@of_each_call
def loss_moments(routing: Routing) -> LossMoments:
    """The sums over valid tokens of a `routing` that the losses are functions of.

    **Returns:** `LossMoments`, all with the axes `(*stacked,)` in front.

    **Raises:** `TypeError` unless `routing` is a Routing. **Source:** as for `LossMoments`.

    **Example:**

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> moments = bx.loss_moments(router(jax.numpy.ones((4, 32))))
        >>> int(moments.num_tokens), int(moments.counts.sum())
        (4, 8)
    """
    num_experts, experts_per_token = routing.scores.shape[-1], routing.indices.shape[-1]
    *lead, tokens = routing.scores.shape[:-1] or (1,)
    shape = (math.prod(lead), tokens)
    mask = jnp.ones(shape, bool) if routing.mask is None else routing.mask.reshape(shape)
    # Replaced before any arithmetic: a masked NaN must not reach the value or the gradient.
    scores = routing.scores.reshape(*shape, num_experts).astype(jnp.float32)
    scores = jnp.where(mask[..., None], scores, 1)
    logits = routing.logits.reshape(*shape, num_experts).astype(jnp.float32)
    squares = jnp.square(jax.nn.logsumexp(jnp.where(mask[..., None], logits, 0), axis=-1))
    # The selection of the unbiased scores, which the bias update does not move.
    selected = _largest(jax.lax.stop_gradient(scores), experts_per_token) & mask[..., None]
    counts = jnp.sum(selected, axis=1, dtype=jnp.int32)
    shares = jnp.sum(jnp.where(mask[..., None], normalized(scores), 0), axis=1)
    num_tokens = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    return LossMoments(
        jnp.sum(counts, axis=0, dtype=jnp.int32),
        jnp.sum(shares, axis=0),
        jnp.sum(jnp.where(mask, squares, 0)),
        jnp.sum(num_tokens, dtype=jnp.int32),
        jnp.sum(balance_loss(counts, shares, num_tokens)),
        jnp.sum(num_tokens > 0, dtype=jnp.int32),
    )

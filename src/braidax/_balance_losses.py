"""Losses: pure functions of a `Routing` or of moments, to be weighted and added by whoever trains.

Stacked routings have a loss each: layers merged into one would balance their sum, and not them.
"""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from ._loss_moments import LossMoments, balance_loss, loss_moments, mean
from ._routing import Routing, check_routing


@functools.partial(jax.jit, static_argnums=0)
def _compiled(loss: Callable[[LossMoments], Array], routing: Routing | LossMoments) -> Array:
    return loss(loss_moments(routing) if isinstance(routing, Routing) else routing)


def _of_moments(loss: Callable[[LossMoments], Array], routing: Routing | LossMoments) -> Array:
    """The `loss` of moments, of `routing` or what it is. A call compiles once."""
    given = routing if isinstance(routing, LossMoments) else check_routing(routing)
    return _compiled(loss, given)


def _sequence(moments: LossMoments) -> Array:
    return mean(moments.sequence_losses, moments.num_sequences)


def _batch(moments: LossMoments) -> Array:
    return balance_loss(moments.counts, moments.shares, moments.num_tokens)


def _squared(moments: LossMoments) -> Array:
    return mean(moments.squares, moments.num_tokens)


def sequence_balance_loss(routing: Routing | LossMoments) -> Float[Array, "*stacked"]:
    """Sequence-wise balance loss of a `routing` or of moments, unweighted, float32 `(*stacked,)`.

    The loss is `sum_i f_i P_i`. `f_i` is `experts` times the share of selections of expert `i`,
    by the top-k of the scores **without** the bias. No gradient flows through `f_i`. `P_i` is
    the mean over tokens of the scores divided by their sum. The loss is 1 when the `f_i` are
    equal or the scores flat. It is at most `experts / experts_per_token`, when all scores lie on
    the same experts.

    The last batch axis holds the tokens of one sequence, and the loss is the mean over sequences.
    A single token is a sequence of one. Masked tokens are left out, and so are sequences without
    a valid token; with none at all the loss is 0. A hash layer has nothing to balance.

    `LossMoments` in place of a Routing may be sums over micro-batches, each of whole sequences.

    **Raises:** `TypeError` for anything else.

    **Source:** DeepSeek-V3 (arXiv:2412.19437), eq. 17-20.

    **Example:** a gate that has no preferences, whose two first experts win every tie.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> round(float(bx.sequence_balance_loss(router(jax.numpy.zeros((4, 32))))), 4)
        1.0
    """
    return _of_moments(_sequence, routing)


def batch_balance_loss(routing: Routing | LossMoments) -> Float[Array, "*stacked"]:
    """As `sequence_balance_loss`, with all tokens of a call as one sequence, whatever their axes.

    Of a `routing` or of `LossMoments`, float32 `(*stacked,)`. The loss of a sum of moments is that
    of the large batch. **Example:** two sequences on opposite halves.

        >>> import braidax as bx, jax.numpy as jnp
        >>> scores = jnp.array([[[0.5, 0.5, 0, 0]] * 4, [[0, 0, 0.5, 0.5]] * 4])
        >>> indices = jnp.array([[[0, 1]] * 4, [[2, 3]] * 4])
        >>> routing = bx.Routing(indices, jnp.ones((2, 4, 2)), scores, scores, None, jnp.array(0))
        >>> float(bx.sequence_balance_loss(routing)), float(bx.batch_balance_loss(routing))
        (2.0, 1.0)
    """
    return _of_moments(_batch, routing)


def router_z_loss(routing: Routing | LossMoments) -> Float[Array, "*stacked"]:
    """Mean over valid tokens of `logsumexp(logits) ** 2`, unweighted, float32 `(*stacked,)`.

    The logits are those of `routing`: a scalar for one call, and for stacked routings one each.
    0 without a valid token. `LossMoments` in place of a Routing may be sums over micro-batches.

    **Raises:** `TypeError` for anything else. **Source:** arXiv:2202.08906, eq. 5.

    **Example:** `log(8) ** 2` for logits that are all 0.

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> round(float(bx.router_z_loss(router(jax.numpy.zeros((4, 32))))), 4)
        4.3241
    """
    return _of_moments(_squared, routing)

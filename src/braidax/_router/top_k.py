"""`TopKRouter`: the highest scores win, after a bias that only selection sees."""

from typing import Any, ClassVar, Literal, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import experts_per_token, integer, positive_integer, same_sizes
from .._routing import InputIds, Scores
from .._sign_bias import check_bias_dtype
from .base import AbstractRouter, BiasRule, Selection
from .gate import Gate, GateOptions

# What ranks a group: the sum of so many of its best biased scores.
_GROUP_SCORES = {"top2": 2, "max": 1}


class TopKRouter(AbstractRouter):
    """Selects the `num_experts_per_token` experts of highest `score + bias`.

    The bias moves the selection only: weights are gathered from the unbiased scores, and no
    gradient reaches it (`updated_bias` and `rebalance` move it instead). Equal scores are won by
    the lower expert index. A token with a NaN score, or any NaN in the bias, gets NaN weights.

    `score_correction_bias` is float32 whatever the dtype of the parameters, and a narrower one is
    refused. Smaller formats lose the small steps it is updated with, and choose other experts. Cast
    a model by `braidax.cast`. Known elsewhere as `gate.bias` or `e_score_correction_bias`.

    - `gate`: the `Gate`.
    - `score_correction_bias`: `(experts,)`, 0 at construction.
    - all others: the arguments of the constructor.

    **Source:** DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.

    **Example:** the bias moves the selection, the weights sum to the scaling factor all the same.

        >>> import braidax as bx, equinox as eqx, jax
        >>> router = bx.TopKRouter(32, 8, 2, scaling_factor=1.5, key=jax.random.key(0))
        >>> bias = jax.numpy.array([0, 0, 0, 100.0, 0, 100.0, 0, 0])
        >>> router = eqx.tree_at(lambda router: router.score_correction_bias, router, bias)
        >>> routing = router(jax.numpy.ones(32))
        >>> sorted(routing.indices.tolist()), round(float(routing.weights.sum()), 4)
        ([3, 5], 1.5)
    """

    gate: Gate
    score_correction_bias: Float[Array, " experts"]
    num_experts_per_token: int = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    num_selected_groups: int = eqx.field(static=True)
    group_score: str = eqx.field(static=True)

    untrained_fields: ClassVar[tuple[str, ...]] = ("score_correction_bias",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        num_groups: int = 1,
        num_selected_groups: int = 1,
        group_score: Literal["top2", "max"] = "top2",
        key: PRNGKeyArray,
        **gate_options: Unpack[GateOptions],
    ):
        """**Arguments:**

        - `hidden_size`, `num_experts`, `num_experts_per_token`: sizes.
        - `num_groups`, `num_selected_groups`: selection limited to the best groups of consecutive
            experts; 1 and 1 for no limit.
        - `group_score`: what ranks a group: the sum of its two best biased scores (DeepSeek-V3),
            or the best one, `"max"` (DeepSeek-V2).
        - `key` and the `gate_options`, which are `score_function`, `normalize`,
            `scaling_factor`, `temperature`, `use_bias` and `dtype`: as for `Gate`.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        self.gate = Gate(hidden_size, num_experts, key=key, **gate_options)
        self.num_experts_per_token = experts_per_token(num_experts_per_token, num_experts)
        if group_score not in _GROUP_SCORES:
            names = " or ".join(map(repr, _GROUP_SCORES))
            raise ValueError(f"`group_score` must be {names}. Got {group_score!r:.60}.")
        groups = (num_groups, num_selected_groups, _GROUP_SCORES[group_score])
        _check_groups(num_experts, num_experts_per_token, *groups)
        self.score_correction_bias = jnp.zeros(num_experts, jnp.float32)
        self.num_groups, self.num_selected_groups = int(num_groups), int(num_selected_groups)
        self.group_score = group_score

    def select(
        self,
        scores: Scores,
        logits: Scores,
        input_ids: InputIds | None,
        *,
        key: PRNGKeyArray | None,
    ) -> Selection:
        """Bias-corrected, group-limited top-k of `scores`, as `AbstractRouter.select`.

        **Raises:** `ValueError` or `TypeError` for a bias of another shape or dtype.
        """
        del input_ids, key
        bias = jnp.asarray(self.score_correction_bias)
        _check_bias(bias, scores.shape[-1])
        scores, bias = jax.lax.stop_gradient((scores, bias))
        corrected = scores + jnp.broadcast_to(bias.astype(jnp.float32), scores.shape)
        undefined = jnp.isnan(corrected)
        # `lax.top_k` ranks NaN by its sign bit, which is arbitrary: pin the answer.
        corrected = jnp.where(undefined, jnp.inf, corrected)
        # A score underflows to 0 at a finite logit too; -inf must still lose against it.
        corrected = jnp.where(jnp.isneginf(logits), -jnp.inf, corrected)
        if self.num_selected_groups < self.num_groups:
            groups = (self.num_groups, self.num_selected_groups, _GROUP_SCORES[self.group_score])
            corrected = _keep_best_groups(corrected, *groups)
        _, indices = jax.lax.top_k(corrected, self.num_experts_per_token)
        return indices.astype(jnp.int32), ~undefined.any(axis=-1)

    def rebalanced(self, rule: BiasRule, item: Any) -> "TopKRouter":
        """The router whose bias is `rule(bias, item)`.

        **Raises:** `TypeError` or `ValueError` unless the rule gives a bias of the same shape,
        float32 or wider. **Example:**

            >>> import braidax as bx, functools, jax
            >>> router = bx.TopKRouter(32, 4, 2, key=jax.random.key(0))
            >>> rule = functools.partial(bx.updated_bias, rate=0.5)
            >>> router = router.rebalanced(rule, jax.numpy.array([4, 2, 1, 1]))
            >>> router.score_correction_bias.tolist()
            [-0.5, 0.0, 0.5, 0.5]
        """
        bias = rule(self.score_correction_bias, item)
        check_bias_dtype("rule(bias, item)", bias)
        wanted = self.score_correction_bias.shape
        same_sizes("rule(bias, item)", bias.shape, wanted, "the shape of `bias`")
        return eqx.tree_at(lambda router: router.score_correction_bias, self, bias)


def _keep_best_groups(
    corrected: Scores, num_groups: int, num_selected: int, num_summed: int
) -> Scores:
    """Experts outside the selected groups become -inf: 0 would beat a negative biased score."""
    *batch, num_experts = corrected.shape
    grouped = corrected.reshape(*batch, num_groups, num_experts // num_groups)
    # Finite for the ranking of groups: beside one -inf a good expert must still count.
    largest = float(jnp.finfo(grouped.dtype).max) / 4
    finite = jnp.clip(grouped, -largest, largest)
    group_scores = jax.lax.top_k(finite, num_summed)[0].sum(axis=-1)
    # A rank comparison instead of a scatter: group i is kept when fewer than `num_selected`
    # groups come before it, and equal groups are won by the lower index as in `top_k`.
    ours, theirs = group_scores[..., :, None], group_scores[..., None, :]
    lower_index = jnp.tri(num_groups, k=-1, dtype=bool)
    before = (theirs > ours) | (
        (theirs == ours) & jnp.broadcast_to(lower_index, theirs.shape[:-2] + lower_index.shape)
    )
    kept = before.sum(axis=-1) < num_selected
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(corrected.shape)


def _check_bias(bias: Array, num_experts: int) -> None:
    """The bias may have been replaced since construction; an odd shape would broadcast."""
    check_bias_dtype("score_correction_bias", bias)
    if bias.shape != (num_experts,):
        raise ValueError(
            f"`score_correction_bias` must have shape (experts={num_experts},). Got {bias.shape}."
        )


def _check_groups(
    num_experts: int,
    num_experts_per_token: int,
    num_groups: int,
    num_selected_groups: int,
    num_summed: int,
) -> None:
    positive_integer("num_groups", num_groups)
    integer("num_selected_groups", num_selected_groups, 1, num_groups)
    if num_experts % num_groups != 0:
        raise ValueError(f"`num_groups` must divide num_experts={num_experts}. Got {num_groups}.")
    group_size = num_experts // num_groups
    if num_groups > 1 and group_size < num_summed:
        raise ValueError(
            f"`num_groups` must leave at least {num_summed} experts in a group, whose best scores "
            f"rank it. Got {num_groups} groups of {num_experts} experts."
        )
    if num_experts_per_token > num_selected_groups * group_size:
        raise ValueError(
            "`num_experts_per_token` must be at most the number of experts in the selected "
            f"groups, {num_selected_groups} * {group_size}. Got {num_experts_per_token}."
        )

"""The gate: scores of every expert, and the weights of those that were selected."""

from collections.abc import Callable
from typing import TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._checks import boolean, floating_dtype, positive_integer, positive_number, same_sizes
from .._functions import as_module
from .._initial import uniform
from .._routing import HiddenStates, Indices, Scores, Weights
from .._scoring import normalized, sqrt_softplus

ScoreFunction = Callable[[Scores], Scores]


class GateOptions(TypedDict, total=False):
    """The keywords that a router hands on to its `Gate`, which has their defaults."""

    score_function: ScoreFunction
    normalize: bool
    scaling_factor: float | int
    temperature: float | int
    use_bias: bool
    dtype: DTypeLike | None


class Gate(eqx.Module):
    """Scores every expert for every token, and weighs the experts that a router selects.

    Everything is computed in float32 whatever the dtypes, and the matrix product at the highest
    precision: a lower one changes which experts are selected.

    - `weight`: `(experts, hidden)`.
    - `bias`: `(experts,)` or `None`, added to the logits and trained.
    - all others: the arguments of the constructor.

    **Source:** DeepSeek-V3 (arXiv:2412.19437), section 2.1.2; the scores of DeepSeek-V4
    (arXiv:2606.19348), section 2.1; the bias is that of GPT-OSS.

    **Example:** softmax scores, whose two largest are made to add up to 1.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> gate = bx.Gate(32, 8, score_function=jax.nn.softmax, key=jax.random.key(0))
        >>> scores, logits = gate(jnp.ones((4, 32)))
        >>> weights = gate.weigh(scores, jnp.array([[0, 1]] * 4))
        >>> round(float(weights[0].sum()), 4)
        1.0
    """

    weight: Float[Array, "experts hidden"]
    bias: Float[Array, " experts"] | None
    score_function: ScoreFunction
    normalize: bool = eqx.field(static=True)
    scaling_factor: float = eqx.field(static=True)
    temperature: float = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        score_function: ScoreFunction = sqrt_softplus,
        normalize: bool = True,
        scaling_factor: float | int = 1.0,
        temperature: float | int = 1.0,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `hidden_size`, `num_experts`: sizes.
        - `score_function`: from logits to scores of at least 0, `(*batch, experts)` to the same
            shape: `braidax.sqrt_softplus`, `jax.nn.sigmoid`, `jax.nn.softmax` or any function. A
            module may hold arrays, which are trained. The field is always a module.
        - `normalize`: divide the selected scores by their sum.
        - `scaling_factor`: multiplies the weights, last.
        - `temperature`: divides the logits.
        - `use_bias`: add a trained bias to the logits, 0 at construction.
        - `dtype`: of the parameters; by default JAX's own.
        - `key`: for `weight`, uniform within +-1/sqrt(hidden), as `eqx.nn.Linear` has it.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        experts = positive_integer("num_experts", num_experts)
        hidden = positive_integer("hidden_size", hidden_size)
        dtype = floating_dtype("dtype", dtype)
        self.weight = uniform(key, (experts, hidden), hidden, dtype)
        self.bias = jnp.zeros(experts, dtype) if boolean("use_bias", use_bias) else None
        self.score_function = as_module("score_function", score_function)
        self.normalize = boolean("normalize", normalize)
        self.scaling_factor = positive_number("scaling_factor", scaling_factor)
        self.temperature = positive_number("temperature", temperature)

    def __call__(
        self, hidden_states: HiddenStates, *, key: PRNGKeyArray | None = None
    ) -> tuple[Scores, Scores]:
        """Float32 scores and logits, `(*batch, experts)`, of `hidden_states`, `(*batch, hidden)`.

        `key` is ignored.
        """
        del key
        logits = jnp.matmul(
            hidden_states.astype(jnp.float32),
            self.weight.astype(jnp.float32).T,
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.bias is not None:
            same_sizes("bias", self.bias.shape, logits.shape[-1:], "the (experts,) of `weight`")
            logits = logits + jnp.broadcast_to(self.bias.astype(jnp.float32), logits.shape)
        logits = logits / self.temperature
        return self.score_function(logits), logits

    def weigh(self, scores: Scores, indices: Indices) -> Weights:
        """The weights of the experts `indices`, `(*batch, experts_per_token)`.

        The weights are the experts' `scores`, of `(*batch, experts)`, normalized and scaled.
        Nobody has weight 0.
        """
        somebody = indices < scores.shape[-1]
        within = jnp.where(somebody, indices, 0)
        weights = jnp.take_along_axis(scores, within, axis=-1, mode="promise_in_bounds")
        weights = jnp.where(somebody, weights, 0)
        return (normalized(weights) if self.normalize else weights) * self.scaling_factor

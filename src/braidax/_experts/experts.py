"""Feed-forward experts: one network, and a stack of them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._checks import boolean, floating_dtype, last_axis, positive_integer
from .._functions import as_module
from .._initial import uniform
from .._matmul import (
    Activation,
    FeedForwardWeights,
    GroupedMatmul,
    accumulation_dtype,
    num_inputs,
)
from .activations import swiglu
from .base import AbstractExperts

_SWIGLU = swiglu()


class FeedForward(eqx.Module):
    """One feed-forward network: the shared expert.

    The released spelling of `gate_up` is `w1`/`gate_proj` for `gate_up[0]` and `w3`/`up_proj` for
    `gate_up[1]`. `down` is the transpose of `w2`/`down_proj`.

    - `gate_up`: `(2, intermediate, hidden)`, the gate first; `(1, intermediate, hidden)` for an
      activation of one argument.
    - `down`: `(intermediate, hidden)`.
    - `gate_up_bias`, `down_bias`: `(2, intermediate)` and `(hidden,)`, or `None`.
    - `activation`: elementwise.

    **Example:**

        >>> import braidax as bx, jax
        >>> shared = bx.FeedForward(32, 16, key=jax.random.key(0))
        >>> shared(jax.numpy.ones((4, 32))).shape, shared.gate_up.shape, shared.down.shape
        ((4, 32), (2, 16, 32), (16, 32))
    """

    gate_up: Float[Array, "_ intermediate hidden"]
    down: Float[Array, "intermediate hidden"]
    gate_up_bias: Float[Array, "_ intermediate"] | None
    down_bias: Float[Array, " hidden"] | None
    activation: Activation

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = _SWIGLU,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `hidden_size`, `intermediate_size`: widths.
        - `activation`: an elementwise function of gate and up, or of one argument. It must be
            hashable, and equal to every activation that computes the same. The field is always a
            module.
        - `use_bias`: add trained biases after both products, 0 at construction.
        - `dtype`: of the weights; by default JAX's own.
        - `key`: for the weights, uniform within +-1/sqrt(fan-in).

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        arrays = _initial((), hidden_size, intermediate_size, activation, use_bias, dtype, key)
        self.gate_up, self.down, self.gate_up_bias, self.down_bias = arrays
        self.activation = as_module("activation", activation)

    @jax.named_scope("braidax.FeedForward")
    def __call__(
        self, hidden_states: Float[Array, "*batch hidden"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch hidden"]:
        """`hidden_states`, `(*batch, hidden)`, to `(*batch, hidden)` in float32 or wider. The sum
        with the routed experts is then rounded once. `key` is ignored.

        **Raises:** `ValueError` or `TypeError` at trace time for a wrong width or dtype.
        """
        del key
        _check_weights(self)
        last_axis("hidden_states", hidden_states, self.gate_up.shape[-1], "hidden")
        dtype = accumulation_dtype(hidden_states, self.gate_up)
        # One product of all parts. Activations are not rounded to the dtype of the weights, which
        # would change a fifth of the outputs.
        merged = self.gate_up.reshape(-1, self.gate_up.shape[-1])
        before = jnp.matmul(hidden_states, merged.T, preferred_element_type=dtype)
        if self.gate_up_bias is not None:
            before = before + jnp.broadcast_to(self.gate_up_bias.reshape(-1), before.shape)
        activations = self.activation(*jnp.split(before, len(self.gate_up), axis=-1))
        output = jnp.matmul(activations, self.down, preferred_element_type=dtype)
        if self.down_bias is None:
            return output
        return output + jnp.broadcast_to(self.down_bias, output.shape)


class Experts(AbstractExperts):
    """A stack of `FeedForward` networks, applied to rows that are grouped by expert.

    The weights are those of `FeedForward` with a leading expert axis.

    - `gate_up`: `(experts, 2, intermediate, hidden)`, known elsewhere as `gate_up_proj`.
    - `down`: `(experts, intermediate, hidden)`, the transpose of what is elsewhere `down_proj`.
    - `gate_up_bias`, `down_bias`: `(experts, 2, intermediate)` and `(experts, hidden)`, or `None`.
    - `activation`: elementwise.

    **Example:** used by a `RoutedMoE`, whose dispatch sorts the rows and says how to multiply.

        >>> import braidax as bx, jax
        >>> experts = bx.Experts(8, 32, 16, key=jax.random.key(0))
        >>> experts.gate_up.shape, experts.down.shape
        ((8, 2, 16, 32), (8, 16, 32))
    """

    # Arrays, or what stands in for them: packed numbers, and modules that multiply rows themselves.
    gate_up: Any
    down: Any
    gate_up_bias: Float[Array, "experts _ intermediate"] | None
    down_bias: Float[Array, "experts hidden"] | None
    activation: Activation

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = _SWIGLU,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** `num_experts`, then as for `FeedForward`.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        lead = (positive_integer("num_experts", num_experts),)
        arrays = _initial(lead, hidden_size, intermediate_size, activation, use_bias, dtype, key)
        self.gate_up, self.down, self.gate_up_bias, self.down_bias = arrays
        self.activation = as_module("activation", activation)

    @jax.named_scope("braidax.Experts")
    def __call__(
        self,
        rows: Float[Array, "rows hidden"],
        group_sizes: Int[Array, " experts"],
        matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """As `AbstractExperts.__call__`. Activations between the products are not rounded, but for
        kernels that multiply numbers of one width (`Mosaic`, `Ragged`, `Tokamax`).

        **Raises:** `ValueError` at trace time for weights that do not fit together.
        """
        return self._through(rows, None, group_sizes, matmul)

    @jax.named_scope("braidax.Experts")
    def call_scaled(
        self,
        rows: Float[Array, "rows hidden"],
        scales: Float[Array, " rows"],
        group_sizes: Int[Array, " experts"],
        matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """As `AbstractExperts.call_scaled`, with errors as of `__call__`. The backward pass
        needs no output."""
        return self._through(rows, scales, group_sizes, matmul)

    def _through(self, rows, scales, group_sizes, matmul):
        _check_weights(self)
        if self.gate_up.shape[0] != group_sizes.shape[0]:
            raise ValueError(
                f"`gate_up` must hold {group_sizes.shape[0]} experts, as many as `group_sizes`. "
                f"Got {self.gate_up.shape[0]}."
            )
        last_axis("rows", rows, self.gate_up.shape[-1], "hidden")
        bias = self.gate_up_bias
        weights = FeedForwardWeights(
            _merged(self.gate_up),
            self.down,
            None if bias is None else bias.reshape(bias.shape[0], -1),
            self.down_bias,
        )
        return matmul.feed_forward(rows, weights, group_sizes, self.activation, scales)


def _initial(lead, hidden_size, intermediate_size, activation, use_bias, dtype, key):
    """`gate_up`, `down` and their biases, with the axes `lead` in front."""
    hidden = positive_integer("hidden_size", hidden_size)
    intermediate = positive_integer("intermediate_size", intermediate_size)
    dtype = floating_dtype("dtype", dtype)
    parts = _num_parts(activation)
    gate_up_key, down_key = jax.random.split(key)
    gate_up = uniform(gate_up_key, (*lead, parts, intermediate, hidden), hidden, dtype)
    down = uniform(down_key, (*lead, intermediate, hidden), intermediate, dtype)
    if not boolean("use_bias", use_bias):
        return gate_up, down, None, None
    biases = (jnp.zeros((*lead, parts, intermediate), dtype), jnp.zeros((*lead, hidden), dtype))
    return gate_up, down, *biases


def _num_parts(activation: Activation) -> int:
    try:
        parts = num_inputs(activation)
    except (TypeError, ValueError):
        parts = 0
    if parts not in (1, 2):
        raise TypeError(
            "`activation` must be a hashable function of gate and up, or of one argument. "
            f"Got {activation!r:.60}."
        )
    return parts


def _merged(gate_up: Any) -> Any:
    """`(experts, 2, intermediate, hidden)` as `(experts, 2 * intermediate, hidden)`."""
    if hasattr(gate_up, "merged"):
        return gate_up.merged()
    return gate_up.reshape(gate_up.shape[0], -1, gate_up.shape[-1])


def _check_weights(experts: FeedForward | Experts) -> None:
    """The shapes of weights, which may have been replaced since construction, fit together."""
    *lead, parts, intermediate, hidden = experts.gate_up.shape
    wanted = {
        "down": (*lead, intermediate, hidden),
        "gate_up_bias": (*lead, parts, intermediate),
        "down_bias": (*lead, hidden),
    }
    if parts != num_inputs(experts.activation):
        raise ValueError(
            f"`gate_up` must have shape (*, {num_inputs(experts.activation)}, intermediate, "
            f"hidden), a matrix for each argument of `activation`. Got {experts.gate_up.shape}."
        )
    for name, shape in wanted.items():
        weight = getattr(experts, name)
        if weight is not None and weight.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {shape}, to fit `gate_up` {experts.gate_up.shape}. "
                f"Got {weight.shape}."
            )

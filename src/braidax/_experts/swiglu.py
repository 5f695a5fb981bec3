"""SwiGLU with clamped activations: one expert, and a stack of them."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._checks import floating_dtype, last_axis, positive_integer, positive_number
from .base import AbstractExperts
from .grouped_matmul import GroupedMatmul, accumulation_dtype

# silu and its slope are exactly 0 from here on down, in every float of 16 to 64 bits. Further down
# the gradient's product of gate and cotangent overflows, and inf * 0 is NaN.
_LOWEST_GATE = -1000.0


def swiglu(
    gate_up: Float[Array, "*batch gate_and_up"], limit: float | None
) -> Float[Array, "*batch intermediate"]:
    """`silu(min(gate, limit)) * clip(up, -limit, limit)`; the first half of the axis is the gate.

    Selects instead of `jnp.minimum` and `jnp.clip`: their derivative exactly at the limit is one
    half, the reference's is 1. A gate of -inf gives 0, as the limit of silu does.
    """
    gate, up = jnp.split(gate_up, 2, axis=-1)
    gate = jnp.where(gate < _LOWEST_GATE, _LOWEST_GATE, gate)
    if limit is not None:
        gate = jnp.where(gate > limit, limit, gate)
        up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return jax.nn.silu(gate) * up


class _Activation(NamedTuple):
    """`swiglu` at one limit, equal to any other at that limit: compiled once."""

    limit: float | None

    def __call__(
        self, gate_up: Float[Array, "*batch gate_and_up"]
    ) -> Float[Array, "*batch intermediate"]:
        return swiglu(gate_up, self.limit)


def _check_weights(gate_up: tuple[int, ...], down: tuple[int, ...]) -> None:
    """The shapes of weights, which may have been replaced since construction, fit together."""
    *experts, gate_and_up, hidden = gate_up
    wanted = (*experts, gate_and_up // 2, hidden)
    if gate_and_up % 2 != 0 or down != wanted:
        raise ValueError(
            f"`down` must have shape {wanted}, with half the rows of `gate_up` {gate_up}. "
            f"Got {down}."
        )


def _uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype
) -> Float[Array, "..."]:
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class SwiGLU(eqx.Module):
    """One SwiGLU feed-forward network without biases: the shared expert.

    Both weights keep the intermediate axis first, gate rows before up rows. The released
    spelling is `w1`/`gate_proj` and `w3`/`up_proj` for the halves of `gate_up`, and the transpose
    of `w2`/`down_proj` for `down`.

    - `gate_up`: `(gate_and_up, hidden)`, twice the intermediate size, the gate rows first.
    - `down`: `(intermediate, hidden)`.
    - `limit`: the clamp.

    **Example:**

        >>> import braidax as bx, jax
        >>> shared = bx.SwiGLU(32, 16, limit=10.0, key=jax.random.key(0))
        >>> shared(jax.numpy.ones((4, 32))).shape, shared.gate_up.shape, shared.down.shape
        ((4, 32), (32, 32), (16, 32))

    **Source:** arXiv:2002.05202; the clamp is that of DeepSeek-V4 (arXiv:2606.19348), 4.2.3.
    """

    gate_up: Float[Array, "gate_and_up hidden"]
    down: Float[Array, "intermediate hidden"]
    limit: float | None = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        limit: float | int | None = None,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `hidden_size`, `intermediate_size`: widths.
        - `limit`: clamps the gate from above and the up projection on both sides; `None` for no
            clamp.
        - `dtype`: of the weights.
        - `key`: for their initialisation, uniform within +-1/sqrt(fan-in).

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        hidden = positive_integer("hidden_size", hidden_size)
        intermediate = positive_integer("intermediate_size", intermediate_size)
        dtype = floating_dtype("dtype", dtype)
        gate_up_key, down_key = jax.random.split(key)
        self.gate_up = _uniform(gate_up_key, (2 * intermediate, hidden), hidden, dtype)
        self.down = _uniform(down_key, (intermediate, hidden), intermediate, dtype)
        self.limit = None if limit is None else positive_number("limit", limit)

    @jax.named_scope("braidax.SwiGLU")
    def __call__(
        self, hidden_states: Float[Array, "*batch hidden"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch hidden"]:
        """`hidden_states`, `(*batch, hidden)`, to `(*batch, hidden)`, returned in float32 or wider
        so that the sum with the routed experts is rounded once. `key` is ignored.

        **Raises:** `ValueError` or `TypeError` at trace time for a wrong width or dtype.
        """
        del key
        _check_weights(self.gate_up.shape, self.down.shape)
        last_axis("hidden_states", hidden_states, self.gate_up.shape[-1], "hidden")
        dtype = accumulation_dtype(hidden_states, self.gate_up)
        gate_up = jnp.matmul(hidden_states, self.gate_up.T, preferred_element_type=dtype)
        # Not rounded to the dtype of the weights: that alone moves a fifth of the outputs.
        activations = swiglu(gate_up, self.limit)
        return jnp.matmul(activations, self.down, preferred_element_type=dtype)


class SwiGLUExperts(AbstractExperts):
    """A stack of `SwiGLU` networks, applied to rows that are grouped by expert.

    The weights are those of `SwiGLU` with a leading expert axis:

    - `gate_up`: `(experts, gate_and_up, hidden)`, known elsewhere as `gate_up_proj`.
    - `down`: `(experts, intermediate, hidden)`, the transpose of what is elsewhere `down_proj`.
    - `limit`: the clamp.

    **Source:** as for `SwiGLU`.

    **Example:** used by a `RoutedMoE`, which sorts the rows and says how to multiply.

        >>> import braidax as bx, jax
        >>> experts = bx.SwiGLUExperts(8, 32, 16, limit=10.0, key=jax.random.key(0))
        >>> experts.gate_up.shape, experts.down.shape
        ((8, 32, 32), (8, 16, 32))
    """

    gate_up: Float[Array, "experts gate_and_up hidden"]
    down: Float[Array, "experts intermediate hidden"]
    limit: float | None = eqx.field(static=True)

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        limit: float | int | None = None,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:** `num_experts`, then as for `SwiGLU`.

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        experts = positive_integer("num_experts", num_experts)
        hidden = positive_integer("hidden_size", hidden_size)
        intermediate = positive_integer("intermediate_size", intermediate_size)
        dtype = floating_dtype("dtype", dtype)
        gate_up_key, down_key = jax.random.split(key)
        self.gate_up = _uniform(gate_up_key, (experts, 2 * intermediate, hidden), hidden, dtype)
        self.down = _uniform(down_key, (experts, intermediate, hidden), intermediate, dtype)
        self.limit = None if limit is None else positive_number("limit", limit)

    @jax.named_scope("braidax.SwiGLUExperts")
    def __call__(
        self,
        rows: Float[Array, "rows hidden"],
        group_sizes: Int[Array, " experts"],
        grouped_matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """As `AbstractExperts.__call__`. Activations between the products are not
        rounded, but for backends that multiply numbers of one width (`ragged`, `tokamax`).

        **Raises:** `ValueError` at trace time for weights that do not fit together.
        """
        _check_weights(self.gate_up.shape, self.down.shape)
        if self.gate_up.shape[0] != group_sizes.shape[0]:
            raise ValueError(
                f"`gate_up` must hold {group_sizes.shape[0]} experts, as many as `group_sizes`. "
                f"Got {self.gate_up.shape[0]}."
            )
        last_axis("rows", rows, self.gate_up.shape[-1], "hidden")
        return grouped_matmul.feed_forward(
            rows, self.gate_up, self.down, group_sizes, _Activation(self.limit)
        )

"""Elementwise activations: of gate and up, or of up alone. Equal when their numbers are."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import boolean, positive_number

# silu and its slope are exactly 0 from here on down, in every float of 16 to 64 bits. Further down
# the gradient's product of gate and cotangent overflows, and inf * 0 is NaN.
_LOWEST_GATE = -1000.0


class _SwiGLU(eqx.Module):
    """What `swiglu` returns: a module without arrays."""

    limit: float | None = eqx.field(static=True)

    def __call__(
        self, gate: Float[Array, "*batch"], up: Float[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """The activation of `gate` and `up`, both `(*batch,)`."""
        gate, up = _clamped(gate, up, self.limit)
        return jax.nn.silu(gate) * up


def swiglu(limit: float | int | None = None) -> _SwiGLU:
    """`silu(min(gate, limit)) * clip(up, -limit, limit)`, an activation of gate and up.

    `limit` clamps the gate from above and the up projection on both sides; `None` is no clamp.

    **Raises:** `ValueError` or `TypeError` unless `limit` is a positive number or `None`.

    **Source:** arXiv:2002.05202; the clamp is that of DeepSeek-V4 (arXiv:2606.19348), 4.2.3.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> activation = bx.activations.swiglu(limit=2.0)
        >>> round(float(activation(jnp.array(5.0), jnp.array(-3.0))), 4)
        -3.5232
        >>> activation == bx.activations.swiglu(2)
        True
    """
    return _SwiGLU(None if limit is None else positive_number("limit", limit))


class _GeGLU(eqx.Module):
    """What `geglu` returns: a module without arrays."""

    approximate: bool = eqx.field(static=True)

    def __call__(
        self, gate: Float[Array, "*batch"], up: Float[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """The activation of `gate` and `up`, both `(*batch,)`."""
        gate, up = _clamped(gate, up, None)
        # gelu is the identity from far below this limit on, and its cube overflows far above it.
        within = jnp.where(gate > -_LOWEST_GATE, -_LOWEST_GATE, gate)
        gelu = jax.nn.gelu(within, approximate=self.approximate)
        return jnp.where(gate > -_LOWEST_GATE, gate, gelu) * up


def geglu(*, approximate: bool = True) -> _GeGLU:
    """`gelu(gate) * up`, an activation of gate and up.

    `approximate`: whether gelu is computed with tanh, as in Grok-1, or with the error function.

    **Raises:** `TypeError` unless `approximate` is a bool.

    **Source:** arXiv:2002.05202.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> activation = bx.activations.geglu(approximate=False)
        >>> round(float(activation(jnp.array(1.0), jnp.array(2.0))), 4)
        1.6827
    """
    return _GeGLU(boolean("approximate", approximate))


class _GptOss(eqx.Module):
    """What `gpt_oss` returns: a module without arrays."""

    limit: float | None = eqx.field(static=True)
    slope: float = eqx.field(static=True)

    def __call__(
        self, gate: Float[Array, "*batch"], up: Float[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """The activation of `gate` and `up`, both `(*batch,)`."""
        gate, up = _clamped(gate, up, self.limit)
        return gate * jax.nn.sigmoid(self.slope * gate) * (up + 1)


def gpt_oss(limit: float | int | None = 7.0, slope: float | int = 1.702) -> _GptOss:
    """`gate * sigmoid(slope * gate) * (up + 1)`, with gate and up clamped as in `swiglu(limit)`.

    `limit` and `slope` are the numbers in it; a `limit` of `None` is no clamp.

    **Raises:** `ValueError` or `TypeError` unless `limit` and `slope` are positive numbers.

    **Source:** GPT-OSS (arXiv:2508.10925); `GptOssExperts` of transformers, `models/gpt_oss`.

    **Example:**

        >>> import braidax as bx, jax.numpy as jnp
        >>> round(float(bx.activations.gpt_oss()(jnp.array(9.0), jnp.array(-9.0))), 4)
        -41.9997
    """
    limit = None if limit is None else positive_number("limit", limit)
    return _GptOss(limit, positive_number("slope", slope))


class _ReluSquared(eqx.Module):
    """What `relu_squared` returns: a module without arrays."""

    def __call__(self, up: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The activation of `up`, `(*batch,)`."""
        return jnp.square(jax.nn.relu(up))


def relu_squared() -> _ReluSquared:
    """`max(up, 0) ** 2`, an activation of one argument: experts without a gate.

    **Source:** arXiv:2109.08668; Nemotron-H (arXiv:2504.03624).

    **Example:**

        >>> import braidax as bx, jax
        >>> activation = bx.activations.relu_squared()
        >>> experts = bx.Experts(4, 8, 16, activation=activation, key=jax.random.key(0))
        >>> experts.gate_up.shape, activation(jax.numpy.array([-3.0, 3.0])).tolist()
        ((4, 1, 16, 8), [0.0, 9.0])
    """
    return _ReluSquared()


def _clamped(
    gate: Float[Array, "*batch"], up: Float[Array, "*batch"], limit: float | None
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """`gate` at most `limit`, `up` within it on both sides.

    Selects instead of `jnp.minimum` and `jnp.clip`: their derivative exactly at the limit is one
    half, the references' is 1. A gate of -inf gives 0, as the limit of silu and gelu does."""
    gate = jnp.where(gate < _LOWEST_GATE, _LOWEST_GATE, gate)
    if limit is None:
        return gate, up
    up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return jnp.where(gate > limit, limit, gate), up

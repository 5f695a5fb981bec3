"""Activations of experts: elementwise, of gate and up. Equal when their numbers are."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import positive_number

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
        # Selects instead of `jnp.minimum` and `jnp.clip`: their derivative exactly at the limit is
        # one half, the reference's is 1. A gate of -inf gives 0, as the limit of silu does.
        gate = jnp.where(gate < _LOWEST_GATE, _LOWEST_GATE, gate)
        if self.limit is not None:
            gate = jnp.where(gate > self.limit, self.limit, gate)
            up = jnp.where(
                up > self.limit, self.limit, jnp.where(up < -self.limit, -self.limit, up)
            )
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

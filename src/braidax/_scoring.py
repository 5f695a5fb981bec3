"""Logits to scores, scores to weights: exact values and derivatives for every input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_Floats = Float[Array, "*batch"]
# Keeps a row of underflowed scores from becoming 0/0; the released models train with it.
_EPSILON = 1e-20


def _value_and_slope(x: _Floats) -> tuple[_Floats, _Floats]:
    negative = x <= 0  # False for NaN, so that the positive branch hands it on.
    # Selects instead of minimum/maximum, whose derivative at the tie x == 0 is one half.
    below = jnp.where(negative, x, 0)
    above = jnp.where(negative, 0, x)

    # x <= 0: e^(x/2) * sqrt(log1p(t) / t) with t = e^x. e^(x/2) stays a normal number twice as
    # far down as e^x. The ratio rounds to 1 below eps/4; a smaller floor than that would let
    # 1/t^2 overflow in the second derivative.
    root = jnp.exp(0.5 * below)
    t = jnp.maximum(jnp.exp(below), jnp.finfo(x.dtype).eps / 4)
    ratio = jnp.sqrt(jnp.log1p(t) / t)
    value_below = root * ratio
    slope_below = 0.5 * root / ((1 + t) * ratio)

    # x > 0: sqrt(x + log1p(e^-x)). The two divisions stay apart: the derivative of
    # 0.5 / ((1 + u) * f) is 0 * inf at x = inf.
    u = jnp.exp(-above)
    value_above = jnp.sqrt(above + jnp.log1p(u))
    slope_above = (0.5 / (1 + u)) / value_above

    value = jnp.where(negative, value_below, value_above)
    return value, jnp.where(negative, slope_below, slope_above)


@jax.custom_jvp
def _sqrt_softplus(x: _Floats) -> _Floats:
    return _value_and_slope(x)[0]


@_sqrt_softplus.defjvp
def _sqrt_softplus_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    value, slope = _value_and_slope(x)
    return value, slope * tangent


def sqrt_softplus(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`sqrt(log(1 + exp(x)))`, elementwise, the score function of DeepSeek-V4.

    Value and derivatives are accurate for every input `x`, `(*batch,)`, where composing `jnp.sqrt`
    with `jax.nn.softplus` gives a NaN gradient below about -87 in float32. Computed in float32 or
    wider and returned in the shape and dtype of `x`. NaN gives NaN, -inf gives 0, inf gives inf.

    **Source:** DeepSeek-V4 (arXiv:2606.19348), section 2.1.

    **Example:**

        >>> import braidax as bx, jax
        >>> value, slope = jax.value_and_grad(bx.sqrt_softplus)(-100.0)
        >>> f"{value:.4g} {slope:.4g}"
        '1.929e-22 9.644e-23'
    """
    x = jnp.asarray(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _sqrt_softplus(wide).astype(x.dtype)


def normalized(scores: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    """`scores / (sum(scores) + 1e-20)` over the last axis, with finite derivatives of any order.

    Scores must not be negative. Scores that are all 0 give weights 0.
    """
    # The derivative of a plain division squares the denominator, which underflows to a gradient
    # of NaN. One power of two first brings the denominator near 1. The scale is exact, and a
    # constant to differentiation, because the quotient does not depend on it.
    largest = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True)
    _, exponent = jnp.frexp(jnp.maximum(largest, _EPSILON))
    scale = jnp.ldexp(jnp.ones_like(largest), -exponent)
    scaled = scores * scale
    return scaled / (scaled.sum(axis=-1, keepdims=True) + _EPSILON * scale)

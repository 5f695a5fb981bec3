"""Whether a kernel can compute an activation: it must be made of operations on single numbers."""

from typing import Any

import jax
import jax.numpy as jnp

from .network import Activation

# What Pallas Mosaic GPU makes of arrays in registers, by the name that a jaxpr shows.
_OPERATIONS = frozenset(
    """abs add and convert_element_type copysign cos div eq erf exp exp2 ge gt integer_pow le log
    logistic lt max min mul ne neg not or rsqrt select_n sign sin square stop_gradient sub tanh
    """.split()
)
_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call")


def is_elementwise(activation: Activation, num_arguments: int) -> bool:
    """Whether `activation` of float32 numbers is such operations alone, without an array of its
    own."""
    argument = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    jaxpr = jax.make_jaxpr(activation)(*[argument] * num_arguments)
    return not jaxpr.consts and _all_known(jaxpr.jaxpr)


def _all_known(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _CALLS:
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if not _all_known(getattr(inner, "jaxpr", inner)):
                return False
        elif name not in _OPERATIONS:
            return False
    return True

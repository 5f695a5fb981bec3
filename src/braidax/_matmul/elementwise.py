"""Activations inside of a kernel: operations on single numbers that Pallas Mosaic GPU knows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from jaxtyping import Array

from .network import Activation

# By the names that a jaxpr shows. Each was compiled for an H100 with jax 0.10 and 0.12.
_OPERATIONS = frozenset(
    """abs add and broadcast_in_dim clamp convert_element_type cos div eq exp exp2 ge gt integer_pow
    le log logistic lt max min mul ne neg or rsqrt select_n sign sin square sub tanh""".split()
)


def is_elementwise(activation: Activation, num_arguments: int) -> bool:
    """Whether `activation` of float32 numbers consists of such operations alone."""
    tile = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return _is_known(jax.make_jaxpr(activation)(*[tile] * num_arguments), tile.shape)


def inlined(activation: Activation) -> Callable[..., Array]:
    """`activation` without calls of functions: a kernel knows none with rules of derivatives."""

    def compute(*arguments: Array) -> Array:
        return _evaluated(jax.make_jaxpr(activation)(*arguments), arguments)[0]

    return compute


def _called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The function that is called, as by `jax.jit` and `jax.custom_jvp`."""
    inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    return inner if isinstance(inner, ClosedJaxpr) else None


def _is_known(function: ClosedJaxpr, shape: tuple[int, ...]) -> bool:
    return all(
        _is_known(inner, shape) if (inner := _called(equation)) else _is_operation(equation, shape)
        for equation in function.eqns
    )


def _is_operation(equation: JaxprEqn, shape: tuple[int, ...]) -> bool:
    name = equation.primitive.name
    inputs: list[Any] = [variable.aval for variable in equation.invars]
    output: Any = equation.outvars[0].aval
    if name == "convert_element_type":  # of a tile only between floats
        floats = all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (*inputs, output))
        known = floats or output.shape == ()
    elif name == "broadcast_in_dim":
        known = inputs[0].shape == ()
    else:
        known = name != "integer_pow" or equation.params["y"] > 0
    return name in _OPERATIONS and known and output.shape in (shape, ())


def _evaluated(function: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    variables = [*function.jaxpr.constvars, *function.jaxpr.invars]
    values = dict(zip(variables, [*function.consts, *arguments], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in function.eqns:
        inputs = [read(variable) for variable in equation.invars]
        if inner := _called(equation):
            outputs = _evaluated(inner, inputs)
        else:
            outputs = [equation.primitive.bind(*inputs, **equation.params)]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in function.jaxpr.outvars]

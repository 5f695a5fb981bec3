"""A feed-forward network of grouped products, composed of two products.

    before = rows x up^T (+ bias),   output = scale (activation(before) x down (+ bias)),  by group

A scale's derivative is the inner product of the cotangent and the unscaled output. The cotangent
taken back through the second product has the same inner product with the activation. So no output
is kept.

The functions here take the products that they are composed of, and are right for every kernel.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._functions import Function

# `activation(gate, up)`, or of one argument: elementwise, hashable, equal if it computes the same.
Activation = Callable[..., Array]


class FeedForwardWeights(NamedTuple):
    """The weights of one feed-forward network for each group.

    - `up`: `(groups, parts * intermediate, hidden)`; the parts are the activation's arguments.
    - `down`: `(groups, intermediate, hidden)`.
    - `up_bias`, `down_bias`: `(groups, parts * intermediate)` and `(groups, hidden)`, or `None`.
    """

    up: Any
    down: Any
    up_bias: Float[Array, "groups up"] | None = None
    down_bias: Float[Array, "groups hidden"] | None = None


def accumulation_dtype(*arrays: Any) -> jnp.dtype:
    """float32, or the widest of the operands if an operand is wider."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def num_inputs(activation: Activation) -> int:
    """How many arguments `activation` needs: 2 with a gate, 1 without."""
    function = activation.function if isinstance(activation, Function) else activation
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def activate(activation: Activation, before: Float[Array, "*rows up"]) -> Float[Array, "*rows _"]:
    """The activation of pre-activations whose last axis holds all its arguments."""
    return activation(*jnp.split(before, num_inputs(activation), axis=-1))


def forward_saving(
    multiply: Callable[..., Array],
    rows: Float[Array, "rows hidden"],
    scales: Float[Array, " rows"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    activation: Activation,
) -> tuple[Float[Array, "rows hidden"], Float[Array, "rows up"]]:
    """The output and the pre-activations, out of `multiply`."""
    before = multiply(rows, weights.up, group_sizes, transposed=True)
    if weights.up_bias is not None:
        before = before + _biases(multiply, _ones(before), weights.up_bias, group_sizes)
    output = multiply(activate(activation, before), weights.down, group_sizes, transposed=False)
    if weights.down_bias is not None:
        output = output + _biases(multiply, _ones(output), weights.down_bias, group_sizes)
    return clear_nobody(output * scales[:, None].astype(output.dtype), group_sizes), before


def backward(
    multiply: Callable[..., Array],
    outer: Callable[..., Array],
    rows: Float[Array, "rows hidden"],
    scales: Float[Array, " rows"],
    weights: FeedForwardWeights,
    group_sizes: Int[Array, " groups"],
    before: Float[Array, "rows up"],
    cotangent: Float[Array, "rows hidden"],
    activation: Activation,
) -> tuple[Float[Array, "rows hidden"], Float[Array, " rows"], FeedForwardWeights]:
    """The cotangents of rows, scales and weights, from saved pre-activations, in their dtypes."""
    activations, pullback = jax.vjp(lambda before: activate(activation, before), before)
    column = scales[:, None].astype(activations.dtype)
    cotangent = cotangent.astype(jnp.result_type(activations, weights.down))
    inner = multiply(cotangent, weights.down, group_sizes, transposed=True)
    scales_cotangent = (inner * activations).sum(axis=-1)
    if weights.down_bias is not None:
        biases = _biases(multiply, _ones(cotangent), weights.down_bias, group_sizes)
        scales_cotangent = scales_cotangent + (cotangent * biases).sum(axis=-1)
    (inner,) = pullback((inner * column).astype(activations.dtype))
    inner = inner.astype(jnp.result_type(rows, weights.up))
    up, up_bias, down_bias = weights.up, weights.up_bias, weights.down_bias
    return (
        multiply(inner, up, group_sizes, transposed=False, out_dtype=rows.dtype),
        clear_nobody(scales_cotangent[:, None], group_sizes)[:, 0].astype(scales.dtype),
        FeedForwardWeights(
            outer(inner, rows, group_sizes, out_dtype=up.dtype),
            outer(activations * column, cotangent, group_sizes, out_dtype=weights.down.dtype),
            _bias_cotangent(outer, _ones(inner), inner, up_bias, group_sizes),
            _bias_cotangent(outer, column, cotangent, down_bias, group_sizes),
        ),
    )


def clear_nobody(
    rows: Float[Array, "rows size"], group_sizes: Int[Array, " groups"]
) -> Float[Array, "rows size"]:
    """`rows` with those past the groups 0, whatever they held: a select, because 0 * NaN is NaN."""
    owned = jnp.arange(rows.shape[0]) < group_sizes.sum()
    return jnp.where(owned[:, None], rows, 0)


def _biases(
    multiply: Callable[..., Array],
    ones: Float[Array, "rows 1"],
    bias: Float[Array, "groups size"],
    group_sizes: Int[Array, " groups"],
) -> Float[Array, "rows size"]:
    """A bias is a product too, of a column of ones: so every rule of products holds for it."""
    return multiply(ones, bias[:, None, :], group_sizes, transposed=False)


def _bias_cotangent(
    outer: Callable[..., Array],
    column: Float[Array, "rows 1"],
    cotangent: Float[Array, "rows size"],
    bias: Float[Array, "groups size"] | None,
    group_sizes: Int[Array, " groups"],
) -> Float[Array, "groups size"] | None:
    if bias is None:
        return None
    return outer(column, cotangent, group_sizes, out_dtype=bias.dtype)[:, 0, :]


def _ones(rows: Float[Array, "rows size"]) -> Float[Array, "rows 1"]:
    # Made of the rows: inside `jax.shard_map` they have to vary over the mesh as the rows do.
    return jax.lax.full_like(rows, 1, shape=(rows.shape[0], 1))

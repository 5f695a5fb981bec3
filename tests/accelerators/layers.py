"""The layers that are compiled: whole layers, as shapes."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from chips import Program, compiled

import braidax as bx


class Size(NamedTuple):
    """Of a layer with one shared expert, and a batch."""

    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    tokens: int

    @property
    def rows(self) -> int:
        """Assignments."""
        return self.tokens * self.experts_per_token


SIZES = {"small": Size(512, 256, 64, 6, 4096), "V4-Flash": Size(4096, 2048, 256, 6, 4096)}


def make_layer(size: Size, dtype: str, dispatch: bx.AbstractDispatch):
    """A layer whose arrays are shapes."""
    make = functools.partial(
        bx.top_k_moe,
        *(size.hidden, size.intermediate, size.experts, size.experts_per_token),
        num_shared_experts=1,
        dispatch=dispatch,
        dtype=jnp.dtype(dtype),
    )
    return eqx.filter_eval_shape(lambda key: make(key=key), jax.random.key(0))


def is_shape(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def forward(layer):
    """`(function, arrays)` of the layer's output."""
    arrays, static = eqx.partition(layer, is_shape)
    return lambda arrays, tokens: eqx.combine(arrays, static)(tokens)[0], arrays


def forward_and_backward(layer):
    """`(function, arrays)` of the output with the gradients of tokens and all floats."""
    function, arrays = forward(layer)

    def both(arrays, tokens, cotangent):
        floats, rest = eqx.partition(arrays, eqx.is_inexact_array)
        output, transpose = jax.vjp(lambda f, t: function(eqx.combine(f, rest), t), floats, tokens)
        return output, transpose(cotangent)

    return both, arrays


# What a user of the chip gets. No GPU is attached here, so `Auto` has to be told of a Hopper.
DEFAULTS = {
    "h100": bx.matmul.Auto(cuda=bx.matmul.Mosaic()),
    "a100": bx.matmul.Auto(),
    "v5p": bx.matmul.Auto(),
}


@functools.cache
def program(chip: str, size: str, dtype: str, backward: bool, matmul=None) -> Program:
    """The layer compiled for `chip`, with the kernel that is the default there or another."""
    dispatch = bx.SortedDispatch(matmul or DEFAULTS[chip])
    layer = make_layer(SIZES[size], dtype, dispatch)
    tokens = jax.ShapeDtypeStruct((SIZES[size].tokens, SIZES[size].hidden), dtype)
    if backward:
        function, arrays = forward_and_backward(layer)
        return compiled(chip, function, arrays, tokens, tokens)
    function, arrays = forward(layer)
    return compiled(chip, function, arrays, tokens)

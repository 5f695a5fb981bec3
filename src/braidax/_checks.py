"""Argument checks shared by the constructors. Each raises an error that names the argument."""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp


def positive_integer(name: str, value: Any) -> int:
    """`value` as a Python int of at least 1; `TypeError` or `ValueError` otherwise."""
    return integer(name, value, 1)


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as a Python int of at least `minimum` and at most `maximum`; `TypeError` or
    `ValueError` otherwise."""
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer. Got {value!r}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer. Got {value!r}.") from None
    if maximum is not None and not minimum <= number <= maximum:
        raise ValueError(f"`{name}` must be between {minimum} and {maximum}. Got {number}.")
    if number < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}. Got {number}.")
    return number


def positive_number(name: str, value: object) -> float:
    """`value` as a finite Python float above 0; `TypeError` or `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Got {value!r}.")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"`{name}` must be finite and above 0. Got {value!r}.")
    return float(value)


def boolean(name: str, value: object) -> bool:
    """`value`, if it is a bool; `TypeError` otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Got {value!r}.")
    return value


def floating_dtype(name: str, value: object) -> jnp.dtype:
    """`value` as a floating-point dtype that weights can have, JAX's own for `None`; `TypeError`
    or `ValueError` otherwise."""
    dtype = jnp.dtype(value) if value is not None else jnp.result_type(float)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(f"`{name}` must be a floating-point dtype of 16 bits or more. Got {dtype}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"`{name}` must be enabled: {dtype} needs jax_enable_x64.")
    return dtype


def at_least_int32(array: Any) -> Any:
    """Integers to compare with a size, which may not fit their own type where it is narrower."""
    return array.astype(jnp.int32) if jnp.result_type(array).itemsize < 4 else array


def array_dtype(name: str, value: Any) -> jnp.dtype:
    """The dtype that JAX takes `value` for; `TypeError` unless it is an array or a number."""
    if not (hasattr(value, "dtype") or isinstance(value, numbers.Number)):
        raise TypeError(
            f"`{name}` must be an array. Got a {type(value).__name__}: convert it by "
            "`jax.numpy.asarray`."
        )
    return jnp.result_type(value)


def last_axis(name: str, array: Any, size: int, size_name: str) -> None:
    """`array` is floating point and its last axis has `size` entries."""
    dtype, shape = array_dtype(name, array), jnp.shape(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must have a floating-point dtype. Got {dtype}.")
    if len(shape) == 0 or shape[-1] != size:
        raise ValueError(
            f"`{name}` must have shape (*batch, {size_name}={size}). Got {tuple(shape)}."
        )


def same_sizes(name: str, sizes: Any, wanted: Any, meaning: str) -> None:
    """Raise `ValueError` unless `sizes` equals `wanted`; `meaning` describes `wanted` in the
    message."""
    if tuple(sizes) != tuple(wanted):
        raise ValueError(f"`{name}` must have {meaning}, {tuple(wanted)}. Got {tuple(sizes)}.")


def one_line(message: str) -> str:
    """`message`, with what was given in it, escaped and cut to about 600 characters."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return shown if len(shown) <= 600 else shown[:600] + " ..."

"""Argument checks. Each raises `TypeError` or `ValueError`, which names the argument."""

import contextlib
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp

_KINDS = {
    jnp.floating: "a floating-point dtype",
    jnp.integer: "an integer dtype",
    jnp.bool_: "dtype bool",
}


def check(holds: object, name: str, must: str, given: object) -> None:
    """`holds` is true, or a `ValueError` says of the argument `name` what `must` be."""
    if not holds:
        raise ValueError(f"`{name}` must {must}. Got {given}.")


def positive_integer(name: str, value: Any) -> int:
    """`value` as a Python int of at least 1 and below 2**31, as the sizes of arrays are."""
    return integer(name, integer(name, value, 1), 1, 2**31 - 1)


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as a Python int of at least `minimum` and at most `maximum`."""
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer. Got {value!r:.60}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer. Got {value!r:.60}.") from None
    if number < minimum or (maximum is not None and number > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"`{name}` must be {bounds}. Got {number!r:.60}.")
    return number


def experts_per_token(value: Any, num_experts: int) -> int:
    """`value` as a Python int from 1 to `num_experts`."""
    number = integer("num_experts_per_token", value, 1, 2**31 - 1)
    if number > num_experts:
        raise ValueError(
            f"`num_experts_per_token` must be at most num_experts={num_experts}. "
            f"Got {number!r:.60}."
        )
    return number


def positive_number(name: str, value: object) -> float:
    """`value` as a finite Python float above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Got {value!r:.60}.")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be finite and above 0. Got {value!r:.60}.")
    return number


def boolean(name: str, value: object) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Got {value!r:.60}.")
    return value


def floating_dtype(name: str, value: object) -> jnp.dtype:
    """`value` as a floating-point dtype that weights can have, JAX's own for `None`."""
    dtype = jnp.dtype(value) if value is not None else jnp.result_type(float)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(f"`{name}` must be a floating-point dtype of 16 bits or more. Got {dtype}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"`{name}` must be enabled: {dtype} needs jax_enable_x64.")
    return dtype


def at_least_int32(array: Any) -> Any:
    """Integers to compare with a size, which may not fit their own type where it is narrower."""
    return array.astype(jnp.int32) if jnp.result_type(array).itemsize < 4 else array


def array_kind(name: str, value: Any, kind: Any, hint: str = "") -> None:
    """`value` is an array or a number of a `kind` of dtype, a key of `_KINDS`."""
    dtype = None
    if hasattr(value, "dtype") or isinstance(value, numbers.Number):
        with contextlib.suppress(TypeError):  # an array of torch
            dtype = jnp.result_type(value)
    if dtype is None:
        raise TypeError(
            f"`{name}` must be an array. Got a {type(value).__name__}: convert it by "
            "`jax.numpy.asarray` or `jax.numpy.from_dlpack`."
        )
    if not jnp.issubdtype(dtype, kind):
        raise TypeError(f"`{name}` must have {_KINDS[kind]}. Got {dtype}.{hint}")


def last_axis(name: str, array: Any, size: int, size_name: str) -> None:
    """`array` is floating point and its last axis has `size` entries."""
    array_kind(name, array, jnp.floating)
    shape = jnp.shape(array)
    if len(shape) == 0 or shape[-1] != size:
        raise ValueError(
            f"`{name}` must have shape (*batch, {size_name}={size}). Got {tuple(shape)}."
        )


def same_sizes(name: str, sizes: Any, wanted: Any, meaning: str) -> None:
    """`sizes` equals `wanted`, which `meaning` describes in the message."""
    if tuple(sizes) != tuple(wanted):
        raise ValueError(f"`{name}` must have {meaning}, {tuple(wanted)}. Got {tuple(sizes)}.")


def one_line(message: str) -> str:
    """`message`, with what was given in it, escaped and cut to about 600 characters."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return shown if len(shown) <= 600 else shown[:600] + " ..."

"""How rows are dispatched and multiplied, by name. A new backend is one row of this table."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from ._dispatch import AbstractDispatch, dense_dispatch, sorted_dispatch
from ._experts import (
    BLOCKS,
    FEED_FORWARD,
    GroupedMatmul,
    dense_matmul,
    grouped_matmul,
    ragged_matmul,
    require_tokamax,
    tokamax_matmul,
)


class Backend(NamedTuple):
    """A way to lay tokens out as rows, a product for rows in that layout, and what raises
    `ImportError` where an optional dependency of it is missing."""

    dispatch: Callable[..., AbstractDispatch]
    grouped_matmul: GroupedMatmul
    require: Callable[[], object] = lambda: None


BACKENDS: dict[str, Backend] = {
    "blocks": Backend(sorted_dispatch, grouped_matmul(BLOCKS, FEED_FORWARD)),
    "ragged": Backend(sorted_dispatch, ragged_matmul),
    "tokamax": Backend(sorted_dispatch, tokamax_matmul, require_tokamax),
    "dense": Backend(dense_dispatch, dense_matmul),
}

# `ragged_dot` lowers to dense work on a CPU. Elsewhere XLA chooses its kernel; not measured yet.
_AUTO = {"cpu": "blocks"}
_AUTO_ELSEWHERE = "ragged"


def find_backend(name: str) -> Backend:
    """The backend of that name; `"auto"` chooses by the default JAX platform, when traced."""
    if name == "auto":
        name = _AUTO.get(jax.default_backend(), _AUTO_ELSEWHERE)
    return BACKENDS[name]


def check_backend(name: str) -> str:
    """`name`, if it is one that `find_backend` knows.

    **Raises:** `ValueError` for another name, `ImportError` if its package is not installed.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {['auto', *BACKENDS]}. Got {name!r}.")
    if name != "auto":
        BACKENDS[name].require()
    return name


def check_parallel_backend(name: str) -> None:
    """The backend computes any subset of the assignments; `ValueError` otherwise."""
    if name != "auto" and BACKENDS[name].dispatch is not sorted_dispatch:
        raise ValueError(
            "`backend` must be one that sorts its rows to be computed by several devices. "
            f"Got {name!r}."
        )

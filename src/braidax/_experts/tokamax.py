"""Grouped matrix product by the kernels of tokamax, an optional dependency.

Its `ragged_dot_general` chooses a Pallas kernel by device, type and shape, and `jax.lax`'s own
where it has none: on a CPU always. There this is `ragged` under another name.
"""

import importlib
from types import ModuleType

from jaxtyping import Array

from .ragged import by_ragged_dot


def require_tokamax() -> ModuleType:
    """tokamax, imported when it is first asked for: it takes seconds.

    **Raises:** `ImportError` that says how to install it.
    """
    try:
        return importlib.import_module("tokamax")
    except ImportError as error:
        raise ImportError(
            'The backend "tokamax" needs tokamax. Install it with `pip install "braidax[kernels]"`.'
        ) from error


def _ragged_dot_general(*operands, **options) -> Array:
    return require_tokamax().ragged_dot_general(*operands, **options)


tokamax_matmul = by_ragged_dot(_ragged_dot_general)

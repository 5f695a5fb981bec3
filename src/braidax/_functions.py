"""Functions as modules: what an argument of a layer is, so that `eqx.tree_at` replaces it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx


class Function(eqx.Module):
    """A function as a module without arrays, equal to every other of the same function."""

    function: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, *arguments: Any) -> Any:
        """The function of its `arguments`."""
        return self.function(*arguments)


def as_module(name: str, function: Any) -> Any:
    """`function` itself if it is a module, else as a module.

    **Raises:** `TypeError` unless `function` is callable and hashable."""
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"`{name}` must be a function, as `jax.nn.sigmoid`. Got {function!r:.60}.")
    if isinstance(function, eqx.Module):
        return function
    try:
        hash(function)
    except TypeError:
        raise TypeError(f"`{name}` must be hashable. Got {function!r:.60}.") from None
    return Function(function)

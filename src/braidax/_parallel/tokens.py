"""Token arrays on the mesh: one leading axis that divides, and back to the shape they came in."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .context import context_of
from .layout import MeshLayout


class TokenLayout(NamedTuple):
    """How `*batch` becomes something that is split over the token axes of the mesh.

    If the first axis divides, nothing is reshaped. Otherwise all axes are flattened to one and
    padded. `names` are the mesh axes of each batch axis on the way in, on an Explicit mesh.
    """

    layout: MeshLayout
    batch: tuple[int, ...]
    names: tuple

    @property
    def direct(self) -> bool:
        """Whether the first batch axis divides as it is."""
        return (
            bool(self.batch) and 0 < self.batch[0] and not self.batch[0] % self.layout.token_shards
        )

    @property
    def padding(self) -> int:
        """Tokens to add behind the flattened ones; at least one for each part."""
        count, parts = math.prod(self.batch), self.layout.token_shards
        return 0 if self.direct else max(1, -(-count // parts)) * parts - count

    def live(self) -> Bool[Array, " tokens"] | None:
        """`False` on the added tokens; `None` where there are none."""
        if not self.padding:
            return None
        count = math.prod(self.batch)
        live = jnp.arange(count + self.padding) < count
        return self._placed(lambda array: array, live, (self.layout.tokens,))

    def spread(self, array: Array) -> Array:
        """`(*batch, ...)` with one leading axis in equal parts."""

        def flatten(array: Array) -> Array:
            rest = array.shape[len(self.batch) :]
            array = array.reshape(math.prod(self.batch), *rest)
            return jnp.pad(array, ((0, self.padding), *[(0, 0)] * len(rest)))

        flat = flatten if not self.direct else lambda array: array
        return self._placed(flat, array, (self.layout.tokens,))

    def restore(self, array: Array) -> Array:
        """The inverse of `spread`, without the padding and where the batch was on the mesh."""

        def unflatten(array: Array) -> Array:
            return array[: math.prod(self.batch)].reshape(*self.batch, *array.shape[1:])

        return self._placed(unflatten if not self.direct else lambda a: a, array, self.names)

    def _placed(self, function: Callable[[Array], Array], array: Array, names: tuple) -> Array:
        context = context_of(self.layout)
        if not context.explicit:
            return function(array)
        # Here the compiler reshards, as it does everywhere on an Auto mesh.
        return jax.sharding.auto_axes(function, out_sharding=context.sharding(*names))(array)


def token_layout(layout: MeshLayout, hidden_states: Array) -> TokenLayout:
    """The layout of hidden states `(*batch, hidden)`, and where an Explicit mesh has them."""
    batch = hidden_states.shape[:-1]
    sharding = jax.typeof(hidden_states).sharding
    on_mesh = bool(context_of(layout).explicit) and not sharding.mesh.empty
    names = tuple(sharding.spec)[: len(batch)] if on_mesh else ()
    return TokenLayout(layout, batch, (*names, *[None] * (len(batch) - len(names))))

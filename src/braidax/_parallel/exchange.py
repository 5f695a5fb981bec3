"""What an exchange strategy is given, and what every one of them does with ids and slots."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Shard(NamedTuple):
    """One device's part, inside `jax.shard_map`.

    - `axis`, `size`: the mesh axis that holds the experts, and its number of devices.
    - `tokens`: the mesh axes that hold tokens.
    - `num_experts`: experts on this device. Ids are global; `size * num_experts` names nobody.
    - `capacity`: see `ExpertParallel`.
    - `compute(tokens, local_indices, weights)`: `(rows, hidden)`, the weighted sum over this
      device's experts; the local index `num_experts` names nobody.
    """

    axis: str
    size: int
    tokens: tuple[str, ...]
    num_experts: int
    capacity: float | None
    compute: Callable[[Array, Array, Array], Array]

    def local(
        self, indices: Int[Array, "rows experts_per_token"], device: Int[Array, "..."]
    ) -> Int[Array, "rows experts_per_token"]:
        """Global ids as ids on `device`, `num_experts` where they belong to another one."""
        local = indices - device * self.num_experts
        return jnp.where((local >= 0) & (local < self.num_experts), local, self.num_experts)

    def destinations(
        self, indices: Int[Array, "tokens experts_per_token"]
    ) -> Bool[Array, "tokens devices"]:
        """Which devices hold an expert that a token names. One that names nobody goes nowhere."""
        devices = jnp.arange(self.size, dtype=indices.dtype)[None, None]
        return (indices[:, :, None] // self.num_experts == devices).any(axis=1)

    def me(self) -> Int[Array, ""]:
        """This device's place on the expert axis."""
        return jax.lax.axis_index(self.axis)


@runtime_checkable
class Exchange(Protocol):
    """Move tokens to the devices of their experts, compute there, bring the sums back."""

    def __call__(
        self,
        shard: Shard,
        tokens: Float[Array, "tokens hidden"],
        indices: Int[Array, "tokens experts_per_token"],
        weights: Float[Array, "tokens experts_per_token"],
        /,
    ) -> tuple[Float[Array, "tokens hidden"], Int[Array, ""] | None]:
        """The output in float32 or wider, and this device's number of dropped assignments, `None`
        for a strategy that cannot drop."""
        ...

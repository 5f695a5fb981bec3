"""What an exchange of tokens is given, and what it owes; strategies are one file each."""

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sizes(NamedTuple):
    """The numbers that traffic and memory depend on; `item` is bytes per element of tokens.

    `identity` more experts hand a token on. They hold no weights and take no rows, but some of the
    `experts_per_token` are theirs.
    """

    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    tokens: int
    item: int
    identity: int = 0

    def destinations(self, size: int) -> float:
        """Mean number of the `size` devices that hold an expert of a token, if all `n` experts are
        drawn evenly and without repetition: `S (1 - C(n - E/S, k) / C(n, k))`."""
        drawn = self.experts + self.identity
        none = math.comb(drawn - self.experts // size, self.experts_per_token)
        return size * (1 - none / math.comb(drawn, self.experts_per_token))

    def computed(self) -> float:
        """Mean number of experts that compute a token, if experts are drawn evenly."""
        return self.experts_per_token * self.experts / (self.experts + self.identity)


class Shard(NamedTuple):
    """One device's part, inside `jax.shard_map`.

    - `axis`, `size`: the mesh axis that holds the experts, and its number of devices.
    - `num_experts`: experts on this device. Ids are global; `size * num_experts` names nobody.
    - `compute(tokens, local_indices, weights)`: `(rows, hidden)`, the weighted sum over this
      device's experts; the local index `num_experts` names nobody.
    """

    axis: str
    size: int
    num_experts: int
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


class AbstractExchange(eqx.Module):
    """Moves tokens to the devices of their experts, computes there, and brings the sums back."""

    @abc.abstractmethod
    def __call__(
        self,
        shard: Shard,
        tokens: Float[Array, "tokens hidden"],
        indices: Int[Array, "tokens experts_per_token"],
        weights: Float[Array, "tokens experts_per_token"],
        /,
    ) -> tuple[Float[Array, "tokens hidden"], Int[Array, ""] | None]:
        """The output in float32 or wider, and this device's number of dropped assignments, `None`
        for an exchange that cannot drop."""

    @abc.abstractmethod
    def rows_sent(self, sizes: Sizes, size: int) -> float:
        """Rows that leave one of `size` devices for each of its tokens, to other devices."""

    @abc.abstractmethod
    def rows_held(self, sizes: Sizes, size: int) -> tuple[int, int]:
        """Rows that one of `size` devices has to send, and has received, while its experts run."""

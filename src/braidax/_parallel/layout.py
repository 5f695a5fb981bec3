"""Which mesh, and which of its axes hold experts and tokens: what everything here stands on."""

import math

import equinox as eqx
from jax.sharding import AxisType, Mesh


class MeshLayout(eqx.Module):
    """A mesh, the axis that experts are spread over, if any, and those of the tokens."""

    mesh: Mesh = eqx.field(static=True)
    axis: str | None = eqx.field(static=True)
    tokens: tuple[str, ...] = eqx.field(static=True)

    def __check_init__(self):
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"`mesh` must be a jax.sharding.Mesh. Got {type(self.mesh).__name__}.")
        if not isinstance(self.tokens, tuple):
            raise TypeError(f"`tokens` must be a tuple of axis names. Got {self.tokens!r}.")
        wanted = {*self.tokens[:1]} if self.axis is None else {self.axis}
        if not wanted or wanted - {*self.tokens} or len({*self.tokens}) != len(self.tokens):
            raise ValueError(
                "`tokens` must hold `axis`, or an axis where `axis` is None, and no name twice. "
                f"Got {self.tokens} for {self.axis!r}."
            )
        missing = [name for name in self.tokens if name not in self.mesh.axis_names]
        if missing:
            raise ValueError(
                f"`mesh` must hold the axes {self.tokens}. Got {dict(self.mesh.shape)}."
            )
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        types = {types[name] for name in self.tokens}
        if types not in ({AxisType.Auto}, {AxisType.Explicit}):
            raise ValueError(
                f"`mesh` must have the axes {self.tokens} all Auto or all Explicit. "
                f"Got {self.mesh.axis_types}."
            )

    @property
    def size(self) -> int:
        """Devices on the expert axis; 1 without."""
        return 1 if self.axis is None else self.mesh.shape[self.axis]

    @property
    def token_shards(self) -> int:
        """Parts that tokens are split into."""
        return math.prod(self.mesh.shape[name] for name in self.tokens)

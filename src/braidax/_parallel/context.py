"""The mesh as it is seen from where the block is called."""

from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .layout import MeshLayout


class Context(NamedTuple):
    """`taken` are the axes that a surrounding `jax.shard_map` has made Manual."""

    mesh: Mesh | AbstractMesh
    taken: frozenset[str]

    @property
    def free(self) -> frozenset[str]:
        """The axes that are ours to make Manual: all that are not taken, named or not.

        If the compiler handled a weight sharded over such an axis, it would put collectives inside
        the loop over experts. That loop runs a different number of times on each device, so the
        program would deadlock.
        """
        return frozenset(self.mesh.axis_names) - self.taken

    @property
    def explicit(self) -> frozenset[str]:
        """The axes on which JAX asks for the sharding of what it cannot infer."""
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)

    def sharding(self, *names: str | tuple[str, ...] | None) -> NamedSharding:
        """`PartitionSpec(*names)` as far as it is about Explicit axes."""
        entries = []
        for entry in names:
            entry = (entry,) if isinstance(entry, str) else entry or ()
            entry = tuple(name for name in entry if name in self.explicit)
            entries.append(entry[0] if len(entry) == 1 else entry or None)
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    def reshard(self, tree: PyTree, *names: str | None) -> PyTree:
        """Arrays as `shard_map` wants them: on Explicit axes it does not reshard."""
        return jax.sharding.reshard(tree, self.sharding(*names)) if self.explicit else tree


def context_of(layout: MeshLayout) -> Context:
    """Raises `ValueError` inside a `jax.shard_map` over one of the axes that `layout` names, or
    with axes left that are Explicit, from where JAX cannot go back to the compiler's choice."""
    around = jax.sharding.get_abstract_mesh()
    taken = frozenset(around.manual_axes)
    if not taken:
        return Context(layout.mesh, taken)
    if taken & set(layout.tokens) or around.shape != layout.mesh.shape:
        raise ValueError(
            "`tokens` must name axes of the mesh that the surrounding jax.shard_map leaves. "
            f"Got {layout.tokens} where {tuple(around.manual_axes)} are taken."
        )
    context = Context(around, taken)
    if context.explicit:
        raise ValueError(
            "`mesh` must have Auto axes where the block is called inside a jax.shard_map. "
            f"Got {around.axis_types}."
        )
    return context

"""`PackedSwiGLUExperts`: experts that stay as a checkpoint stores them, decoded when used."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from .._experts import AbstractExperts
from .._experts.activations import swiglu
from .._matmul import GroupedMatmul
from .packed_matmul import PackedMatrices, packed_matmul


class PackedSwiGLUExperts(AbstractExperts):
    """`SwiGLUExperts` in 4 or 8 bits with scales: about a quarter or a half of bfloat16's memory.

    Each call decodes the experts that have rows, one after the other, to float32. The weights are
    constants; gradients reach the rows. `gate_up` (2 intermediate, hidden) has the gate's rows
    first and `down` is (hidden, intermediate), both as in a checkpoint.
    """

    gate_up: PackedMatrices
    down: PackedMatrices
    limit: float | None = eqx.field(static=True)

    @jax.named_scope("braidax.PackedSwiGLUExperts")
    def __call__(
        self,
        rows: Float[Array, "rows hidden"],
        group_sizes: Int[Array, " experts"],
        grouped_matmul: GroupedMatmul,
    ) -> Float[Array, "rows hidden"]:
        """As `AbstractExperts.__call__`. `grouped_matmul` is not used: no backend multiplies by
        packed numbers."""
        del grouped_matmul
        gate_up = packed_matmul(rows, self.gate_up, group_sizes)
        activations = swiglu(self.limit)(*__import__("jax").numpy.split(gate_up, 2, -1))
        return packed_matmul(activations, self.down, group_sizes)

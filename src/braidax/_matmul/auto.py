"""The kernel that suits the platform a program is compiled for."""

from functools import partial
from typing import ClassVar

import jax

from .base import AbstractGroupedMatmul
from .blocks import Blocks
from .ragged import Ragged

_BY_PLATFORM = {"tpu": Ragged()}
_ELSEWHERE = Blocks()


class Auto(AbstractGroupedMatmul):
    """The default: `Ragged()` for a TPU, and `Blocks()` for every other platform.

    The choice is made when a program is *lowered*, not when it is traced. A program that is
    exported on a CPU for a TPU carries the TPU's product. `Ragged()` is not chosen for a GPU,
    because XLA makes a dense product of it there.

    **Example:**

        >>> import braidax as bx
        >>> bx.matmul.Auto().chosen("cpu"), bx.matmul.Auto().chosen("tpu")
        (Blocks(), Ragged())
    """

    clears_empty_groups: ClassVar[bool] = True  # whichever kernel is chosen clears its own

    def chosen(self, platform: str | None = None) -> AbstractGroupedMatmul:
        """The kernel for `platform`, as `"cpu"`, `"cuda"` or `"tpu"`; by default JAX's own."""
        return _BY_PLATFORM.get(platform or jax.default_backend(), _ELSEWHERE)

    def multiply(self, rows, weight, group_sizes, **options):
        """As `AbstractGroupedMatmul.multiply`."""
        return _lowered("cleared_multiply", rows, weight, group_sizes, **options)

    def outer(self, left, right, group_sizes, **options):
        """As `AbstractGroupedMatmul.outer`."""
        return _lowered("cleared_outer", left, right, group_sizes, **options)

    def forward(self, rows, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward`."""
        return _lowered("forward", rows, weights, group_sizes, activation=activation)

    def forward_saving(self, rows, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward_saving`."""
        return _lowered("forward_saving", rows, weights, group_sizes, activation=activation)

    def backward(self, rows, weights, group_sizes, before, cotangent, activation):
        """As `AbstractGroupedMatmul.backward`."""
        operands = (rows, weights, group_sizes, before, cotangent)
        return _lowered("backward", *operands, activation=activation)


def _lowered(method: str, *operands, **options):
    """`method` of the kernel that suits the platform, chosen at lowering: JAX then lowers no
    other."""
    branches = {
        platform: partial(getattr(kernel, method), **options)
        for platform, kernel in _BY_PLATFORM.items()
    }
    default = partial(getattr(_ELSEWHERE, method), **options)
    return jax.lax.platform_dependent(*operands, default=default, **branches)

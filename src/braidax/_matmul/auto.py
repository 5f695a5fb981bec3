"""The kernel that suits the platform a program is compiled for."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .base import AbstractGroupedMatmul, check_kernel
from .blocks import Blocks
from .mosaic import OLDEST_JAX, Mosaic, attached_gpu
from .ragged import Ragged

_HOPPER = "9.0"  # the compute capability of H100, H200 and GH200


class Auto(AbstractGroupedMatmul):
    """The default: the kernel that suits the platform that a program is compiled for.

    - `Ragged()` for a TPU.
    - `Mosaic()` for 16-bit weights on an NVIDIA GPU, if the attached GPU is a Hopper.
    - `Blocks()` for everything else. XLA makes a dense product of `Ragged()` on a GPU.

    The platform is known when a program is *lowered*, not when it is traced. A program that is
    exported on a CPU for a TPU carries the TPU's product. The generation of a GPU is only known
    where the GPU is attached. To compile for a GPU that is not there, name its kernel.

    - `cuda`: the kernel for an NVIDIA GPU, instead of the choice by the attached GPU.

    **Example:** a kernel that is chosen, and one that is named for an H100 elsewhere.

        >>> import braidax as bx, jax.numpy as jnp
        >>> bx.matmul.Auto().chosen("cpu"), bx.matmul.Auto().chosen("tpu")
        (Blocks(), Ragged())
        >>> bx.matmul.Auto(cuda=bx.matmul.Mosaic()).chosen("cuda", jnp.bfloat16)
        Mosaic()

    **Raises:** `TypeError` unless `cuda` is a kernel of groups of any size or `None`.
    """

    cuda: AbstractGroupedMatmul | None = None

    clears_empty_groups: ClassVar[bool] = True  # whichever kernel is chosen clears its own

    def __check_init__(self):
        if self.cuda is not None:
            check_kernel("cuda", self.cuda)

    def chosen(
        self, platform: str | None = None, dtype: DTypeLike | None = None
    ) -> AbstractGroupedMatmul:
        """The kernel for `platform`, as `"cpu"`, `"cuda"` or `"tpu"`, and weights of `dtype`.

        By default the platform is JAX's own, and the dtype float32."""
        platform = platform or jax.default_backend()
        if platform == "tpu":
            return Ragged()
        kernel = self._on_cuda() if platform in ("cuda", "gpu") else Blocks()
        refused = isinstance(kernel, Mosaic) and not kernel.reads(dtype or jnp.float32)
        return Blocks() if refused else kernel

    def _on_cuda(self) -> AbstractGroupedMatmul:
        if self.cuda is not None:
            return self.cuda
        hopper = getattr(attached_gpu(), "compute_capability", None) == _HOPPER
        return Mosaic() if hopper and jax.__version_info__ >= OLDEST_JAX else Blocks()

    def multiply(self, rows, weight, group_sizes, **options):
        """As `AbstractGroupedMatmul.multiply`."""
        operands = (rows, weight, group_sizes)
        return self._lowered("cleared_multiply", weight.dtype, *operands, **options)

    def outer(self, left, right, group_sizes, *, out_dtype):
        """As `AbstractGroupedMatmul.outer`."""
        operands = (left, right, group_sizes)
        return self._lowered("cleared_outer", out_dtype, *operands, out_dtype=out_dtype)

    def forward(self, rows, scales, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward`."""
        operands = (rows, scales, weights, group_sizes)
        return self._lowered("forward", weights.up.dtype, *operands, activation=activation)

    def forward_saving(self, rows, scales, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward_saving`."""
        operands = (rows, scales, weights, group_sizes)
        return self._lowered("forward_saving", weights.up.dtype, *operands, activation=activation)

    def backward(self, rows, scales, weights, group_sizes, before, cotangent, activation):
        """As `AbstractGroupedMatmul.backward`."""
        operands = (rows, scales, weights, group_sizes, before, cotangent)
        dtype = weights.up.dtype
        return self._lowered("cleared_backward", dtype, *operands, activation=activation)

    def _lowered(self, method: str, dtype: DTypeLike, *operands, **options):
        """`method` of the kernel for the platform, chosen at lowering: JAX lowers no other."""
        kernels = {platform: self.chosen(platform, dtype) for platform in ("cuda", "tpu")}
        branches = {
            platform: partial(getattr(kernel, method), **options)
            for platform, kernel in kernels.items()
            if kernel != Blocks()  # what is not traced twice
        }
        default = partial(getattr(Blocks(), method), **options)
        return jax.lax.platform_dependent(*operands, default=default, **branches)

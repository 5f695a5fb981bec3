"""Kernels for NVIDIA's Hopper GPUs. Pallas is imported when a kernel is first traced."""

from functools import partial
from types import ModuleType
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from .._checks import positive_integer
from .base import AbstractGroupedMatmul
from .blocks import Blocks
from .elementwise import is_elementwise
from .network import FeedForwardWeights, accumulation_dtype, num_inputs

_UNIT = 64  # every width is a multiple
_NUM_CORES = 132  # of an H200, and of most H100
OLDEST_JAX = (0, 10, 2)  # what came before has another interface of kernels


class Mosaic(AbstractGroupedMatmul):
    """Kernels for NVIDIA's Hopper GPUs, written in Pallas Mosaic GPU.

    Weights are bfloat16 or float16, and rows are rounded to their dtype. Sums are float32. Weight
    gradients are written in the dtype of the weights. The forward pass computes gate, up and
    activation in one kernel, and stores no product of every row with every expert.

    Everything else is right as well, by other means:

    - `Blocks()` computes weights of another dtype, and widths that are no multiple of 64.
    - A bias of the up-projection is added after its product, and the activation is computed then.
    - So is an activation of operations that the kernel does not know, as `log1p`.

    Only Hopper GPUs run the kernels: JAX raises an error on another device. `Auto()` chooses by
    device. The numbers were tested by interpretation on a CPU, and never on a GPU.

    - `num_cores`: of the GPU, by default those of the attached GPU, or 132 without one. The results
        do not depend on the number.

    **Example:** a block whose products run on an H100.

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> dispatch = bx.SortedDispatch(bx.matmul.Mosaic())
        >>> block = bx.top_k_moe(128, 64, 8, 2, dispatch=dispatch, dtype=jnp.bfloat16,
        ...     key=jax.random.key(0))

    **Raises:** `ValueError` or `TypeError` unless `num_cores` is a positive integer or `None`, and
    `ImportError` for jax older than 0.10.2.
    """

    num_cores: int | None = eqx.field(static=True, default=None)

    wide_rows: ClassVar[bool] = False
    clears_empty_groups: ClassVar[bool] = True

    def __check_init__(self):
        if self.num_cores is not None:
            positive_integer("num_cores", self.num_cores)
        if jax.__version_info__ < OLDEST_JAX:
            raise ImportError(f"`Mosaic()` needs jax 0.10.2 or newer. Got {jax.__version__}.")

    @staticmethod
    def reads(dtype: DTypeLike) -> bool:
        """Whether the kernels multiply weights of `dtype`."""
        return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)

    # Jitted: compiled once for each shape, also when a product is called outside of `jax.jit`.

    @partial(jax.jit, static_argnames=("self", "transposed", "out_dtype"))
    def multiply(self, rows, weight, group_sizes, *, transposed, out_dtype):
        """As `AbstractGroupedMatmul.multiply`."""
        if rows.shape[1] == 1 and not transposed:
            return (rows * _of_rows(weight[:, 0], group_sizes, len(rows))).astype(out_dtype)
        options = {"transposed": transposed, "out_dtype": out_dtype}
        if not self._takes(rows, weight, out_dtype, *weight.shape[1:]):
            return Blocks().multiply(rows, weight, group_sizes, **options)
        options["num_cores"] = self._cores()
        return _kernels().multiply(rows, weight, group_sizes, **options)

    @partial(jax.jit, static_argnames=("self", "out_dtype"))
    def outer(self, left, right, group_sizes, *, out_dtype):
        """As `AbstractGroupedMatmul.outer`."""
        size = left.shape[1]
        if size < _UNIT:  # as the ones of which the gradient of a bias is the product
            left = jnp.pad(left, ((0, 0), (0, _UNIT - size)))
        if not self._takes(left, right, out_dtype, left.shape[1], right.shape[1]):
            return Blocks().outer(left[:, :size], right, group_sizes, out_dtype=out_dtype)
        options = {"out_dtype": out_dtype, "num_cores": self._cores()}
        return _kernels().outer(left, right, group_sizes, **options)[:, :size]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def forward(self, rows, scales, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward`."""
        if not self._takes_network(rows, weights):
            return Blocks().forward(rows, scales, weights, group_sizes, activation)
        operands = (rows, scales, weights, group_sizes)
        return self._through(*operands, activation, saving=False)[0]

    @partial(jax.jit, static_argnames=("self", "activation"))
    def forward_saving(self, rows, scales, weights, group_sizes, activation):
        """As `AbstractGroupedMatmul.forward_saving`."""
        if not self._takes_network(rows, weights):
            return Blocks().forward_saving(rows, scales, weights, group_sizes, activation)
        return self._through(rows, scales, weights, group_sizes, activation, saving=True)

    @partial(jax.jit, static_argnames=("self", "activation"))
    def backward(self, rows, scales, weights, group_sizes, before, cotangent, activation):
        """As `AbstractGroupedMatmul.backward`."""
        kernel = super() if self._takes_network(rows, weights) else Blocks()
        return kernel.backward(rows, scales, weights, group_sizes, before, cotangent, activation)

    def _through(
        self, rows, scales, weights: FeedForwardWeights, group_sizes, activation, *, saving
    ):
        """The output, and with `saving` the pre-activations, whose rows of nobody hold anything."""
        parts = num_inputs(activation)
        if weights.up_bias is not None or parts > 2 or not is_elementwise(activation, parts):
            return super().forward_saving(rows, scales, weights, group_sizes, activation)
        options = {"saving": saving, "num_cores": self._cores()}
        rows = rows.astype(weights.up.dtype)
        activations, *before = _kernels().activate(
            rows, weights.up, group_sizes, activation, parts, **options
        )
        output = self.multiply(
            activations, weights.down, group_sizes, transposed=False, out_dtype=jnp.dtype("float32")
        )
        if weights.down_bias is not None:
            output = output + _of_rows(weights.down_bias, group_sizes, len(rows))
        return output * scales[:, None].astype(output.dtype), *before

    def _takes_network(self, rows: Array, weights: FeedForwardWeights) -> bool:
        """Whether both products of the network are the kernels'."""
        widths = (*weights.up.shape[1:], *weights.down.shape[1:])
        dtype = accumulation_dtype(rows, weights.up, weights.down)
        return self._takes(weights.up, weights.down, dtype, *widths) and len(rows) > 0

    def _takes(self, left: Array, right: Array, out_dtype: jnp.dtype, *widths: int) -> bool:
        return (
            self.reads(right.dtype)
            and left.dtype == right.dtype
            and (self.reads(out_dtype) or out_dtype == jnp.float32)
            and len(left) > 0
            and all(width > 0 and width % _UNIT == 0 for width in widths)
        )

    def _cores(self) -> int:
        device = attached_gpu()
        return self.num_cores or getattr(device, "core_count", _NUM_CORES)


def attached_gpu() -> jax.Device | None:
    """The first device of this process, if it is a GPU."""
    device = jax.local_devices()[0]
    return device if device.platform == "gpu" else None


def _of_rows(
    stack: Float[Array, "groups size"], group_sizes: Int[Array, " groups"], num_rows: int
) -> Float[Array, "rows size"]:
    """For each row the entry of its group; for rows of nobody any."""
    groups = jnp.arange(stack.shape[0], dtype=jnp.int32)
    group = jnp.repeat(groups, group_sizes, total_repeat_length=num_rows)
    return stack.at[group].get(mode="promise_in_bounds")


def _kernels() -> ModuleType:
    """The kernels, imported when they are first needed: Pallas takes a second."""
    from . import mosaic_kernels

    return mosaic_kernels

"""Grouped products by `jax.lax.ragged_dot_general`, and by the kernels of tokamax."""

import abc
import importlib
from types import ModuleType
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .base import AbstractGroupedMatmul
from .mosaic import attached_gpu
from .network import accumulation_dtype


class AbstractRagged(AbstractGroupedMatmul):
    """Products by a function with the signature and meaning of `jax.lax.ragged_dot_general`.

    Accelerators multiply numbers of one width, so rows are rounded to the dtype of the weights. To
    widen the whole stack of weights would cost more than the product.
    """

    wide_rows: ClassVar[bool] = False

    @abc.abstractmethod
    def ragged_dot_general(self, *operands, **options) -> Array:
        """As `jax.lax.ragged_dot_general`."""

    def multiply(self, rows, weight, group_sizes, *, transposed, out_dtype):
        """As `AbstractGroupedMatmul.multiply`."""
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        dtype = accumulation_dtype(rows, weight)
        product = self.ragged_dot_general(
            rows, weight, group_sizes, dimensions, preferred_element_type=dtype
        )
        return product.astype(out_dtype)

    def outer(self, left, right, group_sizes, *, out_dtype):
        """As `AbstractGroupedMatmul.outer`."""
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        dtype = accumulation_dtype(left, right)
        product = self.ragged_dot_general(
            left, right, group_sizes, dimensions, preferred_element_type=dtype
        )
        return product.astype(out_dtype)


class Ragged(AbstractRagged):
    """`jax.lax.ragged_dot_general`: native on a TPU, and a *dense* product elsewhere.

    XLA for an NVIDIA GPU or a CPU multiplies every row with the matrices of all groups: a
    DeepSeek-V4-Flash layer of 4,096 tokens needs 60 GB of temporary memory on an H100. A NaN in one
    group's weights reaches every row there.

    **Example:**

        >>> import braidax as bx, jax
        >>> dispatch = bx.SortedDispatch(bx.matmul.Ragged())
        >>> block = bx.top_k_moe(32, 16, 8, 2, dispatch=dispatch, key=jax.random.key(0))
    """

    def ragged_dot_general(self, *operands, **options) -> Array:
        """`jax.lax.ragged_dot_general` itself."""
        return jax.lax.ragged_dot_general(*operands, **options)


class Tokamax(AbstractRagged):
    """The kernels of tokamax, an optional dependency.

    tokamax chooses by the attached device, by dtype and by shape. Where no kernel of its own fits,
    `jax.lax.ragged_dot_general` takes over: on a CPU always, and on a GPU as a *dense* product.

    On a Blackwell GPU products of 16-bit numbers are rounded to 16 bits, because the kernel there
    has no float32 results.

    - `implementation`: the name of one of tokamax's kernels, such as `"mosaic"` or `"triton"`. A
        named kernel that does not fit raises `NotImplementedError`, and nothing takes over.

    **Raises:** `ImportError` at construction if tokamax is not installed.
    """

    implementation: str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _require_tokamax()

    def ragged_dot_general(self, *operands, **options) -> Array:
        """tokamax's function of that name."""
        capability = getattr(attached_gpu(), "compute_capability", "")
        if capability.startswith("10."):
            options["preferred_element_type"] = jnp.result_type(*operands[:2])
        general = _require_tokamax().ragged_dot_general
        return general(*operands, implementation=self.implementation, **options)


def _require_tokamax() -> ModuleType:
    """tokamax, imported when it is first asked for: it takes seconds."""
    try:
        return importlib.import_module("tokamax")
    except ImportError as error:
        raise ImportError(
            '`Tokamax()` needs tokamax. Install it with `pip install "braidax[kernels]"`.'
        ) from error

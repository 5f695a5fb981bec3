"""The parts of a block, counted: exact integers from shapes. No array is read."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._experts.packed import PackedMatrices
from .._matmul import Auto
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .routers import is_array, router_kind, router_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters, the parameters that one token uses (`active`), bytes, and FLOPs per token."""

    parameters: int
    active: int
    num_bytes: int
    forward_flops: int
    backward_flops: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return dataclasses.asdict(self)


def sums(parts: Iterable[Counts]) -> dict[str, int]:
    """The sum of every count."""
    names, parts = [field.name for field in dataclasses.fields(Counts)], list(parts)
    return {name: sum(getattr(part, name) for part in parts) for name in names}


@dataclasses.dataclass(frozen=True)
class PartSummary(Counts):
    """A router, a block's routed experts, a shared expert, or the rest of a model.

    `shapes` holds dtype and shape of each array by its name, `"f32[256,4096]"`. The rest of a model
    has no shapes and 0 FLOPs.
    """

    name: str
    module: str
    shapes: dict[str, str]


@dataclasses.dataclass(frozen=True)
class BlockSummary(Counts):
    """One `RoutedMoE` or `RoutedAndSharedMoE` of a model.

    `path` leads to it from the model's root, which has the empty path. `router` is `"hash"`,
    `"top-k"` or the name of another class. `dispatch` is the name of a class, and `matmul` its
    kernel, with the kernel that `Auto()` chooses on this platform. A stacked block has several
    `layers`, and its counts are their sums.
    """

    path: str
    module: str
    router: str
    dispatch: str
    matmul: str
    layers: int
    num_experts: int
    num_experts_per_token: int
    parts: tuple[PartSummary, ...]


def count_block(path: str, block: RoutedMoE | RoutedAndSharedMoE) -> BlockSummary:
    """The block at `path`."""
    routed = block if isinstance(block, RoutedMoE) else block.routed
    axes, num_experts = router_shape(routed.router)
    chosen, stacked = routed.router.num_experts_per_token, len(axes)
    parts = [
        count_part("router", routed.router, stacked),
        count_part("experts", routed.experts, stacked + 1, (chosen, num_experts)),
    ]
    if routed.latent is not None:
        parts.append(count_part("latent", routed.latent, stacked))
    if isinstance(block, RoutedAndSharedMoE):
        parts.append(count_part("shared", block.shared, stacked))
        if block.shared_gate is not None:
            parts.append(count_part("shared gate", block.shared_gate, stacked))
    return BlockSummary(
        path=path,
        module=type(block).__name__,
        router=router_kind(routed.router),
        dispatch=type(routed.dispatch).__name__,
        matmul=_kernel(routed),
        layers=math.prod(axes),
        num_experts=num_experts,
        num_experts_per_token=chosen,
        parts=tuple(parts),
        **sums(parts),
    )


def _kernel(routed: RoutedMoE) -> str:
    kernel = getattr(routed.dispatch, "matmul", None)
    if isinstance(kernel, Auto):
        leaves = jax.tree.leaves(routed.experts, is_leaf=is_packed)
        dtype = next((leaf.dtype for leaf in leaves if is_array(leaf)), None)
        return f"{kernel}, which is {kernel.chosen(dtype=dtype)} on {jax.default_backend()}"
    return "" if kernel is None else repr(kernel)


def count_part(
    name: str, module: PyTree, leading: int, share: tuple[int, int] = (1, 1)
) -> PartSummary:
    """`leading` axes stand before the axes of a matrix. A token uses `share` of the parameters."""
    used, of = share
    parameters = num_bytes = products = backward = 0
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(module, is_leaf=is_packed):
        if not is_array(leaf):
            continue
        key, packed = jax.tree_util.keystr(path).removeprefix("."), is_packed(leaf)
        # As Equinox prints an array: f32[256,4096].
        number = leaf.number if packed else str(leaf.dtype)
        number = number.replace("float", "f").replace("uint", "u").replace("int", "i")
        shapes[key] = f"{number}[{','.join(map(str, leaf.shape))}]"
        count = math.prod(leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        parameters += count
        num_bytes += sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))
        if len(leaf.shape) >= leading + 2 and not key.endswith("bias"):
            products += count
            # Packed weights are constants: they get no gradient, only the rows do.
            backward += count if packed else 2 * count
    return PartSummary(
        name=name,
        module="Array" if is_array(module) else type(module).__name__,
        shapes=shapes,
        parameters=parameters,
        active=parameters * used // of,
        num_bytes=num_bytes,
        forward_flops=2 * products * used // of,
        backward_flops=2 * backward * used // of,
    )


def is_packed(leaf: Any) -> bool:
    """Whether a leaf is packed matrices, which count as the numbers they hold."""
    return isinstance(leaf, PackedMatrices)

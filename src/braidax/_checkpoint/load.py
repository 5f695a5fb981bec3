"""From tensors, in files or in memory, to a running block."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from .._checks import floating_dtype
from .._config import MoEConfig
from .._experts.packed import PackedMatrices
from .index import AbstractTensors
from .layer import StoredLayer, open_layer
from .leaves import Block, leaves, skeleton
from .names import LayerNames
from .stacks import decoded_stack, packed_stack

PACKED = "packed"


def build_moe(
    tensors: AbstractTensors,
    names: LayerNames,
    config: MoEConfig,
    layer_idx: int,
    dtype: DTypeLike | None,
) -> Block:
    """The layer whose `tensors` are called `names`: see `Checkpoint.moe`."""
    is_packed = isinstance(dtype, str) and dtype == PACKED
    moe = skeleton(config, layer_idx, floating_dtype("dtype", jnp.float32 if is_packed else dtype))
    layer = open_layer(tensors, names, config, layer_idx)
    for name, where in leaves(moe).items():
        if is_packed and name.startswith("experts."):
            array = _packed(layer, name)
        else:
            array = _array(layer, name, where(moe))
        moe = eqx.tree_at(where, moe, array)
    return moe


def _packed(layer: StoredLayer, name: str) -> PackedMatrices:
    if name.endswith("gate_up"):
        return packed_stack(layer.stacks[name], parts=2, transposed=False)
    return packed_stack(layer.stacks[name], parts=None, transposed=True)


def _array(layer: StoredLayer, name: str, like: jax.ShapeDtypeStruct) -> Array:
    """The array called `name`, in the shape and dtype of `like`."""
    if name in layer.stacks:
        transposed = name.endswith("down")
        array = decoded_stack(layer.stacks[name], like.dtype, transposed=transposed)
        return jax.device_put(array.reshape(like.shape))
    array = layer.table() if name == "table" else layer.floats(name, like.dtype)
    # A copy: JAX may share memory, which the owner of a file or of an array may change.
    return jnp.array(array, copy=True)

"""From tensors, in files or in memory, to a running block."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from .._checks import floating_dtype
from .._config import MoEConfig
from .errors import mistake
from .index import StoredTensors
from .layer import check_layer, check_shape, find_stack, read_floats, read_table
from .leaves import Block, leaves, skeleton
from .names import LayerNames
from .stacks import decoded_stack, packed_stack

PACKED = "packed"


def build_moe(
    tensors: StoredTensors,
    names: LayerNames,
    config: MoEConfig,
    layer_idx: int,
    dtype: DTypeLike | None,
) -> Block:
    """The layer whose `tensors` are called `names`: see `Checkpoint.moe`."""
    is_packed = isinstance(dtype, str) and dtype == PACKED
    dtype = floating_dtype("dtype", jnp.float32 if is_packed else dtype)
    moe = skeleton(config, layer_idx, dtype)
    check_layer(tensors, names, config, layer_idx)
    wheres = leaves(moe)
    # All stacks are found before one is read: a wrong shape is an error at once.
    stacks = {
        name: find_stack(tensors, names, name, where(moe).shape)
        for name, where in wheres.items()
        if name.startswith(("experts.", "shared."))
    }
    for name, where in wheres.items():
        like = where(moe)
        if name not in stacks:
            array = _read_router(tensors, names.tensors[name].weight, name, like, config)
            # A copy: JAX may share memory, which the owner of a file or of an array may change.
            array = jnp.array(array, copy=True)
        elif is_packed and name.startswith("experts."):
            parts = 2 if name == "experts.gate_up" else None
            array = packed_stack(stacks[name], parts=parts, transposed=parts is None)
        else:
            array = decoded_stack(stacks[name], like.dtype, transposed=name.endswith("down"))
            array = jax.device_put(array.reshape(like.shape))
        moe = eqx.tree_at(where, moe, array)
    return moe


def _read_router(
    tensors: StoredTensors, name: str, key: str, like: jax.ShapeDtypeStruct, config: MoEConfig
) -> np.ndarray:
    if key == "table":
        check_shape(tensors, name, like.shape)
        return read_table(tensors, name, config.num_experts)
    array = read_floats(tensors, name, like.shape, like.dtype)
    if key == "selection_bias" and not np.isfinite(array).all():
        raise mistake(tensors.where(name), name, "be finite", "NaN or infinity")
    return array

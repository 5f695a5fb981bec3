"""`load_moe`: from a checkpoint's files to a running block."""

import operator
import os

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._checks import floating_dtype
from .._config import MoEConfig
from .._moe import RoutedAndSharedMoE
from .decode_layer import decode_matrices
from .errors import mistake
from .index import Checkpoint
from .layer import StoredLayer, check_tensor, open_layer
from .packed_layer import packed_experts
from .state_dict import layer_skeleton

PACKED = "packed"


def load_moe(
    path: str | os.PathLike[str],
    layer_idx: int,
    *,
    config: MoEConfig | None = None,
    dtype: DTypeLike = jnp.float32,
) -> RoutedAndSharedMoE:
    """The mixture-of-experts layer `layer_idx` of a released or saved checkpoint.

    DeepSeek-V3, V4 and V4.1 are read in the spellings of their releases and of transformers,
    experts one by one or stacked, in floating point, FP8 or packed FP4. What a tensor is, its
    dtype and geometry say, never the configuration.

    **Arguments:**

    - `path`: a folder, an index (`*.safetensors.index.json`) or a `.safetensors` file.
    - `layer_idx`: from 0.
    - `config`: the sizes and rules of the model; by default the `config.json` beside the files.
    - `dtype`: of the weights, which are decoded expert by expert into their final arrays; or
        `"packed"`: the experts stay as stored, FP4 or FP8, and are decoded when they are used,
        while the other weights are float32. The selection bias is float32 always, the table int32.

    **Raises:** `FileNotFoundError` if there is no checkpoint or no configuration; `ValueError`
    naming file, tensor, what was expected and what was found, for anything missing, truncated,
    out of range or of another size than the configuration says; `TypeError` for a `dtype` that
    cannot hold weights.

    **Warns:** for a tensor that the layer does not compute with: a bias for image tokens, a bias
    beside a table.

    **Source:** the `model.safetensors` and `inference/model.py` of each release; transformers'
    `models/deepseek_v4`.

    **Example:** `save_moe` writes such a file.

        >>> import braidax as bx, jax, tempfile
        >>> config = bx.MoEConfig.tiny()
        >>> layer = bx.RoutedAndSharedMoE.from_config(config, 2, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bx.save_moe(f"{folder}/layer.safetensors", layer, 2)
        ...     loaded = bx.load_moe(f"{folder}/layer.safetensors", 2, config=config)
        >>> bool((loaded.routed.experts.down == layer.routed.experts.down).all())
        True
    """
    checkpoint = Checkpoint(path)
    if config is None:
        config = MoEConfig.from_hf(checkpoint.folder)
    keep_packed = isinstance(dtype, str) and dtype == PACKED
    dtype = floating_dtype("dtype", jnp.float32 if keep_packed else dtype)
    moe = layer_skeleton(config, layer_idx, dtype)
    layer = open_layer(checkpoint, operator.index(layer_idx))
    _check_sizes(config, layer)
    kind = _check_router(config, layer_idx, layer)

    weight = jax.device_put(layer.gate_weight(dtype))
    moe = eqx.tree_at(lambda moe: moe.routed.router.gate.weight, moe, weight)
    if kind == "table":
        moe = eqx.tree_at(lambda moe: moe.routed.router.table, moe, jax.device_put(layer.table()))
    else:
        bias = jax.device_put(layer.bias())
        moe = eqx.tree_at(lambda moe: moe.routed.router.score_correction_bias, moe, bias)
    gate_up, down = decode_matrices((layer.shared,), dtype)
    gate_up = gate_up.reshape(1, 2, -1, gate_up.shape[-1])
    moe = eqx.tree_at(lambda moe: (moe.shared.gate_up, moe.shared.down), moe, (gate_up[0], down[0]))
    if keep_packed:
        packed = packed_experts(layer, config.swiglu_limit)
        return eqx.tree_at(lambda moe: moe.routed.experts, moe, packed)
    gate_up, down = decode_matrices(layer.experts, dtype)
    arrays = (gate_up.reshape(len(down), 2, -1, gate_up.shape[-1]), down)
    return eqx.tree_at(
        lambda moe: (moe.routed.experts.gate_up, moe.routed.experts.down), moe, arrays
    )


def _check_sizes(config: MoEConfig, layer: StoredLayer) -> None:
    checkpoint, gate = layer.checkpoint, layer.names.gate["weight"]
    check_tensor(checkpoint, gate, (config.num_experts, config.hidden_size))
    shared_size = config.num_shared_experts * config.intermediate_size
    down = layer.experts[0].down
    for matrix, size in ((down, config.intermediate_size), (layer.shared.down, shared_size)):
        if matrix.shape[-1] != size:
            must = f"have the configuration's intermediate size, {size}, for its last axis"
            raise mistake(matrix.path, matrix.names.weight, must, f"shape {matrix.shape}")


def _check_router(config: MoEConfig, layer_idx: int, layer: StoredLayer) -> str:
    """`"table"` or `"bias"`, on which the file and the configuration must agree."""
    checkpoint, found = layer.checkpoint, layer.names.gate
    is_hash = config.is_hash_layer(layer_idx)
    kind = "table" if is_hash else "bias"
    if kind not in found or (not is_hash and "table" in found):
        must = (
            f"have a {'hash table' if is_hash else 'selection bias and no hash table'}, as the "
            f"configuration has {config.num_hash_layers} hash layers"
        )
        names = ", ".join(sorted(found.values()))
        raise mistake(checkpoint.where(found["weight"]), f"{layer.names.prefix}gate", must, names)
    if is_hash:
        check_tensor(checkpoint, found["table"], (config.vocab_size, config.num_experts_per_token))
    return kind

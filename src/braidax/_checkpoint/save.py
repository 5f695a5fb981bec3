"""`save_moe`: a block as the tensors of a released checkpoint."""

import os
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from .._checks import integer
from .._experts import Experts
from .._moe import RoutedAndSharedMoE
from .._router import HashRouter, TopKRouter
from .dequantise import FP4_GROUP
from .dtypes import FLOAT4, SCALE
from .packed_experts import PackedSwiGLUExperts
from .quantise import FP8_BLOCK, encode_fp4, encode_fp8
from .safetensors_writer import Lazy, write_safetensors
from .state_dict import check_parts
from .stored_matrix import grid

QUANTISATIONS = (None, "fp8", "fp4")


def save_moe(
    path: str | os.PathLike[str],
    moe: RoutedAndSharedMoE,
    layer_idx: int,
    *,
    quantisation: str | None = None,
) -> None:
    """Write a layer to a `.safetensors` file, in the names of DeepSeek-V4's releases.

    `load_moe` gives the same block back, bit for bit where nothing is quantised here; so does
    transformers, where the file is a shard of a model of sizes in whole blocks. Floating-point
    weights keep their dtype, packed experts stay as they are. One expert is in memory at a time.

    **Arguments:**

    - `path`: the file, which is replaced. A folder of such files, one for each layer, is a
        checkpoint to `load_moe`.
    - `moe`: the layer, of this library's routers and experts.
    - `layer_idx`: from 0; part of the names.
    - `quantisation`: `None`; `"fp4"`, which stores the experts as DeepSeek-V4 does, FP4 in groups
        of 32 and the shared expert FP8 in 128x128; or `"fp8"`, which stores both as FP8. The
        router is never quantised.

    **Raises:** `TypeError` for another kind of layer; `ValueError` for a file name that does not
    end in `.safetensors`, stacked layers, or numbers that a quantisation cannot hold.

    **Source:** the released `model.safetensors.index.json` of DeepSeek-V4, and its
    `inference/kernel.py` for FP4 and FP8.

    **Example:**

        >>> import braidax as bx, jax, pathlib, tempfile
        >>> layer = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bx.save_moe(f"{folder}/layer.safetensors", layer, layer_idx=2)
        ...     [path.name for path in pathlib.Path(folder).iterdir()]
        ['layer.safetensors']
    """
    layer_idx = integer("layer_idx", layer_idx, 0)
    if not os.fspath(path).endswith(".safetensors"):
        raise ValueError(f"`path` must end in .safetensors. Got {os.fspath(path)!r}.")
    if quantisation not in QUANTISATIONS:
        raise ValueError(f"`quantisation` must be one of {QUANTISATIONS}. Got {quantisation!r}.")
    _check_layer(moe, quantisation)
    prefix = f"layers.{layer_idx}.ffn."
    router, experts, shared = moe.routed.router, moe.routed.experts, moe.shared
    tensors: dict[str, np.ndarray | Lazy] = {f"{prefix}gate.weight": np.asarray(router.gate.weight)}
    if isinstance(router, HashRouter):
        tensors[f"{prefix}gate.tid2eid"] = np.asarray(router.table, np.int64)
    elif isinstance(router, TopKRouter):
        tensors[f"{prefix}gate.bias"] = np.asarray(router.score_correction_bias, np.float32)
    stored_shared = None if quantisation is None else "fp8"
    stem = f"{prefix}shared_experts"
    tensors |= _three(
        stem,
        np.asarray(shared.gate_up).reshape(-1, shared.gate_up.shape[-1]),
        np.asarray(shared.down),
        stored_shared,
    )
    if isinstance(experts, PackedSwiGLUExperts):
        tensors |= _packed(f"{prefix}experts", experts)
    elif isinstance(experts, Experts):
        gate_up, down = (
            np.asarray(experts.gate_up).reshape(len(experts.down), -1, experts.gate_up.shape[-1]),
            np.asarray(experts.down),
        )
        for expert in range(len(down)):
            stem = f"{prefix}experts.{expert}"
            tensors |= _three(stem, gate_up[expert], down[expert], quantisation)
    write_safetensors(path, tensors, metadata={"format": "pt"})


def _check_layer(moe: RoutedAndSharedMoE, quantisation: str | None) -> None:
    check_parts(moe, Experts, PackedSwiGLUExperts)
    if quantisation is not None and isinstance(moe.routed.experts, PackedSwiGLUExperts):
        raise ValueError(
            "`quantisation` must be None for packed experts, which are quantised already. "
            f"Got {quantisation!r}."
        )
    bias = getattr(moe.routed.router, "score_correction_bias", None)
    if bias is not None and not np.isfinite(np.asarray(bias)).all():
        raise ValueError("`moe` must have a finite selection bias. Got NaN or infinity.")
    if moe.routed.router.gate.weight.ndim != 2:
        shape = moe.routed.router.gate.weight.shape
        raise ValueError(
            f"`moe` must be one layer, with a router of (experts, hidden). Got {shape}."
        )


def _three(
    stem: str, gate_up: np.ndarray, down: np.ndarray, quantisation: str | None
) -> dict[str, np.ndarray | Lazy]:
    """The three matrices of one feed-forward network, (size_out, size_in) each."""
    gate, up = np.split(gate_up, 2)
    tensors = {}
    for name, matrix in (("w1", gate), ("w3", up), ("w2", down.T)):
        tensors |= _ENCODERS[quantisation](f"{stem}.{name}", matrix)
    return tensors


def _plain(stem: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{stem}.weight": matrix}


def _quantised(
    dtype: str,
    block: tuple[int, int],
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    stem: str,
    matrix: np.ndarray,
) -> dict[str, Lazy]:
    size_out, size_in = matrix.shape
    if dtype == "I8":
        if size_in % FP4_GROUP:
            raise ValueError(
                f"`moe` must have sizes in whole groups of {FP4_GROUP} for FP4. "
                f"Got {stem}, {matrix.shape}."
            )
        size_in //= 2

    def encoded(which: int) -> np.ndarray:
        try:
            return encode(matrix)[which]
        except ValueError as error:
            raise ValueError(f"{stem}: {error}") from error

    return {
        f"{stem}.weight": Lazy(dtype, (size_out, size_in), partial(encoded, 0)),
        f"{stem}.scale": Lazy("F8_E8M0", grid(matrix.shape, block), partial(encoded, 1)),
    }


_ENCODERS: dict[str | None, Callable[[str, np.ndarray], Mapping[str, np.ndarray | Lazy]]] = {
    None: _plain,
    "fp8": partial(_quantised, "F8_E4M3", FP8_BLOCK, encode_fp8),
    "fp4": partial(_quantised, "I8", (1, FP4_GROUP), encode_fp4),
}


def _packed(stem: str, experts: PackedSwiGLUExperts) -> dict[str, np.ndarray]:
    tensors = {}
    intermediate = experts.down.size_in
    halves = (("w1", slice(0, intermediate)), ("w3", slice(intermediate, None)))
    for matrices, parts in ((experts.gate_up, halves), (experts.down, (("w2", slice(None)),))):
        payload, scale = np.asarray(matrices.payload), np.asarray(matrices.scale)
        scale = scale.view(SCALE if scale.dtype == np.uint8 else np.float32)
        # FP4 has no dtype of its own in the releases: I8, two numbers a byte.
        number = np.dtype(matrices.number)
        payload = payload.view(np.int8 if number == FLOAT4 else number)
        for name, rows in parts:
            for expert in range(len(payload)):
                own = {
                    "weight": payload[expert, rows],
                    "scale": scale[expert, rows][:: matrices.block[0]],
                }
                tensors |= {f"{stem}.{expert}.{name}.{end}": own[end] for end in own}
    return tensors

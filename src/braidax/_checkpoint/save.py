"""`save_moe`: a block as the tensors of a released checkpoint."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from .._checks import integer
from .._experts.packed import PackedMatrices
from .._families import DEEPSEEK
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .dequantize import FP4_GROUP
from .dtypes import FLOAT4, SCALE
from .leaves import MATRICES, leaves, to_tensors
from .quantize import FP8_BLOCK, encode_fp4, encode_fp8
from .safetensors_writer import Lazy, write_safetensors
from .stored_matrix import grid

_QUANTIZATIONS = (None, "fp8", "fp4")


def save_moe(
    path: str | os.PathLike[str],
    moe: RoutedMoE | RoutedAndSharedMoE,
    layer_idx: int,
    *,
    quantization: str | None = None,
) -> None:
    """Write a layer to a `.safetensors` file, in the names of DeepSeek-V4's releases.

    `load_moe` gives the same block back, bit for bit if nothing is quantized here. So does
    transformers, if the file is a shard of a model whose sizes are whole blocks. Floating-point
    weights keep their dtype, packed experts stay as they are. One expert is in memory at a time.

    **Arguments:**

    - `path`: the file, which is replaced. A folder of such files, one for each layer, is a
        checkpoint to `load_moe`.
    - `moe`: the layer, of this library's routers and experts.
    - `layer_idx`: from 0; part of the names.
    - `quantization`: `None`, `"fp4"` or `"fp8"`. `"fp4"` stores the experts as DeepSeek-V4 does,
        FP4 in groups of 32, and the shared expert FP8 in 128x128. `"fp8"` stores both as FP8. The
        router is never quantized.

    **Raises:** `TypeError` for another kind of layer. `ValueError` for a file name that does not
    end in `.safetensors`, stacked layers, or numbers that a quantization cannot hold.

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
    if quantization not in _QUANTIZATIONS:
        raise ValueError(f"`quantization` must be one of {_QUANTIZATIONS}. Got {quantization!r}.")
    arrays = {name: where(moe) for name, where in leaves(moe).items()}
    _check_arrays(arrays, quantization)
    tensors: dict[str, np.ndarray | Lazy] = {}
    for name, array in arrays.items():
        encoding = quantization if name.startswith("experts.") else quantization and "fp8"
        for key, matrix in _released(name, array):
            spelled = DEEPSEEK.released_prefix(layer_idx) + DEEPSEEK.released(key)
            is_router = not key.startswith(("experts.", "shared."))
            tensors |= _encoded(spelled, matrix, None if is_router else encoding)
    write_safetensors(path, tensors, metadata={"format": "pt"})


def _check_arrays(arrays: Mapping[str, Any], quantization: str | None) -> None:
    if quantization is not None and isinstance(arrays["experts.down"], PackedMatrices):
        raise ValueError(
            "`quantization` must be None for packed experts, which are quantized already. "
            f"Got {quantization!r}."
        )
    if not np.isfinite(np.asarray(arrays.get("selection_bias", 0.0))).all():
        raise ValueError("`moe` must have a finite selection bias. Got NaN or infinity.")
    shape = arrays["gate.weight"].shape
    if len(shape) != 2:
        raise ValueError(
            f"`moe` must be one layer, with a router of (experts, hidden). Got {shape}."
        )


def _released(name: str, array: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of an array, experts one by one; of packed ones, the weight and its scales."""
    if isinstance(array, PackedMatrices):
        payload, scale = np.asarray(array.payload), np.asarray(array.scale)
        scale = scale.view(SCALE if scale.dtype == np.uint8 else np.float32)
        # FP4 has no dtype of its own in the releases: I8, two numbers a byte.
        number = np.dtype(array.number)
        payload = payload.view(np.int8 if number == FLOAT4 else number)
        scales = _one_by_one(name, scale)
        for (key, weight), (_, rows) in zip(_one_by_one(name, payload), scales, strict=True):
            yield key, (weight, rows[:: array.block[0]])
        return
    for key, tensor in to_tensors(name, np.asarray(array)).items():
        if key == "selection_bias":
            tensor = tensor.astype(np.float32)
        yield from _one_by_one(key, tensor) if key.startswith("experts.") else ((key, tensor),)


def _one_by_one(name: str, stack: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    matrices = MATRICES[name.removeprefix("experts.")]
    for expert, rows in enumerate(stack):
        for matrix, part in zip(matrices, np.split(rows, len(matrices)), strict=True):
            yield f"experts.{expert}.{matrix}", part


def _encoded(
    name: str, matrix: np.ndarray | tuple[np.ndarray, np.ndarray], quantization: str | None
) -> dict[str, np.ndarray | Lazy]:
    """The tensors of a matrix, (size_out, size_in), that is called `name`."""
    stem = name.removesuffix(".weight")
    scale_name = stem + DEEPSEEK.scale_endings[0]
    if isinstance(matrix, tuple):
        return dict(zip((name, scale_name), matrix, strict=True))
    if quantization is None:
        return {name: matrix}
    size_out, size_in = matrix.shape
    if quantization == "fp4":
        if size_in % FP4_GROUP:
            raise ValueError(
                f"`moe` must have sizes in whole groups of {FP4_GROUP} for FP4. "
                f"Got {stem}, {matrix.shape}."
            )
        dtype, block, encode, size_in = "I8", (1, FP4_GROUP), encode_fp4, size_in // 2
    else:
        dtype, block, encode = "F8_E4M3", FP8_BLOCK, encode_fp8

    def encoded(which: int) -> np.ndarray:
        try:
            return encode(matrix)[which]
        except ValueError as error:
            raise ValueError(f"{stem}: {error}") from error

    return {
        name: Lazy(dtype, (size_out, size_in), partial(encoded, 0)),
        scale_name: Lazy("F8_E8M0", grid(matrix.shape, block), partial(encoded, 1)),
    }

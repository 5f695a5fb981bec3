"""`save_moe`: a block as the tensors of a released checkpoint."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from .._checks import check, integer
from .._experts.packed import PackedMatrices
from .._families import Family, family_of
from .._families.family import STACKED_EXPERTS
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .dtypes import FLOAT4, SCALE
from .leaves import leaves, to_tensors
from .quantization import FP4_GROUP, FP8_BLOCK, encode_fp4, encode_fp8
from .safetensors_writer import Lazy, write_safetensors
from .stored_matrix import grid

_QUANTIZATIONS = (None, "fp8", "fp4")


def save_moe(
    path: str | os.PathLike[str],
    moe: RoutedMoE | RoutedAndSharedMoE,
    layer_idx: int,
    *,
    quantization: str | None = None,
    model_type: str = "deepseek_v4",
) -> None:
    """Write a layer to a `.safetensors` file, in the names of a family's releases.

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
        router is never quantized. Only layers of DeepSeek-V4 can be quantized.
    - `model_type`: of the family.

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
    layer_idx, family = integer("layer_idx", layer_idx, 0), family_of(model_type)
    arrays = {name: where(moe) for name, where in leaves(moe, family).items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    _check(os.fspath(path), arrays, quantization, family)
    prefix = family.released_prefix(layer_idx)
    tensors: dict[str, np.ndarray | Lazy] = {}
    for name, array in arrays.items():
        owner = name.split(".")[0]
        encoding = {"experts": quantization, "shared": quantization and "fp8"}.get(owner)
        for key, matrix, scale in _one_by_one(family, name, array):
            spelled = prefix + family.released(key)
            if scale is None and encoding is not None:
                matrix, scale = _encoded(spelled.removesuffix(".weight"), matrix, encoding)
            tensors[spelled] = matrix
            if scale is not None:
                tensors[family.scales_of(spelled)[0]] = scale
    write_safetensors(path, tensors)


def _check(path: str, arrays: Mapping[str, Any], quantization: str | None, family: Family) -> None:
    """Everything that a writer of `arrays` can refuse before it writes."""
    is_packed = isinstance(arrays["experts.down"], PackedMatrices)
    bias, gate = arrays.get("selection_bias", 0.0), arrays["gate.weight"]
    is_stacked = not family.parts("experts.down")
    check(path.endswith(".safetensors"), "path", "end in .safetensors", repr(path))
    known = quantization in _QUANTIZATIONS
    check(known, "quantization", f"be one of {_QUANTIZATIONS}", repr(quantization))
    if quantization is not None:
        must = "be None for packed experts, which are quantized already"
        check(not is_packed, "quantization", must, repr(quantization))
        must = f"be None for a {family.model_type}"
        check(family.writes_quantized, "quantization", must, repr(quantization))
    must = f"not be packed, to be written as {family.model_type}"
    check(not (is_packed and is_stacked), "moe", must, "packed experts")
    must = "have a finite selection bias"
    check(np.isfinite(np.asarray(bias)).all(), "moe", must, "NaN or infinity")
    check(gate.ndim == 2, "moe", "be one layer, with a router of (experts, hidden)", gate.shape)


def _one_by_one(
    family: Family, name: str, array: Any
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """The tensors of an array by the library's names, experts one by one, and their scales."""
    if not isinstance(array, PackedMatrices):
        for key, tensor in to_tensors(family, name, np.asarray(array)).items():
            if key == "selection_bias":
                tensor = tensor.astype(np.float32)
            for part, matrix in _matrices(family, key, tensor):
                yield part, matrix, None
        return
    payload, scale = np.asarray(array.payload), np.asarray(array.scale)
    scale = scale.view(SCALE if scale.dtype == np.uint8 else np.float32)
    # FP4 has no dtype of its own in the releases: I8, two numbers a byte.
    number = np.dtype(array.number)
    weights = _matrices(family, name, payload.view(np.int8 if number == FLOAT4 else number))
    for (part, weight), (_, rows) in zip(weights, _matrices(family, name, scale), strict=True):
        yield part, weight, rows[:: array.block[0]]


def _matrices(family: Family, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices of a stack if the family stores them one by one, and anything else as it is."""
    parts = family.parts(name) if name in STACKED_EXPERTS else ()
    if not parts:
        yield name, array
        return
    for expert, rows in enumerate(array):
        for part, matrix in zip(parts, np.split(rows, len(parts)), strict=True):
            yield part.replace("{}", str(expert)), matrix


def _encoded(name: str, matrix: np.ndarray, quantization: str) -> tuple[Lazy, Lazy]:
    """A matrix (size_out, size_in) and its scales, `name` for messages."""
    size_out, size_in = matrix.shape
    if quantization == "fp4":
        dtype, block, encode, size = "I8", (1, FP4_GROUP), encode_fp4, size_in // 2
    else:
        dtype, block, encode, size = "F8_E4M3", FP8_BLOCK, encode_fp8, size_in

    def encoded(which: int) -> np.ndarray:
        try:
            return encode(matrix)[which]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return (
        Lazy(dtype, (size_out, size), partial(encoded, 0)),
        Lazy("F8_E8M0", grid(matrix.shape, block), partial(encoded, 1)),
    )

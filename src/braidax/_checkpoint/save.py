"""`save_moe`: a block as the tensors of a released checkpoint."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from .._checks import check, integer
from .._experts.packed import PackedMatrices
from .._families import Family, family_of
from .._families.family import STACKED_EXPERTS
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .dtypes import FLOAT4, SCALE
from .leaves import MATRICES, leaves, to_rows, to_tensors
from .quantization import FP4_GROUP, FP8_BLOCK, encode_fp4, encode_fp8
from .safetensors_writer import Lazy, write_safetensors
from .stored_matrix import grid

# The tensors of an array by the release's names, without what stands before a layer's own.
_Tensors = Iterator[tuple[str, np.ndarray | Lazy]]


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
    weights keep their dtype, packed experts stay as they are. One expert is encoded at a time.

    **Arguments:**

    - `path`: the file, which is replaced. A folder of such files, one for each layer, is a
        checkpoint to `load_moe`.
    - `moe`: the layer, of this library's routers and experts.
    - `layer_idx`: from 0; part of the names.
    - `quantization`: `None`, `"fp4"` or `"fp8"`, as the release of the family has it. `"fp4"`
        stores the experts in FP4, in groups of 32: those of DeepSeek-V4, with the shared expert FP8
        in 128x128, and those of GPT-OSS, whose word is MXFP4. `"fp8"` stores the experts and the
        shared expert of DeepSeek-V4 as FP8. Routers and biases are never quantized.
    - `model_type`: of the family.

    **Raises:** `TypeError` for another kind of layer. `ValueError` for a file name that does not
    end in `.safetensors`, stacked layers, or numbers that a quantization cannot hold.

    **Source:** the released `model.safetensors.index.json` of DeepSeek-V4 and of GPT-OSS. For FP4
    and FP8, `inference/kernel.py` of the first, and `integrations/mxfp4.py` of transformers.

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
        owner = name.split(".")[0] if name in MATRICES else ""
        encoding = {"experts": quantization, "shared": quantization and "fp8"}.get(owner)
        make = _packed if isinstance(array, PackedMatrices) else _plain
        if encoding is not None:
            make = partial(_encoded if family.parts(name) else _encoded_stack, encoding, prefix)
        tensors |= {prefix + own: tensor for own, tensor in make(family, name, array)}
    write_safetensors(path, tensors)


def _check(path: str, arrays: Mapping[str, Any], quantization: str | None, family: Family) -> None:
    """Everything that a writer of `arrays` can refuse before it writes."""
    is_packed = isinstance(arrays["experts.down"], PackedMatrices)
    bias, gate = arrays.get("selection_bias", 0.0), arrays["gate.weight"]
    check(path.endswith(".safetensors"), "path", "end in .safetensors", repr(path))
    known = (None, *family.quantizations)
    must = f"be one of {known} for a {family.model_type}"
    check(quantization in known, "quantization", must, repr(quantization))
    if is_packed:
        must = "be None for packed experts, which are quantized already"
        check(quantization is None, "quantization", must, repr(quantization))
        number = arrays["experts.down"].number
        as_stack = np.dtype(number) == FLOAT4 and "fp4" in family.quantizations
        must = f"not be packed, to be written as {family.model_type}"
        check(family.parts("experts.down") or as_stack, "moe", must, f"experts in {number}")
    must = "have a finite selection bias"
    check(np.isfinite(np.asarray(bias)).all(), "moe", must, "NaN or infinity")
    check(gate.ndim == 2, "moe", "be one layer, with a router of (experts, hidden)", gate.shape)


def _plain(family: Family, name: str, array: Any) -> Iterator[tuple[str, np.ndarray]]:
    """As they are, in floating point or integers."""
    for key, tensor in to_tensors(family, name, np.asarray(array)).items():
        if key == "selection_bias":
            tensor = tensor.astype(np.float32)
        for part, matrix in _matrices(family, key, tensor):
            yield family.released(part), matrix


def _packed(family: Family, name: str, array: PackedMatrices) -> _Tensors:
    """As they are, in 4 or 8 bits with scales."""

    def rows(stored: Any) -> np.ndarray:
        stored = np.asarray(stored)
        if array.parts is not None:
            stored = stored.reshape(len(stored), array.parts, -1, stored.shape[-1])
        return to_rows(family, name, np.swapaxes(stored, -1, -2) if array.transposed else stored)

    payload, scale = rows(array.payload), rows(array.scale)
    exponents = SCALE if family.parts(name) else np.dtype(np.uint8)
    scale = scale.view(exponents if scale.dtype == np.uint8 else np.float32)
    if not family.parts(name):
        yield from _stack(family, name, payload.reshape(*scale.shape, -1), scale)
        return
    # FP4 has no dtype of its own in the releases: I8, two numbers a byte.
    number = np.dtype(array.number)
    weights = _matrices(family, name, payload.view(np.int8 if number == FLOAT4 else number))
    for (part, weight), (_, scales) in zip(weights, _matrices(family, name, scale), strict=True):
        yield family.released(part), weight
        yield family.scales_of(family.released(part))[0], scales[:: array.block[0]]


def _matrices(family: Family, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices of a stack if the family stores them one by one, and anything else as it is."""
    parts = family.parts(name) if name in STACKED_EXPERTS else ()
    if not parts:
        yield name, array
        return
    for expert, rows in enumerate(array):
        for part, matrix in zip(parts, np.split(rows, len(parts)), strict=True):
            yield part.replace("{}", str(expert)), matrix


def _encoded(quantization: str, prefix: str, family: Family, name: str, array: Any) -> _Tensors:
    """Quantized matrix by matrix; with `prefix` for messages."""
    for own, matrix in _plain(family, name, array):
        size_out, size_in = matrix.shape
        if quantization == "fp4":
            dtype, block, encode, size = "I8", (1, FP4_GROUP), encode_fp4, size_in // 2
        else:
            dtype, block, encode, size = "F8_E4M3", FP8_BLOCK, encode_fp8, size_in
        scales = grid(matrix.shape, block)
        encoded = partial(_encode, prefix + own.removesuffix(".weight"), encode, matrix)
        yield own, Lazy(dtype, (size_out, size), partial(encoded, 0))
        yield family.scales_of(own)[0], Lazy("F8_E8M0", scales, partial(encoded, 1))


def _encoded_stack(
    quantization: str, prefix: str, family: Family, name: str, array: Any
) -> _Tensors:
    """Quantized as one stack, of which `_check` let FP4 pass alone."""
    assert quantization == "fp4"
    array = np.asarray(array)
    shape = (len(array), *grid(to_rows(family, name, array[0]).shape, (1, FP4_GROUP)))

    def encoded(which: int) -> np.ndarray:
        rows = (to_rows(family, name, matrices) for matrices in array)
        spelled = prefix + family.released(name)
        return np.stack([_encode(spelled, encode_fp4, matrix, which) for matrix in rows])

    blocks = Lazy("U8", (*shape, FP4_GROUP // 2), partial(encoded, 0))
    yield from _stack(family, name, blocks, Lazy("U8", shape, partial(encoded, 1)))


def _stack(
    family: Family, name: str, blocks: np.ndarray | Lazy, scales: np.ndarray | Lazy
) -> _Tensors:
    """A stack in 4 bits, the groups on an axis of their own."""
    spelled = family.released_blocks(name)
    yield spelled, blocks
    yield family.scales_of(spelled)[0], scales


def _encode(
    name: str, encode: Callable[[np.ndarray], tuple], matrix: np.ndarray, which: int
) -> np.ndarray:
    try:
        return encode(matrix)[which]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

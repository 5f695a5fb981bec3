"""A writer of safetensors files that holds one tensor at a time.

**Source:** the format description of huggingface/safetensors.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from .._atomic_file import replacing
from .dtypes import DTYPES, NAMES, PACKED, size_in_bits, stored_bytes
from .safetensors_reader import mistake

_ORDER = {name: position for position, name in enumerate(DTYPES)}


class Lazy(NamedTuple):
    """A tensor that is made when its turn to be written comes.

    `dtype` is the name in the file and `shape` counts elements. `make` returns an array of that
    many bytes: of that dtype and shape, or any view of its bytes (4-bit numbers already packed).
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray | Lazy]
) -> None:
    """Write named arrays to `path`, replacing the file only once all is written.

    Wide elements come first, so every tensor is aligned; float4_e2m1fn is packed two a byte.
    """
    path = pathlib.Path(path)
    lazy = {name: _lazy(path, name, tensor) for name, tensor in tensors.items()}
    ordered = sorted(lazy.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
    # The format of tensors that transformers asks for.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        size = _num_bytes(tensor)
        offsets = [position, position + size]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            data, size = stored_bytes(tensor.make()), _num_bytes(tensor)
            if data.nbytes != size:
                must = f"be made of {size} bytes, {tensor.dtype} {list(tensor.shape)}"
                raise mistake(path, name, must, f"{data.nbytes} bytes")
            file.write(data.data)


def _lazy(path: pathlib.Path, name: str, tensor: np.ndarray | Lazy) -> Lazy:
    if not isinstance(tensor, Lazy):
        array = np.asarray(tensor)
        if array.dtype not in NAMES:
            raise mistake(path, name, f"have a dtype among {', '.join(DTYPES)}", array.dtype)
        tensor = Lazy(NAMES[array.dtype], array.shape, lambda: array)
    if tensor.dtype == PACKED and (not tensor.shape or tensor.shape[-1] % 2):
        raise mistake(path, name, "have an even last axis", f"shape {tensor.shape}")
    return tensor


def _num_bytes(tensor: Lazy) -> int:
    return math.prod(tensor.shape) * size_in_bits(tensor.dtype) // 8

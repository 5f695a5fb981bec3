"""A lazy reader of safetensors files.

The header is read and validated at once, the tensors are memory-mapped one at a time when asked
for. The `safetensors` package cannot hand FP8, FP4 or E8M0 to numpy.

**Source:** the format description of huggingface/safetensors.
"""

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from .._checks import one_line
from .dtypes import DTYPES, FLOAT4, PACKED, size_in_bits, stored_bytes

# Bytes. The reference implementation allows three times as many, which as JSON can take more than
# a gigabyte; the index of the largest release, of 96,085 tensors, has 7 MB.
LARGEST_HEADER = 32 * 2**20
_MOST_AXES = 32
_LARGEST_SIZE = 2**63 - 1


def mistake(path: str | os.PathLike[str], name: str, must: str, got: object) -> ValueError:
    """The error to raise: which file, which tensor or part of it, what was expected and found."""
    return ValueError(one_line(f"{os.fspath(path)}: `{name}` must {must}. Got {got}."))


class StoredTensor(NamedTuple):
    """A tensor in a file, from byte `start` to `stop`, or in memory, where it is the `array`.

    `dtype` is the file's name of the type. `shape` counts numbers.
    """

    path: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    array: np.ndarray | None = None

    def raw(self) -> np.ndarray:
        """The bytes as stored: uint8, one axis; of a file read-only and memory-mapped."""
        if self.array is not None:
            return stored_bytes(self.array)
        if self.stop == self.start:
            return np.empty(0, np.uint8)
        # One map for each tensor: dropping the array gives its pages back.
        shape = (self.stop - self.start,)
        return np.memmap(self.path, np.uint8, "r", self.start, shape).view(np.ndarray)

    def read(self) -> np.ndarray:
        """The tensor in its own dtype and shape. 4-bit numbers are copied, to one byte each.

        **Raises:** `ValueError` if the dtype is unknown."""
        if self.dtype not in DTYPES:
            raise self.mistake(f"have a dtype among {', '.join(DTYPES)}", self.dtype)
        data = self.raw()
        if self.dtype == PACKED:
            data = np.stack((data & 15, data >> 4), axis=-1).view(FLOAT4)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    def mistake(self, must: str, got: object) -> ValueError:
        """The error to raise about this tensor."""
        return mistake(self.path, self.name, must, got)


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    **Raises:** `FileNotFoundError` without such a file; `ValueError` naming file, tensor, what was
    expected and found, for a header that is truncated, malformed or contradictory: tensors that
    overlap, leave gaps, reach past the end or have another size than their shape."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file at {path}.")
    size = path.stat().st_size
    if size < 8:
        raise mistake(path, "header", "begin with 8 bytes of length", f"a file of {size} bytes")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        longest = min(size - 8, LARGEST_HEADER)
        if length > longest:
            raise mistake(path, "header", f"have at most {longest} bytes", length)
        header = parsed_json(path, "header", file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(m, str) for m in metadata.values()):
        raise mistake(path, "__metadata__", "map strings to strings", metadata)
    tensors = {
        name: _checked(path, name, value, 8 + length, size - 8 - length)
        for name, value in header.items()
    }
    # Every byte of data belongs to exactly one tensor.
    stop = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != stop:
            word = "overlap another tensor" if tensor.start < stop else "leave a gap before it"
            must = f"start where the one before it stops, at byte {stop}, and not {word}"
            raise tensor.mistake(must, tensor.start)
        stop = tensor.stop
    if stop != size:
        raise mistake(path, "data", f"end with the last tensor, at byte {stop}", size)
    return tensors


def parsed_json(path: pathlib.Path, name: str, text: bytes) -> dict[str, Any]:
    """The object that `text`, the part `name` of a file, holds."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise mistake(path, name, "be JSON with unique keys", error) from error
    if not isinstance(content, dict):
        raise mistake(path, name, "be a JSON object", type(content).__name__)
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json.loads` would keep the last of several equal keys and say nothing."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} is repeated")
        result[name] = value
    return result


def _checked(
    path: pathlib.Path, name: str, value: Any, data_start: int, data_size: int
) -> StoredTensor:
    """The tensor that an entry of the header describes."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        well_formed = (
            len(value) == 3
            and isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MOST_AXES
            and all(type(n) is int and 0 <= n <= _LARGEST_SIZE for n in (*shape, start, stop))
            # Axes of size 0 do not excuse the others: numpy refuses them too.
            and math.prod(size or 1 for size in shape) <= _LARGEST_SIZE
        )
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        must = (
            f"have a dtype, a shape of at most {_MOST_AXES} axes and two data_offsets, all sizes"
            " and their product from 0 to 2**63 - 1"
        )
        raise mistake(path, name, must, value)
    if not start <= stop <= data_size:
        must = f"lie within the {data_size} bytes of data"
        raise mistake(path, name, must, f"{start} to {stop}")
    count = math.prod(shape)
    # A dtype we do not know is refused when it is read: the others in the file are still good.
    if dtype in DTYPES and count * size_in_bits(dtype) != 8 * (stop - start):
        must = f"have the {count} elements of {dtype} that its shape {shape} says"
        raise mistake(path, name, must, f"{stop - start} bytes")
    if dtype == PACKED and (not shape or shape[-1] % 2):
        raise mistake(path, name, "have an even last axis, two numbers a byte", f"shape {shape}")
    return StoredTensor(path, name, dtype, tuple(shape), data_start + start, data_start + stop)

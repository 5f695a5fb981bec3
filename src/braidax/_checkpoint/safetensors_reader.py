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

from .dtypes import DTYPES, FLOAT4, PACKED, size_in_bits
from .errors import mistake

# Bytes. The reference implementation allows three times as many, which as JSON can take more than
# a gigabyte; the index of the largest release, of 96,085 tensors, has 7 MB.
LARGEST_HEADER = 32 * 2**20
_MOST_AXES = 32
_LARGEST_SIZE = 2**63 - 1


class Entry(NamedTuple):
    """What a header says about a tensor; `start` and `stop` are bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file whose header has been checked.

    `entries` holds an `Entry` for each tensor, `metadata` the file's own notes.
    """

    path: pathlib.Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike[str]):
        """**Raises:** `FileNotFoundError` without such a file; `ValueError` naming file, tensor,
        what was expected and found, for a header that is truncated, malformed or contradictory:
        tensors that overlap, leave gaps, reach past the end or have another size than their
        shape."""
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file at {self.path}.")
        header, data_start, data_size = _read_header(self.path)
        self.metadata = _checked_metadata(self.path, header.pop("__metadata__", {}))
        self.entries = {
            name: _entry(self.path, name, value, data_start, data_size)
            for name, value in header.items()
        }
        _check_coverage(self.path, self.entries, data_start, data_start + data_size)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as stored: uint8, one axis, read-only, memory-mapped.

        **Raises:** `ValueError` if there is no such tensor."""
        entry = self.entry(name)
        if entry.stop == entry.start:
            return np.empty(0, np.uint8)
        shape = (entry.stop - entry.start,)
        # One map for each tensor: dropping the array gives its pages back.
        return np.memmap(self.path, np.uint8, "r", entry.start, shape).view(np.ndarray)

    def read(self, name: str) -> np.ndarray:
        """A tensor in its own dtype and shape: read-only and memory-mapped, except that 4-bit
        numbers are copied, to one byte each.

        **Raises:** `ValueError` if there is no such tensor or its dtype is unknown."""
        entry = self.entry(name)
        if entry.dtype not in DTYPES:
            raise mistake(self.path, name, f"have a dtype among {', '.join(DTYPES)}", entry.dtype)
        data = self.raw(name)
        if entry.dtype == PACKED:
            codes = np.stack((data & 15, data >> 4), axis=-1)
            return codes.view(FLOAT4).reshape(entry.shape)
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def entry(self, name: str) -> Entry:
        """What the header says about a tensor. **Raises:** `ValueError` if it is not there."""
        if name not in self.entries:
            raise mistake(self.path, name, "be in the file", f"{len(self.entries)} other tensors")
        return self.entries[name]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which would keep the last of several equal keys and say nothing."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} is repeated")
        result[name] = value
    return result


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The header as JSON, where the data start, and how many bytes of them there are."""
    size = path.stat().st_size
    if size < 8:
        raise mistake(path, "header", "begin with 8 bytes of length", f"a file of {size} bytes")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        longest = min(size - 8, LARGEST_HEADER)
        if length > longest:
            raise mistake(path, "header", f"have at most {longest} bytes", length)
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise mistake(path, "header", "be JSON with unique keys", error) from error
    if not isinstance(header, dict):
        raise mistake(path, "header", "be a JSON object", type(header).__name__)
    return header, 8 + length, size - 8 - length


def _checked_metadata(path: pathlib.Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise mistake(path, "__metadata__", "map strings to strings", value)
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


def _entry(path: pathlib.Path, name: str, value: Any, data_start: int, data_size: int) -> Entry:
    must = (
        f"have a dtype, a shape of at most {_MOST_AXES} axes and two data_offsets, all sizes and"
        " their product from 0 to 2**63 - 1"
    )
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        well_formed = isinstance(dtype, str) and isinstance(shape, list) and len(value) == 3
        well_formed = well_formed and len(shape) <= _MOST_AXES
        well_formed = well_formed and all(map(_is_size, (*shape, start, stop)))
        # Axes of size 0 do not excuse the others: numpy refuses them too.
        well_formed = well_formed and math.prod(size or 1 for size in shape) <= _LARGEST_SIZE
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise mistake(path, name, must, value)
    if not start <= stop <= data_size:
        found = f"{start} to {stop}"
        raise mistake(path, name, f"lie within the {data_size} bytes of data", found)
    count = math.prod(shape)
    # A dtype we do not know is refused when it is read: the others in the file are still good.
    if dtype in DTYPES and count * size_in_bits(dtype) != 8 * (stop - start):
        must = f"have the {count} elements of {dtype} that its shape {shape} says"
        raise mistake(path, name, must, f"{stop - start} bytes")
    if dtype == PACKED and (not shape or shape[-1] % 2):
        raise mistake(path, name, "have an even last axis, two numbers a byte", f"shape {shape}")
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _check_coverage(path: pathlib.Path, entries: dict[str, Entry], start: int, stop: int) -> None:
    """Every byte of data belongs to exactly one tensor."""
    by_position = sorted(entries.items(), key=lambda item: item[1][2:])
    for name, entry in by_position:
        if entry.start != start:
            word = "overlap another tensor" if entry.start < start else "leave a gap before it"
            must = f"start where the one before it stops, at byte {start}, and not {word}"
            raise mistake(path, name, must, entry.start)
        start = entry.stop
    if start != stop:
        raise mistake(path, "data", f"end with the last tensor, at byte {start}", stop)

"""What a checkpoint holds, as records that print as a table."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from .._text import size_text, text_table

_HEAD = ("layer", "router", "experts", "a token", "stored as", "bytes", "parameters", "active")


class TableStatistics(NamedTuple):
    """How a hash table spreads its token ids.

    An expert has from `fewest` to `most` ids, and `unused` experts have none. `repeated` rows name
    an expert twice.
    """

    vocab_size: int
    fewest: int
    most: int
    unused: int
    repeated: int


class LayerSummary(NamedTuple):
    """The feed-forward part of one layer.

    `router` is `"hash"`, `"top-k"`, `"dense"`, or `"?"` if the router has no known name.
    `num_bytes` counts by dtype what is stored, scales included; 4-bit weights are `"FP4"`, whatever
    dtype holds them. `active` counts the parameters that one token uses, None if the experts per
    token are not known.
    """

    name: str
    router: str
    num_experts: int
    num_experts_per_token: int | None
    num_bytes: dict[str, int]
    parameters: int
    active: int | None
    table: TableStatistics | None

    def row(self) -> tuple[str, ...]:
        """The columns of the table."""
        return (
            self.name,
            self.router,
            _number(self.num_experts or None, "-"),
            _number(self.num_experts_per_token, "-" if self.router == "dense" else "?"),
            " + ".join(self.num_bytes),
            size_text(sum(self.num_bytes.values())),
            f"{self.parameters:,}",
            _number(self.active),
        )


class CheckpointSummary(NamedTuple):
    """A checkpoint, or the one layer of it that was asked for.

    Parameters are floating-point numbers and quantized ones; neither scales nor hash tables.
    `active` leaves layers of multi-token prediction out. `note` says what could not be found out,
    and why.
    """

    path: pathlib.Path
    num_files: int
    num_tensors: int
    num_bytes: dict[str, int]
    parameters: int
    active: int | None
    layers: tuple[LayerSummary, ...]
    note: str | None

    def __repr__(self) -> str:
        """A table of the layers, what hash tables look like, and the totals."""
        lines = [str(self.path), ""]
        if self.layers:
            lines += [*text_table([_HEAD, *(layer.row() for layer in self.layers)]), ""]
        tables = [(layer.name, layer.table) for layer in self.layers if layer.table is not None]
        lines += [
            f"{name}: hash table of {table.vocab_size:,} token ids, {table.fewest:,} to"
            f" {table.most:,} an expert, {table.unused:,} experts unused,"
            f" {table.repeated:,} rows name one twice"
            for name, table in tables
        ]
        lines += [""] if tables else []
        lines += [
            f"{self.num_tensors:,} tensors in {self.num_files:,} files,"
            f" {size_text(sum(self.num_bytes.values()))}: {_kinds(self.num_bytes)}",
            f"{self.parameters:,} parameters, {_number(self.active)} active for a token",
        ]
        return "\n".join(lines if self.note is None else [*lines, f"note: {self.note}"])


def _kinds(num_bytes: Mapping[str, int]) -> str:
    return ", ".join(f"{dtype} {size_text(count)}" for dtype, count in num_bytes.items())


def _number(value: int | None, unknown: str = "?") -> str:
    return unknown if value is None else f"{value:,}"

"""A `Summary` as lines of text."""

from collections.abc import Mapping, Sequence

from .summary import LayerSummary, Summary

_HEAD = ("layer", "router", "experts", "a token", "stored as", "bytes", "parameters", "active")
_LEFT = 2  # columns of names; the others are numbers or lists


def format_summary(summary: Summary) -> str:
    """A table of the layers, what hash tables look like, and the totals; no line end at last."""
    lines = [str(summary.path), ""]
    if summary.layers:
        lines += [*_table([_HEAD, *map(_row, summary.layers)]), ""]
    lines += [line for layer in summary.layers for line in _hash_table(layer)]
    if lines[-1]:
        lines.append("")
    lines += [
        f"{summary.num_tensors:,} tensors in {summary.num_files:,} files,"
        f" {_size(sum(summary.num_bytes.values()))}: {_kinds(summary.num_bytes)}",
        f"{summary.parameters:,} parameters, {_number(summary.active)} active for a token",
    ]
    if summary.note is not None:
        lines.append(f"note: {summary.note}")
    return "\n".join(lines)


def _row(layer: LayerSummary) -> tuple[str, ...]:
    return (
        layer.name,
        layer.router,
        _number(layer.num_experts or None, "-"),
        _number(layer.num_experts_per_token, "-" if layer.router == "dense" else "?"),
        " + ".join(layer.num_bytes),
        _size(sum(layer.num_bytes.values())),
        f"{layer.parameters:,}",
        _number(layer.active),
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(_cell, range(len(row)), row, widths)).rstrip() for row in rows]


def _cell(column: int, text: str, width: int) -> str:
    return text.ljust(width) if column < _LEFT else text.rjust(width)


def _hash_table(layer: LayerSummary) -> list[str]:
    if layer.table is None:
        return []
    table = layer.table
    return [
        f"{layer.name}: hash table of {table.vocab_size:,} token ids, {table.fewest:,} to"
        f" {table.most:,} an expert, {table.unused:,} experts unused,"
        f" {table.repeated:,} rows name one twice"
    ]


def _kinds(num_bytes: Mapping[str, int]) -> str:
    return ", ".join(f"{dtype} {_size(count)}" for dtype, count in num_bytes.items())


def _number(value: int | None, unknown: str = "?") -> str:
    return unknown if value is None else f"{value:,}"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"

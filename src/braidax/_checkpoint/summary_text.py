"""A `Summary` as lines of text."""

from collections.abc import Mapping

from .._text import size_text, text_table
from .summary import LayerSummary, Summary

_HEAD = ("layer", "router", "experts", "a token", "stored as", "bytes", "parameters", "active")


def format_summary(summary: Summary) -> str:
    """A table of the layers, what hash tables look like, and the totals; no line end at last."""
    lines = [str(summary.path), ""]
    if summary.layers:
        lines += [*text_table([_HEAD, *map(_row, summary.layers)]), ""]
    lines += [line for layer in summary.layers for line in _hash_table(layer)]
    if lines[-1]:
        lines.append("")
    lines += [
        f"{summary.num_tensors:,} tensors in {summary.num_files:,} files,"
        f" {size_text(sum(summary.num_bytes.values()))}: {_kinds(summary.num_bytes)}",
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
        size_text(sum(layer.num_bytes.values())),
        f"{layer.parameters:,}",
        _number(layer.active),
    )


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
    return ", ".join(f"{dtype} {size_text(count)}" for dtype, count in num_bytes.items())


def _number(value: int | None, unknown: str = "?") -> str:
    return unknown if value is None else f"{value:,}"

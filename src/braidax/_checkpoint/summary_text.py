"""A `Summary` as lines of text."""

from collections.abc import Mapping, Sequence

from .summary import LayerSummary, Summary

_HEAD = ("layer", "router", "experts", "a token", "stored as", "bytes", "parameters", "active")
_LEFT = 2  # columns of names; the others are numbers or lists


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


def text_table(rows: Sequence[Sequence[str]], left: int = _LEFT) -> list[str]:
    """Rows as lines, the first `left` columns of names set left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths, left) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    sized = enumerate(zip(row, widths, strict=True))
    cells = (text.ljust(to) if column < left else text.rjust(to) for column, (text, to) in sized)
    return "  ".join(cells).rstrip()


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


def size_text(num_bytes: int) -> str:
    """Bytes in the decimal unit that suits: `1.50 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"

"""A `Summary` as lines of text and as HTML."""

from collections.abc import Sequence

from .._checkpoint.summary_text import size_text, text_table
from .html import html_table
from .summary_count import BlockSummary, PartSummary

_HEAD = ("module", "arrays", "parameters", "active", "bytes", "forward", "backward")
_LEFT = 2  # columns of names; the others are numbers
_NOTE = "active: parameters that one token uses; forward, backward: FLOPs per token"


def summary_text(
    blocks: Sequence[BlockSummary], other: PartSummary | None, total: PartSummary
) -> str:
    """A table of blocks and parts, the totals, and what the columns mean."""
    return "\n".join([*text_table([_HEAD, *_rows(blocks, other, total)], _LEFT), "", _NOTE])


def summary_html(
    blocks: Sequence[BlockSummary], other: PartSummary | None, total: PartSummary
) -> str:
    """The same as a table that takes its colours from the page."""
    return html_table(_HEAD, _rows(blocks, other, total), left=_LEFT, note=_NOTE)


def _rows(
    blocks: Sequence[BlockSummary], other: PartSummary | None, total: PartSummary
) -> list[tuple[str, ...]]:
    rows = []
    for block in blocks:
        rows.append((_title(block), _router(block), *_numbers(block)))
        for part in block.parts:
            rows.append((f"  {part.name}: {part.module}", _arrays(part), *_numbers(part)))
    if other is not None:
        rows.append((other.name, "", *_numbers(other)[:3], "-", "-"))
    if len(blocks) != 1 or other is not None:
        rows.append((total.name, "", *_numbers(total)))
    return rows


def _title(block: BlockSummary) -> str:
    return f"{block.path}: {block.module}" if block.path else block.module


def _router(block: BlockSummary) -> str:
    stacked = f", {block.layers} layers" if block.layers > 1 else ""
    chosen = f"{block.num_experts_per_token} of {block.num_experts} experts"
    return f"{block.router}, {chosen}{stacked}"


def _arrays(part: PartSummary) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in part.shapes.items())


def _numbers(counted: BlockSummary | PartSummary) -> tuple[str, ...]:
    return (
        f"{counted.parameters:,}",
        f"{counted.active:,}",
        size_text(counted.num_bytes),
        _flops(counted.forward_flops),
        _flops(counted.backward_flops),
    )


def _flops(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)

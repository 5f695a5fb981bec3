"""Columns of text, and sizes."""

from collections.abc import Sequence

_LEFT = 2  # columns of names; the others are numbers or lists


def text_table(rows: Sequence[Sequence[str]], left: int = _LEFT) -> list[str]:
    """Rows as lines, the first `left` columns of names set left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths, left) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    sized = enumerate(zip(row, widths, strict=True))
    cells = (text.ljust(to) if column < left else text.rjust(to) for column, (text, to) in sized)
    return "  ".join(cells).rstrip()


def size_text(num_bytes: int) -> str:
    """Bytes in the decimal unit that suits: `1.50 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"

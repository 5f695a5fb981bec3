"""Text for people: tables, byte counts and counted nouns."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Rows as lines. The first `left` columns are set left, all further columns right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths, left) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    sized = enumerate(zip(row, widths, strict=True))
    cells = (text.ljust(to) if column < left else text.rjust(to) for column, (text, to) in sized)
    return "  ".join(cells).rstrip()


def size_text(num_bytes: int) -> str:
    """Bytes in a decimal unit that suits the number: `1.50 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def counted(number: int, noun: str, plural: str = "s") -> str:
    """The number with its noun: `1 batch`, `2,000 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"

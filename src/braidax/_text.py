"""Text for people: tables, scaled numbers and counted nouns."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Rows as lines. The first `left` columns are set left, all further columns right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths)]
    return ["  ".join(cells).format(*row).rstrip() for row in rows]


def size_text(number: int, unit: str = "B", digits: int = 2) -> str:
    """The number with a decimal prefix that suits it: `1.50 MB`."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{digits}f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def counted(number: int, noun: str, plural: str = "s") -> str:
    """The number with its noun: `1 batch`, `2,000 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"

"""Pages of lines and tables: text for a terminal, HTML for a notebook.

The HTML takes colors and fonts from the page around it. All text in it is escaped.
"""

import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from .._text import text_table


class Table(NamedTuple):
    """The first `left` columns hold names and are set left. Numbers are set right.

    HTML hides the table behind the line `folded`, if there is one, until a reader unfolds it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int
    folded: str = ""


class Note(str):
    """An explanation of the columns, in small letters."""


def page_text(parts: Iterable[str | Table]) -> str:
    """The page as lines of text."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, Table):
            lines += text_table([part.head, *part.rows], part.left)
        else:
            lines += textwrap.wrap(part, 98) if isinstance(part, Note) else [part]
    return "\n".join(lines)


def page_html(parts: Iterable[str | Table]) -> str:
    """The page as HTML, without its empty lines."""
    return "".join(_html(part) for part in parts if part)


def _html(part: str | Table) -> str:
    if isinstance(part, Note):
        return f"<p><small>{escape(part)}</small></p>"
    if isinstance(part, str):
        return f"<div>{escape(part)}</div>"
    body = "".join(f"<tr>{_cells('td', row, part.left)}</tr>" for row in part.rows)
    html = (  # The table scrolls sideways in its own box where the page is narrow.
        '<div style="overflow-x:auto;max-width:100%">'
        '<table style="border-collapse:collapse;font-size:0.85em">'
        f"<thead><tr>{_cells('th', part.head, part.left)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    if not part.folded:
        return html
    return f"<details><summary>{escape(part.folded)}</summary>{html}</details>"


def _cells(tag: str, row: Sequence[str], left: int) -> str:
    """Spaces in front of a text are kept. Long names wrap; bars of characters stay in line."""
    name, number = ("pre", "pre") if tag == "th" else ("pre-wrap", "pre;font-family:monospace")
    looks = [("left", name)] * left + [("right", number)] * (len(row) - left)
    return "".join(
        f'<{tag} style="text-align:{side};padding:0.15em 0.5em;white-space:{space}">'
        f"{escape(text)}</{tag}>"
        for text, (side, space) in zip(row, looks, strict=True)
    )

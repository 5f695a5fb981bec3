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
    if isinstance(part, str):
        tag = "small" if isinstance(part, Note) else "div"
        return f"<{tag}>{escape(part)}</{tag}>"
    body = "".join(_row("td", row, part.left) for row in part.rows)
    table = f'<table style="font-size:0.85em">{_row("th", part.head, part.left)}{body}</table>'
    # The table scrolls sideways in its own box where the page is narrow.
    html = f'<div style="overflow-x:auto">{table}</div>'
    if not part.folded:
        return html
    return f"<details><summary>{escape(part.folded)}</summary>{html}</details>"


def _row(tag: str, texts: Sequence[str], left: int) -> str:
    """Names keep the spaces in front and wrap. Numbers and bars of characters stay in line."""
    name, number = "left;white-space:pre-wrap", "right;white-space:pre;font-family:monospace"
    cells = [
        f'<{tag} style="text-align:{name if i < left else number}">{escape(text)}</{tag}>'
        for i, text in enumerate(texts)
    ]
    return f"<tr>{''.join(cells)}</tr>"

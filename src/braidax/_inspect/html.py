"""Tables for notebooks: colours and fonts of the page around them, and all text escaped."""

from collections.abc import Sequence
from html import escape


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, note: str = ""
) -> str:
    """A table that scrolls sideways in its own box where the page is narrow. Spaces in front of a
    cell's text are kept as an indent; the first `left` columns are set left, the others right."""
    body = "".join(f"<tr>{_cells('td', row, left)}</tr>" for row in rows)
    return (
        '<div style="overflow-x:auto;max-width:100%">'
        '<table style="border-collapse:collapse;font-size:0.85em">'
        f"<thead><tr>{_cells('th', head, left)}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f"<p><small>{escape(note)}</small></p>" if note else "")
    )


def _cells(tag: str, row: Sequence[str], left: int) -> str:
    return "".join(_cell(tag, text, "left" if i < left else "right") for i, text in enumerate(row))


def _cell(tag: str, text: str, side: str) -> str:
    space = "pre"
    if tag == "td":  # long text makes room for numbers; bars stay in line
        space = "pre-wrap" if side == "left" else "pre;font-family:monospace"
    style = f"text-align:{side};padding:0.15em 0.5em;white-space:{space}"
    return f'<{tag} style="{style}">{escape(text)}</{tag}>'


def html_details(summary: str, inside: str = "") -> str:
    """A line of text; with `inside`, HTML already, one that unfolds it."""
    if not inside:
        return f"<div>{escape(summary)}</div>"
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"

"""Pages of tokens in lines, like text, in letters that can be read."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from .axes import given_or_new

_FONT_SIZES = (8.0, 7.0, 6.0, 5.0, 4.0)  # points; the first that fits is taken
# Inches for each point of a monospaced font. Its characters are 0.602 points wide.
_COLUMN, _ROW = 0.61 / 72, 1.5 / 72
_WIDEST, _NARROWEST = 9.5, 5.0  # inches, of a new figure
_MARGIN = (1.0, 1.6)  # inches, around the page: title, labels and colour bar


class Page(NamedTuple):
    """The places of tokens, in columns and lines of type from the top left."""

    left: Int[np.ndarray, " tokens"]
    width: Int[np.ndarray, " tokens"]
    line: Int[np.ndarray, " tokens"]
    rows_per_line: int
    num_columns: int
    num_rows: float
    font_size: float

    def boxes(self, tokens: Any, first_rows: Any, last_rows: Any) -> list[np.ndarray]:
        """The corners around some rows below each of the tokens. Row 0 is the token itself."""
        top = self.line[tokens] * self.rows_per_line
        left, right = self.left[tokens], self.left[tokens] + self.width[tokens] - 0.25
        above, below = top + first_rows + 0.04, top + last_rows + 0.96
        corners = ((left, above), (right, above), (right, below), (left, below))
        return list(np.moveaxis(np.array(corners, float), -1, 0))

    def write(self, ax: Any, token: int, row: int, text: str, colour: Any, font: Any) -> None:
        """Write a text in the middle of a row below the token."""
        written = ax.text(
            self.left[token] + (self.width[token] - 0.25) / 2,
            self.line[token] * self.rows_per_line + row + 0.5,
            text,
            color=colour,
            fontproperties=font,
            ha="center",
            va="center_baseline",
            parse_math=False,  # a dollar is a dollar
            usetex=False,
            clip_on=True,
        )
        # The text is inside the axes. Measuring thousands of texts takes longer than drawing them.
        written.set_in_layout(False)


def place(ax: Any, widths: Int[np.ndarray, " tokens"], rows_per_line: int) -> tuple[Any, Page]:
    """The axes, new ones if `ax` is `None`, and the page that fits them.

    Raises `ValueError` if the text does not fit into `ax` in letters of 4 points.
    """
    if ax is None:
        size = _FONT_SIZES[0]
        column, row = size * _COLUMN, size * _ROW
        available = max(int((_WIDEST - _MARGIN[0]) / column), int(widths.max()))
        left, line = _set_lines(widths, available)
        num_columns = max(int((left + widths).max()), int((_NARROWEST - _MARGIN[0]) / column))
        num_rows = (int(line[-1]) + 1) * rows_per_line
        ax = given_or_new(None, num_columns * column + _MARGIN[0], num_rows * row + _MARGIN[1])
        return ax, Page(left, widths, line, rows_per_line, num_columns, num_rows, size)
    box = ax.get_window_extent()
    width, height = box.width / ax.figure.dpi, box.height / ax.figure.dpi
    for size in _FONT_SIZES:
        # Title, labels and colour bar leave these shares of the axes.
        num_columns, num_rows = int(0.9 * width / (size * _COLUMN)), 0.75 * height / (size * _ROW)
        if widths.max() <= num_columns:
            left, line = _set_lines(widths, num_columns)
            if (line[-1] + 1) * rows_per_line <= num_rows:
                return ax, Page(left, widths, line, rows_per_line, num_columns, num_rows, size)
    raise ValueError(
        f"`ax` must be large enough for {len(widths)} tokens. Got {width:.1f} x {height:.1f} "
        "inches. Without `ax` a figure of the right size is made."
    )


def _set_lines(
    widths: Int[np.ndarray, " tokens"], num_columns: int
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """`(left, line)`. A token that would pass the end of its line begins the next line."""
    left, line = np.zeros_like(widths), np.zeros_like(widths)
    for token in range(1, len(widths)):
        left[token], line[token] = left[token - 1] + widths[token - 1], line[token - 1]
        if left[token] + widths[token] > num_columns:
            left[token], line[token] = 0, line[token - 1] + 1
    return left, line

"""Sets tokens in lines, like text, at a size that can be read."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from .axes import new_axes

_FONT_SIZES = (8.0, 7.0, 6.0, 5.0, 4.0)  # points; the first that fits is taken
# Inches for each point of a monospaced font. Its characters are 0.602 points wide.
_COLUMN, _ROW = 0.61 / 72, 1.5 / 72
_WIDEST, _NARROWEST = 9.5, 5.0  # inches, of a new figure
_MARGIN = (1.0, 1.6)  # inches, around the page: title, labels and colour bar


class Page(NamedTuple):
    """Where each token stands, in columns and lines of type from the top left."""

    left: Int[np.ndarray, " tokens"]
    width: Int[np.ndarray, " tokens"]
    line: Int[np.ndarray, " tokens"]
    rows_per_line: int
    num_columns: int
    num_rows: float
    font_size: float


def place(ax: Any, widths: Int[np.ndarray, " tokens"], rows_per_line: int) -> tuple[Any, Page]:
    """The axes, new ones if `ax` is `None`, and the page that fits them.

    Raises `ValueError` if the text does not fit into `ax` in letters of 4 points.
    """
    if ax is None:
        size = _FONT_SIZES[0]
        available = max(int((_WIDEST - _MARGIN[0]) / (size * _COLUMN)), int(widths.max()))
        left, line = _set_lines(widths, available)
        least = int((_NARROWEST - _MARGIN[0]) / (size * _COLUMN))
        num_columns = max(int((left + widths).max()), least)
        num_rows = (int(line[-1]) + 1) * rows_per_line
        ax = new_axes(
            num_columns * size * _COLUMN + _MARGIN[0], num_rows * size * _ROW + _MARGIN[1]
        )
        return ax, Page(left, widths, line, rows_per_line, num_columns, num_rows, size)
    box = ax.get_window_extent()
    width, height = box.width / ax.figure.dpi, box.height / ax.figure.dpi
    for size in _FONT_SIZES:
        # Shares of the axes that title, labels and colour bar leave.
        num_columns, num_rows = int(0.9 * width / (size * _COLUMN)), 0.75 * height / (size * _ROW)
        if widths.max() > num_columns:
            continue
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
    """`(left, line)`: a token that would pass the end of its line begins the next."""
    left, line = np.zeros_like(widths), np.zeros_like(widths)
    for token in range(1, len(widths)):
        left[token], line[token] = left[token - 1] + widths[token - 1], line[token - 1]
        if left[token] + widths[token] > num_columns:
            left[token], line[token] = 0, line[token - 1] + 1
    return left, line

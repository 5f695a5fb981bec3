"""Pages of tokens in lines, like text, in letters that can be read."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from .axes import given_or_new

_FONT_SIZES = (8.0, 7.0, 6.0, 5.0, 4.0)  # points; the first that fits is taken
# Inches for each point of a monospaced font. Its characters are 0.602 points wide.
_COLUMN, _ROW = 0.61 / 72, 1.5 / 72
_WIDTH, _MARGIN = 8.5, (1.0, 1.6)  # inches: of the text in a new figure, and around the text
_FEWEST_COLUMNS = 60  # of a new figure, which has a title and a colour bar too


class Page(NamedTuple):
    """The places of tokens, in columns and lines of type from the top left."""

    left: Int[np.ndarray, " tokens"]
    width: Int[np.ndarray, " tokens"]
    line: Int[np.ndarray, " tokens"]
    rows_per_line: int
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
        x = self.left[token] + (self.width[token] - 0.25) / 2
        y = self.line[token] * self.rows_per_line + row + 0.5
        place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "clip_on": True}
        plain = {"parse_math": False, "usetex": False}  # a dollar is a dollar
        written = ax.text(x, y, text, color=colour, fontproperties=font, **place, **plain)
        # The text is inside the axes. Measuring thousands of texts takes longer than drawing them.
        written.set_in_layout(False)


def place(ax: Any, widths: Int[np.ndarray, " tokens"], rows_per_line: int) -> tuple[Any, Page]:
    """The axes, new ones if `ax` is `None`, and the page that fits them. Each line has a tick.

    Raises `ValueError` if the text does not fit into `ax` in letters of 4 points.
    """
    width, height = _WIDTH, np.inf
    if ax is not None:
        box = ax.get_window_extent().size / ax.figure.dpi
        width, height = box * (0.9, 0.75)  # what title, labels and colour bar leave
    for size in _FONT_SIZES:
        num_columns = int(width / (size * _COLUMN))
        left, line = _set_lines(widths, num_columns)
        num_rows = int(line[-1] + 1) * rows_per_line
        if widths.max() <= num_columns and num_rows * size * _ROW <= height:
            break
    else:
        raise ValueError(
            f"`ax` must be large enough for {len(widths)} tokens. Got {box[0]:.1f} x {box[1]:.1f} "
            "inches. Without `ax` a figure of the right size is made."
        )
    if ax is None:
        num_columns = max(int((left + widths).max()), _FEWEST_COLUMNS)
        width, height = num_columns * size * _COLUMN, num_rows * size * _ROW
        ax = given_or_new(None, width + _MARGIN[0], height + _MARGIN[1])
    starts = np.unique(line, return_index=True)[1]
    ax.set(xlim=(-0.5, num_columns), ylim=(height / (size * _ROW) - 0.6, -0.2), xticks=[])
    ax.set_yticks(np.arange(len(starts)) * rows_per_line + 0.5, [str(i) for i in starts])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax, Page(left, widths, line, rows_per_line, size)


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

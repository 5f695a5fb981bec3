"""The experts of every token of a text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Integer

from ..._routing import Routing
from .axes import NO_VALUE, foreground, is_light, require_matplotlib
from .inputs import Assignments, assignments
from .text_page import Page, place
from .token_labels import columns, token_labels

_MOST_TOKENS = 512
_NOT_FINITE = "#CC79A7"


def plot_token_experts(
    routing: Routing,
    tokens: Sequence[str]
    | bytes
    | Sequence[int]
    | Integer[Array, "*batch"]
    | Integer[np.ndarray, "*batch"]
    | None = None,
    *,
    decode: Callable[[int], str] | None = None,
    ax: Any = None,
) -> Any:
    """The text, set in lines, and below each token its experts, coloured by routing weight.

    The number in a cell is the expert, the largest weight on top; the numbers at the left margin
    are positions. Padding is hatched; a weight that is not finite is pink. Spaces, control
    characters and glyphs that the font lacks are written as signs and escapes.

    **Arguments:**

    - `routing`: a `Routing` of 1 to 512 tokens; leading axes are read one after the other.
    - `tokens`: texts (of a string: each character), `bytes` (each byte), or ids in a sequence or in
      an array `(*batch,)`, one for each token; by default their positions.
    - `decode`: turns an id into its text.
    - `ax`: the `Axes` to draw in; by default those of a new figure, `ax.figure`, as high as the
      text needs. pyplot is never touched.

    **Returns:** the `Axes`.

    **Example:**

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> table = bx.hash_tables.md5(256, 64, 6)
        >>> router = bx.HashRouter(4, 64, 6, table=table, key=jax.random.key(0))
        >>> text = b"a braided river"
        >>> ax = bx.plot_token_experts(router(jnp.ones((15, 4)), jnp.array(list(text))), text)

    **Raises:** `ImportError` without matplotlib, `TypeError` for arguments of another kind,
    `ValueError` for no tokens, too many, a number that differs from the routing's, or an `ax` too
    small for them.
    """
    require_matplotlib()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    data = _largest_first(assignments(routing))
    num_tokens, experts_per_token = data.indices.shape
    if not 1 <= num_tokens <= _MOST_TOKENS:
        raise ValueError(
            f"`routing` must hold 1 to {_MOST_TOKENS} tokens, or the text cannot be read. "
            f"Got {num_tokens}."
        )
    # One file, not a family: what is asked for a glyph is also what draws it.
    path = findfont(FontProperties(family="monospace"))
    labels = token_labels(tokens, decode, num_tokens, get_font(path))
    digits = len(str(data.num_experts - 1))
    widths = np.array([max(columns(label), digits) + 1 for label in labels])
    ax, page = place(ax, widths, experts_per_token + 2)
    font = FontProperties(fname=path, size=page.font_size)
    _draw_cells(ax, page, data, font)
    for token, label in enumerate(labels):
        colour = foreground(ax) if data.mask[token] else NO_VALUE
        _write(ax, page, token, 0, label, colour, font)
    _finish(ax, page)
    return ax


def _finish(ax: Any, page: Page) -> None:
    starts = np.unique(page.line, return_index=True)[1]
    ax.set(
        xlim=(-0.5, page.num_columns),
        ylim=(page.num_rows - 0.6, -0.2),
        xticks=[],
        ylabel="Position of first token",
        title="Experts of each token, largest weight on top",
    )
    ax.set_yticks(np.arange(len(starts)) * page.rows_per_line + 0.5, [str(i) for i in starts])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _largest_first(data: Assignments) -> Assignments:
    order = np.argsort(-data.weights, axis=1, kind="stable")  # NaN comes last
    return data._replace(
        indices=np.take_along_axis(data.indices, order, axis=1),
        weights=np.take_along_axis(data.weights, order, axis=1),
    )


def _box(page: Page, token: int, first_row: int, last_row: int) -> Float[np.ndarray, "4 2"]:
    """The corners of rows `first_row` to `last_row` below the token; row 0 is its text."""
    top = page.line[token] * page.rows_per_line
    left, right = page.left[token], page.left[token] + page.width[token] - 0.25
    above, below = top + first_row + 0.04, top + last_row + 0.96
    return np.array([(left, above), (right, above), (right, below), (left, below)], float)


def _write(ax: Any, page: Page, token: int, row: int, text: str, colour: Any, font: Any) -> None:
    written = ax.text(
        page.left[token] + (page.width[token] - 0.25) / 2,
        page.line[token] * page.rows_per_line + row + 0.5,
        text,
        color=colour,
        fontproperties=font,
        ha="center",
        va="center_baseline",
        parse_math=False,  # a dollar is a dollar
        usetex=False,
        clip_on=True,
    )
    # Inside the axes by construction; measuring thousands of texts takes longer than drawing them.
    written.set_in_layout(False)


def _draw_cells(ax: Any, page: Page, data: Assignments, font: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    experts_per_token = data.indices.shape[1]
    valid, padding = np.flatnonzero(data.mask).tolist(), np.flatnonzero(~data.mask).tolist()
    weights = np.ma.masked_invalid(data.weights[valid].reshape(-1))
    finite = weights.compressed()
    low, high = min(0.0, finite.min(initial=0.0)), finite.max(initial=0.0)
    norm = Normalize(low, high if high > low else low + 1)
    colours = colormaps["cividis"].with_extremes(bad=_NOT_FINITE)
    boxes = [_box(page, t, 1 + rank, 1 + rank) for t in valid for rank in range(experts_per_token)]
    cells = PolyCollection(boxes, array=weights, cmap=colours, norm=norm, linewidths=0)
    ax.add_collection(cells)
    fills = colours(norm(weights)).reshape(len(valid), experts_per_token, 4)
    for token, row in zip(valid, fills, strict=True):
        for rank, fill in enumerate(row):
            text = str(data.indices[token, rank])
            colour = "black" if is_light(fill) else "white"
            _write(ax, page, token, 1 + rank, text, colour, font)
    legend = []
    if len(padding):
        hatched: dict[str, Any] = {
            "hatch": "////",
            "facecolor": "none",
            "edgecolor": NO_VALUE,
            "linewidth": 0.5,
        }
        boxes = [_box(page, token, 1, experts_per_token) for token in padding]
        ax.add_collection(PolyCollection(boxes, **hatched))
        legend.append(Patch(label="padding", **hatched))
    if weights.size > finite.size:
        legend.append(Patch(label="weight not finite", facecolor=_NOT_FINITE))
    ax.figure.colorbar(
        cells, ax=ax, label="Routing weight", location="bottom", shrink=0.5, aspect=30, pad=0.0
    )
    if legend:
        ax.legend(
            handles=legend,
            frameon=False,
            ncols=2,
            loc="upper right",
            bbox_to_anchor=(1.0, 0.0),
            labelcolor=foreground(ax),
        )

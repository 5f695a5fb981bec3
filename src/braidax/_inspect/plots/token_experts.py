"""The experts of every token of a text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Integer

from ..._checks import check
from ..._routing import Routing
from ..assignments import Assignments
from .axes import GREY, foreground, is_light, read_routing, require_matplotlib
from .text_pages import Page, place
from .token_labels import num_columns, token_labels

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

    The number in a cell is the expert, and the largest weight is on top. The numbers at the left
    margin are positions. Padding is hatched. A weight that is not finite is pink. Nobody has no
    cell. Spaces, control characters and glyphs that the font lacks are written as signs and
    escapes.

    **Arguments:**

    - `routing`: one layer's `Routing` of 1 to 512 tokens; batch axes are read one after the other.
    - `tokens`: texts (of a string: each character), `bytes` (each byte), or ids in a sequence or in
      an array `(*batch,)`, one for each token; by default their positions.
    - `decode`: turns an id into its text, as for `report`.
    - `ax`: the `Axes` to draw in and to return; by default those of a new figure without pyplot,
      as high as the text needs.

    **Example:**

        >>> import braidax as bx, jax, jax.numpy as jnp
        >>> table = bx.hash_tables.md5(256, 64, 6)
        >>> router = bx.HashRouter(4, 64, 6, table=table, key=jax.random.key(0))
        >>> text = b"a braided river"
        >>> ax = bx.plot_token_experts(router(jnp.ones((15, 4)), jnp.array(list(text))), text)

    **Raises:** `ImportError` without matplotlib. `TypeError` for arguments of another kind.
    `ValueError` for a stacked routing, no tokens, too many, a number that differs from the
    routing's, or an `ax` too small for them.
    """
    require_matplotlib()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    data = read_routing(routing)
    num_tokens = len(data.indices)
    must = f"hold 1 to {_MOST_TOKENS} tokens, or the text cannot be read"
    check(1 <= num_tokens <= _MOST_TOKENS, "routing", must, num_tokens)
    # One font file, not a family, so that the font asked for a glyph is the font that draws it.
    path = findfont(FontProperties(family="monospace"))
    labels = token_labels(tokens, decode, num_tokens, get_font(path))
    digits = len(str(data.num_experts - 1))
    widths = np.array([max(num_columns(label), digits) + 1 for label in labels])
    ax, page = place(ax, widths, rows_per_line=data.indices.shape[1] + 2)
    font = FontProperties(fname=path, size=page.font_size)
    _draw_cells(ax, page, data, font)
    for token, label in enumerate(labels):
        page.write(ax, token, 0, label, foreground(ax) if data.mask[token] else GREY, font)
    _draw_padding_and_legend(ax, page, data)
    ax.set(ylabel="Position of first token", title="Experts of each token, largest weight on top")
    return ax


def _draw_cells(ax: Any, page: Page, data: Assignments, font: Any) -> None:
    """A cell for each expert of a token, its number, and the colour bar of the weights."""
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize

    nobody = data.indices == data.num_experts
    order = np.lexsort((-data.weights, nobody), axis=1)  # NaN comes last, but before nobody
    tokens, ranks = np.nonzero(~np.take_along_axis(nobody, order, axis=1) & data.mask[:, None])
    slots = order[tokens, ranks]
    weights = np.ma.masked_invalid(data.weights[tokens, slots].astype(np.float64))
    finite = weights.compressed()
    low, high = finite.min(initial=0.0), finite.max(initial=0.0)
    norm = Normalize(low, high if high > low else low + 1)
    colours = colormaps["cividis"].with_extremes(bad=_NOT_FINITE)
    boxes = page.boxes(tokens, ranks + 1, ranks + 1)
    cells = PolyCollection(boxes, array=weights, cmap=colours, norm=norm, linewidths=0)
    ax.add_collection(cells)
    cell = (tokens.tolist(), ranks.tolist(), data.indices[tokens, slots].tolist())
    for token, rank, expert, fill in zip(*cell, colours(norm(weights)), strict=True):
        colour = "black" if is_light(fill) else "white"
        page.write(ax, token, rank + 1, str(expert), colour, font)
    bottom = {"location": "bottom", "shrink": 0.5, "aspect": 30, "pad": 0.0}
    ax.figure.colorbar(cells, ax=ax, label="Routing weight", **bottom)


def _draw_padding_and_legend(ax: Any, page: Page, data: Assignments) -> None:
    """A hatched box for every token of padding, and what hatching and pink mean, if they occur."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    legend = []
    padding = np.flatnonzero(~data.mask)
    if len(padding):
        hatched: Any = {"hatch": "////", "facecolor": "none", "edgecolor": GREY, "linewidth": 0.5}
        boxes = page.boxes(padding, 1, data.indices.shape[1])
        legend.append(ax.add_collection(PolyCollection(boxes, label="padding", **hatched)))
    used = data.weights[data.mask][data.indices[data.mask] < data.num_experts]
    if not np.isfinite(used).all():
        legend.append(Patch(label="weight not finite", facecolor=_NOT_FINITE))
    if legend:
        corner = {"loc": "upper right", "bbox_to_anchor": (1.0, 0.0)}
        ax.legend(handles=legend, frameon=False, ncols=2, labelcolor=foreground(ax), **corner)

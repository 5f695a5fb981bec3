"""Axes and colours that every plot shares, and the routings that plots are given."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._checks import check
from ..._routing import Routing
from ..assignments import Assignments, read_layers

# Okabe and Ito's palette, which people with any common colour blindness can tell apart. Its black
# is missing: the style decides between black and white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# The colour of what has no value or no name. It is visible on black and on white.
GREY = "#8C8C8C"


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib. Install it with `pip install "braidax[plot]"`.'
        ) from error


def given_or_new(ax: Any, width: float, height: float) -> Any:
    """`ax`, or the axes of a new figure, which pyplot does not know: nothing is shown or leaked."""
    require_matplotlib()
    from matplotlib.figure import Figure

    if ax is not None:
        return ax
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def foreground(ax: Any) -> Any:
    """The colour of the style for text: black on white, white on black."""
    return ax.xaxis.label.get_color()


def is_light(colour: Any) -> bool:
    """Whether black text can be read better on `colour` than white text."""
    from matplotlib.colors import to_rgb

    # Both contrasts are about equal at 0.45 of the encoded value of Rec. 709 luminance.
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722))) > 0.45


def integer_ticks(axis: Any, count: int) -> None:
    """At most `count` ticks, at integers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=count, integer=True, min_n_ticks=1))


def read_routing(routing: Any) -> Assignments:
    """The tokens of one layer's Routing in reading order. Raises `TypeError` for anything else."""
    if not isinstance(routing, Routing):
        raise TypeError(f"`routing` must be a Routing. Got {type(routing).__name__}.")
    stacked = routing.stacked
    given = f"one over {stacked}: `jax.tree.map(lambda array: array[0], routing)` is its first part"
    check(not stacked, "routing", "be of one layer, and not stacked", given)
    return read_layers("routing", routing, ())[0]


def read_routings(routing: Any) -> list[Assignments]:
    """The tokens of one Routing, or of a sequence of them from the same layer, without padding.

    Raises `ValueError` without a token and for routings that differ in their number of experts or
    of experts per token.
    """
    several = isinstance(routing, Sequence) and not isinstance(routing, str | bytes)
    parts = [read_routing(item) for item in (routing if several else [routing])]
    sizes = sorted({(part.num_experts, part.indices.shape[1]) for part in parts})
    must = "hold routings of one layer, alike in (experts, experts per token)"
    check(len(sizes) < 2, "routing", must, sizes)
    given = f"{sum(part.mask.size for part in parts)} tokens, all padding"
    found = any(part.mask.any() for part in parts)
    check(found, "routing", "hold a token that is not padding", given)
    return [part.unmasked() for part in parts]

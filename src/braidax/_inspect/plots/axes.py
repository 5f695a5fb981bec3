"""What the plots share: matplotlib, new axes, and colours that every eye and style can read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe and Ito's palette, told apart with every common colour blindness. Its black is left to the
# style: see `line_colours`.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# Cells without a value. Neither end of a map, and visible on black and on white.
NO_VALUE = "#8C8C8C"


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib. Install it with `pip install "braidax[plot]"`.'
        ) from error


def new_axes(width: float, height: float) -> Any:
    # A Figure of its own, not pyplot's: nothing global is created, shown or leaked.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def foreground(ax: Any) -> Any:
    """The colour in which the style of `ax` writes: black on white, white on black."""
    return ax.xaxis.label.get_color()


def is_light(colour: Any) -> bool:
    """Whether black text is the one to read on `colour`."""
    from matplotlib.colors import to_rgb

    # Rec. 709 luminance; 0.45 of the encoded value is where both contrasts are about equal.
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722))) > 0.45


def line_colours(ax: Any) -> tuple[Any, ...]:
    return (*COLOURS, foreground(ax))


def line_scale(ax: Any, names: Sequence[str], label: str) -> Any:
    """Colours for many lines, first to last, with the colour bar that explains them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # The end of the map that the background would swallow is left out.
    first, last = (0.35, 1.0) if is_light(foreground(ax)) else (0.0, 0.85)
    colours = ListedColormap(colormaps["cividis"](np.linspace(first, last, 256)))
    norm = Normalize(0, len(names) - 1)
    bar = ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, label=label)
    shown = np.unique(np.linspace(0, len(names) - 1, min(len(names), 8)).round().astype(int))
    bar.set_ticks(list(shown), labels=[names[i] for i in shown])
    return colours(norm(np.arange(len(names))))


def draw_lines(ax: Any, x: Any, y: Any, names: Sequence[str], label: str, reference: str) -> None:
    """A line for each column of `y` and a dashed one at 0, called `reference`.

    Up to seven lines get a legend, more get a colour scale; `label` says what they are.
    """
    from matplotlib.patheffects import withStroke

    many = len(names) > len(line_colours(ax))
    colours = line_scale(ax, names, label) if many else line_colours(ax)
    marker = "o" if len(x) < 2 else None  # one point draws no line
    width = 0.8 if len(names) > 64 else 1.5
    for column, name in enumerate(names):
        # Stacked in a scattered order: of many lines no end of the scale covers the other.
        height = 2 + column * 0.618 % 1 / 2 if many else 2
        style = {"color": colours[column], "marker": marker, "linewidth": width, "zorder": height}
        ax.plot(x, y[:, column], label=name, **style)
    outline = [withStroke(linewidth=3, foreground=ax.get_facecolor())] if many else None
    style = {"color": foreground(ax), "linestyle": "--", "linewidth": 1.2, "zorder": 3}
    ax.axhline(0.0, label=reference, path_effects=outline, **style)
    ax.autoscale_view()  # keeps the line at 0 off the frame
    inches = ax.bbox.width / ax.figure.dpi
    integer_ticks(ax.xaxis, min(8, max(2, int(1.5 * inches))))  # a step may have six digits
    if not many:
        ax.legend(
            title=label,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            labelcolor=foreground(ax),
        )


def centred_ticks(centre: float, last: float) -> list[float]:
    """0, half of `centre`, `centre`, and round values above it that leave room for its label."""
    from matplotlib.ticker import MaxNLocator

    above = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(centre, last)
    room = 0.15 * (last - centre)
    return [0.0, centre / 2, centre, *(float(t) for t in above if centre + room < t <= last)]


def integer_ticks(axis: Any, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=count, integer=True, min_n_ticks=1))


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

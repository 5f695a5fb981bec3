"""Pictures of expert load and its balance. matplotlib is imported when a plot is drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Real

from .._balance import expert_load
from .._routing import Routing

# Okabe and Ito's palette, told apart with every common colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def new_axes(width: float, height: float) -> Any:
    # A Figure of its own, not pyplot's: nothing global is created, shown or leaked.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib. Install it with `pip install "braidax[plot]"`.'
        ) from error


def _names(layer_names: Sequence[str] | None, num_layers: int) -> list[str]:
    names = [str(i) for i in range(num_layers)] if layer_names is None else list(layer_names)
    if len(names) != num_layers:
        raise ValueError(
            f"`layer_names` must hold one name per layer. Got {len(names)} for {num_layers} layers."
        )
    return names


def _load_table(loads: Any) -> np.ndarray:
    if isinstance(loads, Sequence) and all(isinstance(item, Routing) for item in loads):
        rows = [np.asarray(expert_load(routing)) for routing in loads]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(
                "`loads` must hold routings with the same number of experts. "
                f"Got {[row.shape[0] for row in rows]}."
            )
        loads = np.reshape(rows, (len(rows), -1)) if rows else np.zeros((0, 0))
    table = np.asarray(loads, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            "`loads` must be a non-empty array (layers, experts) or a sequence of Routing. "
            f"Got shape {table.shape}."
        )
    return table


def plot_load(
    loads: Real[Array, "layers experts"] | Real[np.ndarray, "layers experts"] | Sequence[Routing],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """Heat map of each expert's load divided by its layer's mean load; returns the `Axes`.

    `loads` counts assignments, `(layers, experts)`, or is one `Routing` per layer. White is
    perfect balance (1), orange below it, purple above. A layer without load is drawn as 0.
    Without `ax` a new figure is made, `ax.figure`; pyplot is never touched.

    Raises `ImportError` without matplotlib and `ValueError` for shapes or names that do not fit.
    """
    require_matplotlib()
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    table = _load_table(loads)
    num_layers, num_experts = table.shape
    names = _names(layer_names, num_layers)
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.zeros_like(table), where=mean > 0)
    if ax is None:
        ax = new_axes(7.0, min(12.0, max(3.0, 1.4 + 0.22 * num_layers)))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(np.nanmax(ratio))))
    image = ax.imshow(ratio, aspect="auto", cmap="PuOr", norm=norm, interpolation="nearest")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    # All names while they fit; beyond that every n-th.
    shown = range(0, num_layers, -(-num_layers // 32))
    ax.set_yticks(list(shown), [names[i] for i in shown])
    ax.set(xlabel="Expert", ylabel="Layer", title="Expert load by layer")
    bar = ax.figure.colorbar(image, ax=ax, label="Load / mean load of layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    return ax


def plot_balance(
    steps: Real[Array, " steps"] | Real[np.ndarray, " steps"] | Sequence[int],
    max_violation: Real[Array, "steps layers"] | Real[np.ndarray, "steps layers"],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """One line per layer of `max_violation` over training steps; returns the `Axes`.

    `max_violation` is a ratio, `(steps, layers)`; the dashed line at 0 is perfect balance. Up to
    seven layers get a legend, more get a colour scale. Without `ax` a new figure is made,
    `ax.figure`; pyplot is never touched.

    Raises `ImportError` without matplotlib and `ValueError` for shapes or names that do not fit.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    steps, values = np.asarray(steps), np.asarray(max_violation, dtype=np.float64)
    if steps.ndim != 1 or values.ndim != 2 or values.shape[0] != steps.shape[0]:
        raise ValueError(
            "`steps` must be (steps,) and `max_violation` (steps, layers). "
            f"Got {steps.shape} and {values.shape}."
        )
    names = _names(layer_names, values.shape[1])
    if ax is None:
        ax = new_axes(7.0, 4.0)
    many = len(names) > len(COLOURS)
    colours = _layer_scale(ax, names) if many else COLOURS
    marker = "o" if len(steps) < 2 else None  # one point draws no line
    for layer, name in enumerate(names):
        ax.plot(steps, values[:, layer], color=colours[layer], label=name, marker=marker, lw=1.5)
    ax.axhline(0.0, color="0.35", linestyle="--", linewidth=1.0, label="perfect balance")
    ax.autoscale_view()  # keeps the line at 0 off the frame
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.set(
        xlabel="Training step",
        ylabel="MaxVio (max load / mean load − 1)",
        title="Load imbalance over training",
    )
    if not many:
        ax.legend(title="Layer", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _layer_scale(ax: Any, names: list[str]) -> Any:
    """Colours for many layers, first to last, with the colour bar that explains them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    norm = Normalize(0, len(names) - 1)
    bar = ax.figure.colorbar(ScalarMappable(norm, "cividis"), ax=ax, label="Layer")
    shown = np.unique(np.linspace(0, len(names) - 1, min(len(names), 8)).round().astype(int))
    bar.set_ticks(list(shown), labels=[names[i] for i in shown])
    return colormaps["cividis"](norm(np.arange(len(names))))

"""Expert load, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Real

from ..._balance import expert_load
from ..._routing import Routing
from .axes import centred_ticks, integer_ticks, new_axes, require_matplotlib
from .inputs import layer_names as checked_names
from .inputs import on_host


def _load_table(loads: Any) -> Float[np.ndarray, "layers experts"]:
    if isinstance(loads, Routing):
        loads = [loads]
    if isinstance(loads, Sequence) and all(isinstance(item, Routing) for item in loads):
        rows = [on_host("loads", expert_load(routing)) for routing in loads]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(
                "`loads` must hold routings with the same number of experts. "
                f"Got {[row.shape[0] for row in rows]}."
            )
        loads = np.reshape(rows, (len(rows), -1)) if rows else np.zeros((0, 0))
    table = on_host("loads", loads).astype(np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            "`loads` must be a non-empty array (layers, experts) or one Routing or several. "
            f"Got shape {table.shape}."
        )
    wrong = ~(np.isfinite(table) & (table >= 0))
    if wrong.any():
        raise ValueError(f"`loads` must hold finite counts of at least 0. Got {table[wrong][0]}.")
    return table


def plot_load(
    loads: Real[Array, "layers experts"]
    | Real[np.ndarray, "layers experts"]
    | Routing
    | Sequence[Routing],
    *,
    ax: Any = None,
    layer_names: Sequence[str] | None = None,
) -> Any:
    """Heat map of each expert's load divided by its layer's mean load.

    White is perfect balance (1), orange below it, purple above. A layer without load is drawn as 0.

    **Arguments:**

    - `loads`: assignments counted, `(layers, experts)`, or one `Routing` per layer, or one
        of a single layer.
    - `ax`: the `Axes` to draw in; by default those of a new figure, `ax.figure`. pyplot is never
      touched.
    - `layer_names`: one name a layer; by default its number, from 0.

    **Returns:** the `Axes`.

    **Example:**

        >>> import braidax as bx, numpy as np
        >>> ax = bx.plot_load(np.array([[4, 4, 4, 4], [8, 8, 0, 0]]), layer_names=["hash", "top-k"])
        >>> ax.images[0].get_array().tolist()
        [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]]

    **Raises:** `ImportError` without matplotlib, `ValueError` for shapes or names that do not fit
    and for loads that are negative or not finite, `TypeError` for traced arrays.
    """
    require_matplotlib()
    from matplotlib.colors import TwoSlopeNorm

    table = _load_table(loads)
    num_layers = table.shape[0]
    names = checked_names(layer_names, num_layers)
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.zeros_like(table), where=mean > 0)
    if ax is None:
        ax = new_axes(7.0, min(12.0, max(3.0, 1.4 + 0.22 * num_layers)))
    largest = max(2.0, float(ratio.max()))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=largest)
    image = ax.imshow(ratio, aspect="auto", cmap="PuOr", norm=norm, interpolation="nearest")
    ax.grid(False)
    integer_ticks(ax.xaxis, 10)
    # All names while they fit; beyond that every n-th.
    shown = range(0, num_layers, -(-num_layers // 32))
    ax.set_yticks(list(shown), [names[i] for i in shown])
    ax.set(xlabel="Expert", ylabel="Layer", title="Expert load by layer")
    bar = ax.figure.colorbar(image, ax=ax, label="Load / mean load of layer")
    ticks = centred_ticks(1.0, largest)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    return ax

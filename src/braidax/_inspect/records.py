"""`Report`: the counts and figures of every layer, and how they are shown."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from .._text import counted
from .counts import mean_or_nan
from .pages import Note, Table, page_html, page_text
from .top_tokens import TopToken, TopTokens, token_lines, token_tables

_NOTE = (
    "MaxVio: max/mean load - 1, over everything and as the mean over batches; entropy: of the load;"
    " top-1: load of the busiest expert; confidence: largest share of a token's weights on one"
    " expert; router entropy: of a token's scores; entropies from 0 to 1. Bars: load of each"
    " expert, half height is the mean, · no load"
)
_BARS = "·▁▂▃▄▅▆▇█"
_MOST_BARS = 32
_MOST_EXPERTS_IN_HTML = 256  # of all layers together, because a notebook keeps what it shows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The result of `braidax.report`. Print it, or let a notebook show it as a table.

    Arrays are NumPy's: counts are int64, figures float64. A figure is NaN if there was no token to
    average. Masked tokens and nobody are not counted.

    - `layer_names`: one name a layer.
    - `routers`: `"hash"`, `"top-k"` or the name of another class, a layer; None if not known.
    - `num_tokens`: tokens. `dropped`: assignments that were not computed.
    - `undefined`: tokens with a weight or score that is not finite. The load counts them; the means
      over tokens leave them out.
    - `load`: assignments of each expert, as `braidax.expert_load` counts them.
    - `max_violation`: max / mean of that load, minus 1.
    - `batch_max_violation`: the same batch by batch. The printed mean leaves out the NaN of batches
      without a token. Sampling alone keeps it above 0, and more so for smaller batches.
    - `load_entropy`: entropy of the load's shares / log(experts), 1 at perfect balance.
    - `dead_experts`: experts without load. `top_1_share`: the busiest expert's share of the load.
    - `confidence`: mean over tokens of the largest share of a token's weights on one expert. An
      expert that a token names twice has both weights.
    - `router_entropy`: mean over tokens of the entropy of scores / their sum, / log(experts).
    - `coactivation`: tokens that use both experts; on the diagonal, tokens that use the expert.
    - `top_tokens`: `[layer][expert]`, most frequent first; None without `input_ids`.
    """

    layer_names: tuple[str, ...]
    routers: tuple[str, ...] | None
    num_tokens: Int64[np.ndarray, " layers"]
    dropped: Int64[np.ndarray, " layers"]
    undefined: Int64[np.ndarray, " layers"]
    load: Int64[np.ndarray, "layers experts"]
    max_violation: Float64[np.ndarray, " layers"]
    batch_max_violation: Float64[np.ndarray, "batches layers"]
    load_entropy: Float64[np.ndarray, " layers"]
    dead_experts: Int64[np.ndarray, " layers"]
    top_1_share: Float64[np.ndarray, " layers"]
    confidence: Float64[np.ndarray, " layers"]
    router_entropy: Float64[np.ndarray, " layers"]
    coactivation: Int64[np.ndarray, "layers experts experts"]
    top_tokens: TopTokens | None

    @property
    def is_hash(self) -> Bool[np.ndarray, " layers"] | None:
        """Which layers are hash-routed: training does not change their load. None if not known."""
        return None if self.routers is None else np.array([kind == "hash" for kind in self.routers])

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON can hold it: lists of numbers, null for NaN."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        return page_text(self._page(token_lines))

    def _repr_html_(self) -> str:
        small = self.load.size <= _MOST_EXPERTS_IN_HTML
        return page_html(self._page(token_tables if small else token_lines))

    def _page(self, show_tokens: Callable[..., Sequence[str | Table]]) -> list[str | Table]:
        few, most = int(self.num_tokens.min()), int(self.num_tokens.max())
        layers, experts = self.load.shape
        title = (
            f"{counted(layers, 'layer')} of {counted(experts, 'expert')},"
            f" {'' if few == most else f'{few:,} to '}{counted(most, 'token')}"
            f" in {counted(len(self.batch_max_violation), 'batch', 'es')}"
        )
        page = [title, *self._warnings(), "", *self._sections()]
        if self.top_tokens is not None:
            page += show_tokens(self.layer_names, self.load, self.top_tokens)
        size = _group_size(experts)
        grouped = f", each bar the largest of {size} neighbours" if size > 1 else ""
        return [*page, Note(f"{_NOTE}{grouped}.")]

    def _warnings(self) -> list[str]:
        lines = []
        for what, counts in (
            ("assignments dropped", self.dropped),
            ("tokens with a weight or score that is not finite", self.undefined),
        ):
            each = zip(self.layer_names, counts, strict=True)
            found = ", ".join(f"{count:,} in layer {name}" for name, count in each if count)
            lines += [f"{what}: {found}"] if found else []
        return lines

    def _sections(self) -> list[str | Table]:
        """A heading and a table for every kind of router, hash layers last."""
        known = ~np.isnan(self.batch_max_violation)
        batch_mean = mean_or_nan(np.nansum(self.batch_max_violation, axis=0), known.sum(axis=0))
        columns = {
            "layer": self.layer_names,
            "MaxVio": [f"{number:.2f}" for number in self.max_violation],
            "batch MaxVio": [f"{number:.2f}" for number in batch_mean],
            "entropy": [f"{number:.3f}" for number in self.load_entropy],
            "dead": [str(number) for number in self.dead_experts],
            "top-1": [f"{number:.1%}" for number in self.top_1_share],
            "confidence": [f"{number:.3f}" for number in self.confidence],
            "router entropy": [f"{number:.3f}" for number in self.router_entropy],
            "load": [load_bars(load) for load in self.load],
        }
        head, rows = tuple(columns), list(zip(*columns.values(), strict=True))
        if self.routers is None:
            return ["layers (give `model=` to tell hash from top-k)", Table(head, rows, 1), ""]
        parts: list[str | Table] = []
        for kind in sorted(set(self.routers), key=lambda kind: (kind == "hash", kind)):
            fixed = ": fixed by token id, no training moves their load" if kind == "hash" else ""
            of_kind = [row for row, other in zip(rows, self.routers, strict=True) if other == kind]
            parts += [f"{kind} layers{fixed}", Table(head, of_kind, 1), ""]
        return parts


def load_bars(load: Int64[np.ndarray, " experts"]) -> str:
    """One block character for each expert. The mean has half the height, twice the mean all of it.

    Beyond 32 experts, each character shows the largest load of a group of neighbours.
    """
    largest = np.maximum.reduceat(load, np.arange(0, len(load), _group_size(len(load))))
    mean = max(float(load.mean()), 1e-300)
    heights = np.clip(np.rint(4 * largest / mean), largest > 0, 8).astype(int)
    return "".join(_BARS[height] for height in heights)


def _group_size(num_experts: int) -> int:
    return -(-num_experts // _MOST_BARS)


def _plain(value: Any) -> Any:
    if isinstance(value, TopToken):
        return value._asdict()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value

"""`Report`: the counts and figures of every layer."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from .top_tokens import TopToken


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What `braidax.report` returns; print it, or let a notebook show it as a table.

    Arrays of numpy: counts are int64, figures float64, NaN where there was no token to average.
    Masked tokens are counted nowhere.

    - `layer_names`: one name a layer.
    - `routers`: `"hash"`, `"top-k"` or the name of another class, a layer; None if not known.
    - `num_tokens`, `dropped`, `undefined`: tokens; assignments not computed; tokens with a weight
      or score that is not finite, which are in the load but not in the means over tokens.
    - `load`: assignments of each expert, as `braidax.expert_load` counts them.
    - `max_violation`: max / mean of that load, minus 1. `batch_max_violation`: the same batch by
      batch, NaN for one without a token, which the printed mean leaves out;
      sampling alone keeps it above 0, the more so the smaller a batch is.
    - `load_entropy`: entropy of the load's shares / log(experts), 1 at perfect balance.
    - `dead_experts`: experts without load. `top_1_share`: the busiest expert's share of the load.
    - `confidence`: mean over tokens of the largest weight of one expert / the sum of the token's
      weights; what a token gives to the same expert twice adds up.
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
    top_tokens: tuple[tuple[tuple[TopToken, ...], ...], ...] | None

    @property
    def is_hash(self) -> Bool[np.ndarray, " layers"] | None:
        """Which layers are hash-routed: fixed, whatever training does. None if not known."""
        return None if self.routers is None else np.array([kind == "hash" for kind in self.routers])

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold: lists of numbers, null for NaN."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.top_tokens is not None:
            record["top_tokens"] = [
                [[token._asdict() for token in expert] for expert in layer]
                for layer in self.top_tokens
            ]
        return {name: _plain(value) for name, value in record.items()}

    # Imported late: the text is made of a Report.

    def __repr__(self) -> str:
        from .report_text import report_text

        return report_text(self)

    def _repr_html_(self) -> str:
        from .report_text import report_html

        return report_html(self)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value

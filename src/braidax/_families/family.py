"""What a family of models calls the keys of its configuration and the tensors of its layers."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

# As written in decimal: `layers.03` would be a second name of layer 3.
_NUMBER = "(0|[1-9][0-9]{0,8})"
_EXPERT = re.compile(rf"(?<=\.){_NUMBER}(?=\.)")

# Tensors by layer, as `("layers", 3)`, and in a layer by the prefix that is cut off each name.
Layers = dict[tuple[str, int], dict[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Family:
    """The names of one family. Readers and writers look names up here and nowhere else.

    Of `config.json`, in terms of the fields of `MoEConfig`:

    - `model_types`: each `model_type`, and the fields that its code has where a file is silent.
    - `keys`: the spellings of each field. `mlp_layer_types` counts by its `hash_moe`.
    - `nulls`: what null means to its own code. Any other null is an error.
    - `supported`: keys that change the maths, and the values that the library computes.

    Of tensors:

    - `prefixes`: what may stand before `layers`. `blocks`: words for the feed-forward part.
    - `spellings`: the names of each tensor, the release's first, that of transformers' modules
      last. The keys are this library's names: `gate.weight`, `selection_bias`, `table`,
      `experts.{}.gate`, `experts.{}.up`, `experts.{}.down`, the stacked `experts.gate_up` and
      `experts.down`, and `shared.gate`, `shared.up`, `shared.down`. `{}` is an expert's number.
    - `ignored`: tensors that the layer does not compute with, and why.
    - `scale_endings`: what the name of a scale ends with, in place of `.weight` or nothing.
    - `layers` is the word before a layer's number, `prediction_layers` before that of a layer of
      multi-token prediction.

    A matrix is stored as (size_out, size_in). Stacked gate rows stand before up rows.
    """

    model_types: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, tuple[str, ...]]
    nulls: Mapping[str, Any]
    supported: Mapping[str, tuple[str, ...]]
    prefixes: tuple[str, ...]
    blocks: tuple[str, ...]
    spellings: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    scale_endings: tuple[str, ...]
    layers: str = "layers"
    prediction_layers: str = "mtp"

    def layers_of(self, names: Iterable[str]) -> Layers:
        """The feed-forward tensors among `names`."""
        words = f"{self.layers}|{self.prediction_layers}"
        prefix, block = ("|".join(map(re.escape, each)) for each in (self.prefixes, self.blocks))
        pattern = re.compile(rf"((?:{prefix})({words})\.{_NUMBER}\.(?:{block})\.)(.+)")
        found: Layers = {}
        for match in filter(None, map(pattern.fullmatch, names)):
            prefix, word, number, rest = match.groups()
            found.setdefault((word, int(number)), {}).setdefault(prefix, []).append(rest)
        return found

    def meaning(self, rest: str) -> tuple[str, str] | None:
        """The library's name of a tensor, and whether it is the `"weight"` or the `"scale"`."""
        template, number = _without_number(rest)
        key, kind = self._meanings.get(template, (None, ""))
        return None if key is None else (key.replace("{}", number), kind)

    def released(self, name: str) -> str:
        """The release's spelling of the library's `name`."""
        template, number = _without_number(name)
        return self.spellings[template][0].replace("{}", number)

    @functools.cached_property
    def _meanings(self) -> dict[str, tuple[str, str]]:
        meanings = {}
        for key, names in self.spellings.items():
            for name in names:
                meanings[name] = key, "weight"
                if key.startswith(("experts.", "shared.")):
                    for ending in self.scale_endings:
                        meanings[name.removesuffix(".weight") + ending] = key, "scale"
        return meanings


@functools.lru_cache(maxsize=4096)  # layers have the same names
def _without_number(name: str) -> tuple[str, str]:
    """`name` with `{}` in place of the expert's number, and the number."""
    match = _EXPERT.search(name)
    return (name, "") if match is None else (_EXPERT.sub("{}", name, count=1), match[0])

"""What a family of models calls the tensors of its mixture-of-experts layers."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

# As written in decimal: `layers.03` would be a second name of layer 3.
_NUMBER = "(0|[1-9][0-9]{0,8})"
_EXPERT = re.compile(rf"(?<=\.){_NUMBER}(?=\.)")


class Place(NamedTuple):
    """The parts of a tensor's name: `prefix` reaches up to the layer's own part, `rest`.

    `layers` is the family's word before the number of the layer, `layer_idx`.
    """

    prefix: str
    layers: str
    layer_idx: int
    rest: str


@dataclasses.dataclass(frozen=True)
class Family:
    """The names of one family. Readers and writers look names up here and nowhere else.

    - `prefixes`: what may stand before `layers`. `blocks`: words for the feed-forward part.
    - `spellings`: the names of each tensor, the release's first, that of transformers' modules
      last. The keys are this library's names: `gate.weight`, `selection_bias`, `table`,
      `experts.{}.gate`, `experts.{}.up`, `experts.{}.down`, the stacked `experts.gate_up` and
      `experts.down`, and `shared.gate`, `shared.up`, `shared.down`. `{}` is an expert's number.
    - `ignored`: tensors that the layer does not compute with, and why.
    - `scale_endings`: what the name of a scale ends with, in place of `.weight` or nothing. A
      longer ending stands before a shorter one that it ends with.
    - `layers` is the word before a layer's number, `prediction_layers` before that of a layer of
      multi-token prediction.

    A matrix is stored as (size_out, size_in). Stacked gate rows stand before up rows.
    """

    prefixes: tuple[str, ...]
    blocks: tuple[str, ...]
    spellings: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    scale_endings: tuple[str, ...]
    layers: str = "layers"
    prediction_layers: str = "mtp"

    def place(self, name: str) -> Place | None:
        """The parts of `name`, None if it is no feed-forward tensor."""
        match = self._pattern.fullmatch(name)
        return None if match is None else Place(match[1], match[2], int(match[3]), match[4])

    def meaning(self, rest: str) -> tuple[str, str] | None:
        """The library's name of a tensor, and whether it is the `"weight"` or the `"scale"`."""
        template, number = _without_number(rest)
        key, kind = self._meanings.get(template, (None, ""))
        return None if key is None else (key.replace("{}", number), kind)

    def scaled(self, name: str) -> tuple[str, ...]:
        """The weights whose scale a tensor of this name may be."""
        for ending in self.scale_endings:
            if name.endswith(ending):
                stem = name.removesuffix(ending)
                return f"{stem}.weight", stem
        return ()

    def released(self, name: str) -> str:
        """The release's spelling of the library's `name`."""
        return self._spelled(name, 0)

    def in_transformers(self, name: str) -> str:
        """The spelling of the library's `name` in transformers' modules."""
        return self._spelled(name, -1)

    def released_prefix(self, layer_idx: int) -> str:
        """What the release's names of a layer begin with."""
        return f"{self.prefixes[0]}{self.layers}.{layer_idx}.{self.blocks[0]}."

    def _spelled(self, name: str, which: int) -> str:
        template, number = _without_number(name)
        return self.spellings[template][which].replace("{}", number)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        prefix, block = ("|".join(map(re.escape, words)) for words in (self.prefixes, self.blocks))
        layers = f"{self.layers}|{self.prediction_layers}"
        return re.compile(rf"((?:{prefix})({layers})\.{_NUMBER}\.(?:{block})\.)(.+)")

    @functools.cached_property
    def _meanings(self) -> dict[str, tuple[str, str]]:
        meanings = {
            name: (key, "weight") for key, names in self.spellings.items() for name in names
        }
        for name, (key, _) in list(meanings.items()):
            if key.startswith(("experts.", "shared.")):
                stem = name.removesuffix(".weight")
                meanings |= {stem + ending: (key, "scale") for ending in self.scale_endings}
        return meanings


@functools.lru_cache(maxsize=4096)  # layers have the same names
def _without_number(name: str) -> tuple[str, str]:
    """`name` with `{}` in place of the expert's number, and the number."""
    match = _EXPERT.search(name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{}}{name[match.end() :]}", match[0]

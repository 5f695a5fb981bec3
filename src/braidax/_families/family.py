"""What a family of models calls the keys of its configuration and the tensors of its layers."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .layer_rules import LayerRule, no_dense_layers

# As written in decimal: `layers.03` would be a second name of layer 3.
_NUMBER = "(0|[1-9][0-9]{0,8})"
_EXPERT = re.compile(rf"(?<=\.){_NUMBER}(?=\.)")

# What most configurations and releases have in common.
SIZES = {
    "hidden_size": ("hidden_size",),
    "num_experts_per_token": ("num_experts_per_tok",),
    "vocab_size": ("vocab_size",),
}
STACKED_EXPERTS = {
    "experts.gate_up": ("experts.gate_up_proj",),
    "experts.down": ("experts.down_proj",),
}
EXPERTS = {
    "experts.{}.gate": ("experts.{}.gate_proj.weight",),
    "experts.{}.up": ("experts.{}.up_proj.weight",),
    "experts.{}.down": ("experts.{}.down_proj.weight",),
    **STACKED_EXPERTS,
}

_BLOCKS = "_blocks"  # the 4-bit numbers of a stack, as GPT-OSS has them

# The matrices of one network that an array is made of.
_PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}

# Tensors by layer, as `("layers", 3)`, and in a layer by the prefix that is cut off each name.
Layers = dict[tuple[str, int], dict[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Family:
    """The names of one family. Readers and writers look names up here and nowhere else.

    Of `config.json`, in terms of the fields of `MoEConfig`:

    - `model_types`: each `model_type`, and the fields that its code has where a file is silent.
    - `keys`: the spellings of each field. `mlp_layer_types` counts by its `hash_moe`.
    - `nulls`: what null means to its own code. Any other null is an error.
    - `values`: keys whose words say what is computed, each word with the fields that it stands for.
      Any other word is an error. The first is that of a file that is silent.
    - `dense_layers`: the layers that are no mixtures.

    Of tensors:

    - `prefix`: what stands before `layers` in a release. A reader takes any.
    - `blocks`: words for the feed-forward part, the release's first; none where the shared expert
      stands beside that part.
    - `spellings`: the names of each tensor, the release's first, that of transformers' modules
      last. The keys are this library's names: `gate.weight`, `gate.bias`, `selection_bias`,
      `table`, `experts.{}.gate`, `experts.{}.up`, `experts.{}.down`, the stacked
      `experts.gate_up` and `experts.down` with their `_bias`, `shared.gate`, `shared.up`,
      `shared.down` or `shared.gate_up`, `shared_gate`, `latent.down` and `latent.up`. `{}` is an
      expert's number.
    - `ignored`: tensors that the layer does not compute with, and why.
    - `scale_endings`: what the name of a scale ends with, in place of `.weight` or nothing.
    - `stored_transposed`: a stack in floating point is stored as (size_in, size_out).
    - `interleaved`: rows of a stack take turns, gate before up. Else all gate rows come first.
    - `quantizations`: the formats of a release that this library can write, `"fp4"` or `"fp8"`.
    - `selection_bias_rows`: whether that bias is stored as one row, `(1, experts)`.
    - `layers` is the word before a layer's number, `prediction_layers` before that of a layer of
      multi-token prediction.

    A matrix is stored as (size_out, size_in).
    """

    model_types: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, tuple[str, ...]]
    blocks: tuple[str, ...]
    spellings: Mapping[str, tuple[str, ...]]
    nulls: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Mapping[str, Any]]] = dataclasses.field(
        default_factory=lambda: {"hidden_act": {"silu": {}}}
    )
    dense_layers: LayerRule = no_dense_layers
    prefix: str = "model."
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale_endings: tuple[str, ...] = (".scale", ".weight_scale_inv", "_scale_inv")
    stored_transposed: bool = False
    interleaved: bool = False
    selection_bias_rows: bool = False
    quantizations: tuple[str, ...] = ()
    layers: str = "layers"
    prediction_layers: str = "mtp"

    @property
    def model_type(self) -> str:
        """The first of `model_types`, for messages."""
        return next(iter(self.model_types))

    def layers_of(self, names: Iterable[str]) -> Layers:
        """The feed-forward tensors among `names`."""
        if not self.blocks:  # a layer's own name comes before those of its parts
            parts = {name.split(".")[0] for names in self.spellings.values() for name in names}
            block = rf"(?=(?:{'|'.join(sorted(parts))})\.)"
        else:
            block = "|".join(rf"{re.escape(word)}\." for word in self.blocks)
        words = f"{self.layers}|{self.prediction_layers}"
        pattern = re.compile(rf"((?:.*\.)?({words})\.{_NUMBER}\.(?:{block}))(.+)")
        found: Layers = {}
        for match in filter(None, map(pattern.fullmatch, names)):
            prefix, word, number, rest = match.groups()
            if f".{self.prediction_layers}." in f".{prefix}":  # as in `mtp.layers.0.`
                word = self.prediction_layers
            found.setdefault((word, int(number)), {}).setdefault(prefix, []).append(rest)
        return found

    def meaning(self, rest: str) -> tuple[str, str] | None:
        """The library's name of a tensor, and whether it is the `"weight"` or the `"scale"`."""
        template, number = _without_number(rest)
        key, kind = self._meanings.get(template, (None, ""))
        return None if key is None else (key.replace("{}", number), kind)

    def released_prefix(self, layer_idx: int) -> str:
        """What the release's names of a layer begin with."""
        return ".".join((f"{self.prefix}{self.layers}", str(layer_idx), *self.blocks[:1], ""))

    def released(self, name: str) -> str:
        """The release's spelling of the library's `name`."""
        template, number = _without_number(name)
        return self.spellings[template][0].replace("{}", number)

    def released_blocks(self, name: str) -> str:
        """The release's spelling of the stack `name` in 4 bits."""
        return self.released(name) + _BLOCKS

    def has(self, name: str) -> bool:
        """Whether the family has a tensor of the library's `name`."""
        return _without_number(name)[0] in self.spellings

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors that the array `name` is stored as matrix by matrix, such as
        `experts.{}.gate` and `experts.{}.up`; none if the family has only a stack."""
        owner, _, kind = name.partition(".")
        owner = "experts.{}" if owner == "experts" else owner
        keys = (f"{owner}.{part}" for part in _PARTS.get(kind, ()))
        return tuple(key for key in keys if key in self.spellings)

    def scales_of(self, name: str) -> tuple[str, ...]:
        """What the scales of the tensor `name` may be called, the release's word first."""
        if name.endswith(_BLOCKS):
            return (name.removesuffix(_BLOCKS) + "_scales",)
        stem = name.removesuffix(".weight")
        return tuple(stem + ending for ending in self.scale_endings)

    @functools.cached_property
    def _meanings(self) -> dict[str, tuple[str, str]]:
        meanings = {}
        for key, names in self.spellings.items():
            names = [*names, *(name + _BLOCKS for name in names if key in STACKED_EXPERTS)]
            for name in names:
                meanings[name] = key, "weight"
                if key.startswith(("experts.", "shared.")):
                    meanings |= dict.fromkeys(self.scales_of(name), (key, "scale"))
        return meanings


def shared_expert(word: str) -> dict[str, tuple[str, ...]]:
    """The spellings of a shared expert that is called `word`."""
    return {f"shared.{part}": (f"{word}.{part}_proj.weight",) for part in ("gate", "up", "down")}


@functools.lru_cache(maxsize=4096)  # layers have the same names
def _without_number(name: str) -> tuple[str, str]:
    """`name` with `{}` in place of the expert's number, and the number."""
    match = _EXPERT.search(name)
    return (name, "") if match is None else (_EXPERT.sub("{}", name, count=1), match[0])

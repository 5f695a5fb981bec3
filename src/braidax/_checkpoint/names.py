"""Name tables: which tensors of a checkpoint make up one layer, in any released spelling."""

import pathlib
import re
import warnings
from collections.abc import Iterable
from typing import NamedTuple

from .errors import mistake
from .index import Checkpoint

# As written in decimal: `layers.03` would be a second name of layer 3.
_INTEGER = "0|[1-9][0-9]{0,8}"
_PREFIX = re.compile(rf"((?:model\.)?layers\.({_INTEGER})\.(?:ffn|mlp)\.)(.+)")
_STEM = re.compile(
    rf"(?:experts\.(?P<expert>{_INTEGER})|(?P<fused>experts)|(?P<shared>shared_experts))"
    r"\.(?P<matrix>gate_up_proj|gate_proj|up_proj|down_proj|w[123])"
)
_MATRICES = {
    **{"w1": "gate", "w3": "up", "w2": "down"},
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up"},
}
# The longer endings first: `.weight_scale_inv` ends in `_scale_inv` too.
_ENDINGS = {
    ".weight_scale_inv": "scale",
    ".scale": "scale",
    "_scale_inv": "scale",
    ".weight": "weight",
    "": "weight",
}
_GATE = {
    "gate.weight": "weight",
    "gate.bias": "bias",
    "gate.e_score_correction_bias": "bias",
    "gate.tid2eid": "table",
    "gate.bias_vl": "image_bias",
}
SEPARATE, FUSED = ("gate", "up", "down"), ("gate_up", "down")


class MatrixNames(NamedTuple):
    """The tensor of a matrix and, if it has one, that of its scales."""

    weight: str
    scale: str | None


class LayerNames(NamedTuple):
    """The tensors of one layer by role, with the spellings of this checkpoint.

    `gate` has the keys `weight`, `bias` and `table`, the last two where present. `experts` maps
    `(expert, matrix)`, the expert being None for stacked matrices, and `shared` maps `matrix`;
    the matrices are those of `SEPARATE` or, stacked, `FUSED`.
    """

    prefix: str
    gate: dict[str, str]
    experts: dict[tuple[int | None, str], MatrixNames]
    shared: dict[str, MatrixNames]


def layer_tensors(names: Iterable[str]) -> dict[int, dict[str, list[str]]]:
    """Names of feed-forward tensors by layer and by the prefix that they begin with."""
    layers: dict[int, dict[str, list[str]]] = {}
    for name in names:
        match = _PREFIX.fullmatch(name)
        if match is not None:
            prefix, layer_idx, rest = match.groups()
            layers.setdefault(int(layer_idx), {}).setdefault(prefix, []).append(rest)
    return layers


def find_layer(checkpoint: Checkpoint, layer_idx: int) -> LayerNames:
    """The names that make up layer `layer_idx`.

    A bias beside a table, and a bias for image tokens, are left out with a warning: the layer
    computes without them.

    **Raises:** `ValueError` naming file and tensor, for a layer that is not there or has no
    router, two spellings of one tensor, and a tensor whose meaning is unknown.
    """
    layers = layer_tensors(checkpoint.files)
    what = f"layers.{layer_idx}"
    if layer_idx not in layers:
        found = f"the layers {min(layers)} to {max(layers)}" if layers else "no layer at all"
        raise mistake(checkpoint.source, what, "be in the checkpoint, with an ffn or mlp", found)
    prefix, rests = next(iter(layers[layer_idx].items()))
    path = checkpoint.files[prefix + rests[0]]
    if len(layers[layer_idx]) > 1:
        raise mistake(path, what, "have one prefix", " and ".join(sorted(layers[layer_idx])))
    gate: dict[str, str] = {}
    matrices: dict[tuple[str, int | None, str], dict[str, str]] = {}
    for rest in rests:
        name, role = prefix + rest, _matrix_role(rest)
        if rest in _GATE:
            _put(checkpoint.files[name], gate, _GATE[rest], name)
        elif role is not None:
            owner, expert, matrix, kind = role
            found = matrices.setdefault((owner, expert, matrix), {})
            _put(checkpoint.files[name], found, kind, name)
        elif "gate.weight" in rests:
            raise mistake(
                checkpoint.files[name], name, "have a known meaning", "a name in no table"
            )
    if "weight" not in gate:
        found = f"a dense layer: {', '.join(sorted(rests)[:4])}"
        raise mistake(path, f"{prefix}gate.weight", "be there, in a layer of experts", found)
    _leave_out(gate)
    pairs = {key: _pair(checkpoint, found) for key, found in matrices.items()}
    experts = {key[1:]: pair for key, pair in pairs.items() if key[0] == "experts"}
    shared = {key[2]: pair for key, pair in pairs.items() if key[0] == "shared"}
    if len({expert is None for expert, _ in experts}) > 1:
        raise mistake(path, f"{prefix}experts", "be stacked or one by one", "both")
    return LayerNames(prefix, gate, experts, shared)


def _matrix_role(rest: str) -> tuple[str, int | None, str, str] | None:
    """Owner, expert, matrix, and whether it is the weight or the scale."""
    ending = next(ending for ending in _ENDINGS if rest.endswith(ending))
    match = _STEM.fullmatch(rest.removesuffix(ending))
    if match is None:
        return None
    expert, matrix = match["expert"], _MATRICES[match["matrix"]]
    if (matrix in FUSED if match["fused"] else matrix in SEPARATE) and (ending or match["fused"]):
        owner = "shared" if match["shared"] else "experts"
        return owner, None if expert is None else int(expert), matrix, _ENDINGS[ending]
    return None


def _put(path: pathlib.Path, found: dict[str, str], kind: str, name: str) -> None:
    if kind in found:
        raise mistake(path, name, f"be the only one of its kind, next to {found[kind]}", "both")
    found[kind] = name


def _pair(checkpoint: Checkpoint, found: dict[str, str]) -> MatrixNames:
    if "weight" not in found:
        path = checkpoint.files[found["scale"]]
        raise mistake(path, found["scale"], "scale a weight that is there", "no such weight")
    return MatrixNames(found["weight"], found.get("scale"))


def _leave_out(gate: dict[str, str]) -> None:
    ignored = {"image_bias": "it is for image tokens"}
    if "table" in gate:
        ignored["bias"] = "the layer has a hash table, which selects alone"
    for kind in ignored.keys() & gate.keys():
        warnings.warn(f"`{gate.pop(kind)}` is ignored: {ignored[kind]}.", stacklevel=5)

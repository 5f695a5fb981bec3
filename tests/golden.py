"""Golden files: what the PyTorch reference computed, kept so that no test here needs torch.

`nox -s parity -- --write-golden` writes them; every other `nox -s parity` checks that the
reference still gives them. `top_k_softmax` comes from transformers' block with its router's last
step replaced by the released rule: transformers has no softmax scores.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


@dataclasses.dataclass
class GoldenBlock:
    """One block: its input, and what the reference answered, forward and backward."""

    config: dict[str, Any]  # the arguments of `MoEConfig`
    layer_idx: int
    versions: dict[str, str]
    tensors: dict[str, np.ndarray]
    hidden_states: np.ndarray
    input_ids: np.ndarray
    cotangent: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    output: np.ndarray
    hidden_states_gradient: np.ndarray
    gradients: dict[str, np.ndarray]


@dataclasses.dataclass
class GoldenFamily:
    """One layer of a family: its file and its configuration, and what transformers computed."""

    config: dict[str, Any]  # the `config.json`
    layer_idx: int
    versions: dict[str, str]
    tensors: dict[str, np.ndarray]  # by the names of the file, in float16 without loss
    hidden_states: np.ndarray
    output: np.ndarray


@dataclasses.dataclass
class GoldenRouter:
    """A router at a released model's size. Its input is rebuilt by `counted`: 7 MB would be too
    much to keep."""

    config: dict[str, Any]
    versions: dict[str, str]
    smallest_gap: float  # between the last biased score selected and the next, in float64
    indices: np.ndarray
    weights: np.ndarray


def counted(shape: tuple[int, ...], stream: int) -> np.ndarray:
    """Float32 numbers of variance 1, the same on every platform and numpy version: numpy keeps
    the raw stream of a bit generator, and all that follows is exact."""
    raw = np.random.PCG64(stream).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(48)).astype(np.float64) / 2**15 - 1  # multiples of 2^-15 in [-1, 1)
    return (uniform * 1.75).astype(np.float32).reshape(shape)


def router_inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate weight, selection bias and 1,024 hidden states of a `GoldenRouter`."""
    experts, hidden = config["num_experts"], config["hidden_size"]
    # A power of two: exact.
    weight = counted((experts, hidden), 1) * np.float32(2**-6)
    return weight, counted((experts,), 2) * np.float32(2**-4), counted((1024, hidden), 3)


def save(name: str, golden: GoldenBlock | GoldenRouter | GoldenFamily) -> None:
    """One compressed file: arrays under their field's name, everything else as JSON."""
    arrays, rest = {}, {}
    for field, value in vars(golden).items():
        if isinstance(value, np.ndarray):
            arrays[field] = value
        elif field in ("tensors", "gradients"):
            arrays |= {f"{field}/{key}": array for key, array in value.items()}
        else:
            rest[field] = value
    (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", json=json.dumps(rest), **arrays)


def load(name: str) -> GoldenBlock | GoldenRouter | GoldenFamily:
    """The file that `save` wrote."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        fields = json.loads(str(file["json"]))
        for key in set(file.files) - {"json"}:
            field, _, tensor = key.partition("/")
            if tensor:
                fields.setdefault(field, {})[tensor] = file[key]
            else:
                fields[field] = file[key]
    if "gradients" in fields:
        return GoldenBlock(**fields)
    return (GoldenFamily if "tensors" in fields else GoldenRouter)(**fields)


DECODED = FOLDER / "decoded.json"


def digest(numbers: np.ndarray) -> str:
    """SHA-256 of the bytes, every NaN as zero: whose bits are nobody's business."""
    kept = np.where(np.isnan(numbers.astype(np.float32)), np.zeros((), numbers.dtype), numbers)
    return hashlib.sha256(np.ascontiguousarray(kept).tobytes()).hexdigest()

"""What is measured: sizes, loads and the arrays that go with them. braidax is not imported here."""

from functools import partial
from typing import NamedTuple

import numpy as np

LIMIT = 10.0  # of the clamp in the activation
LOADS = ("uniform", "zipf", "same")
DIRECTIONS = ("forward", "forward+backward")
INFERENCE = ("decode", "prefill", "prefill of Q")  # groups without a backward pass
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class Workload(NamedTuple):
    """One layer and one batch.

    `load`: `"uniform"` (distinct random experts), `"zipf"` (expert `e` is wanted in proportion to
    `1 / (e + 1)`) or `"same"` (every token goes to the same experts).
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    tokens: int
    dtype: str = "float32"
    load: str = "uniform"

    @property
    def rows(self) -> int:
        """Assignments: what the experts compute."""
        return self.tokens * self.experts_per_token

    @property
    def expert_size(self) -> int:
        """Numbers in the matrices of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def products(self, direction: str) -> list[tuple[int, int, int]]:
        """The matrix products of all rows, `(m, k, n)` for `(m, k) @ (k, n)`. The backward pass
        has two for each one forward: of the rows and of the weights."""
        forward = [
            (self.rows, self.hidden, 2 * self.intermediate),
            (self.rows, self.intermediate, self.hidden),
        ]
        backward = [shape for m, k, n in forward for shape in ((m, n, k), (k, m, n))]
        return forward if direction == "forward" else forward + backward

    def flops(self, direction: str) -> int:
        """Multiplications and additions in these products."""
        return sum(2 * m * k * n for m, k, n in self.products(direction))


_S = (512, 256, 64, 6)
_Q = (2048, 768, 128, 8)  # Qwen3-30B-A3B
GROUPS: dict[str, tuple[Workload, ...]] = {
    "layers": (
        Workload("S", *_S, 4096),
        Workload("M", 1024, 512, 32, 4, 2048),
        Workload("Many", 256, 128, 256, 6, 8192),
        Workload("L", 4096, 2048, 16, 6, 512),
    ),
    "decode": tuple(Workload(f"P{tokens}", *_S, tokens) for tokens in (1, 8, 64)),
    "prefill": tuple(Workload(f"S {n} tokens", *_S, n) for n in (8, 16, 32, 64, 128, 256, 512)),
    "prefill of Q": tuple(Workload(f"Q {n} tokens", *_Q, n) for n in (1, 8, 32, 128, 512)),
    "bfloat16": (Workload("S bfloat16", *_S, 4096, "bfloat16"),),
    "skew": tuple(Workload(f"S {load}", *_S, 4096, load=load) for load in LOADS),
    "tokens": tuple(Workload(f"{k}k tokens", *_S, 1024 * k) for k in (1, 2, 4, 8, 16, 32)),
    "experts": tuple(
        Workload(f"{experts} experts", 512, 256, experts, 6, 4096)
        for experts in (8, 32, 64, 128, 512)
    ),
    "accelerator": tuple(
        Workload(f"V4-Flash {tokens}", 4096, 2048, 256, 6, tokens, "bfloat16")
        for tokens in (512, 4096, 16384)
    ),
}


class Arrays(NamedTuple):
    """In numpy and float32, indices apart, so that every framework gets the same numbers."""

    hidden_states: np.ndarray
    gate: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    cotangent: np.ndarray


def make_indices(workload: Workload, rng: np.random.Generator) -> np.ndarray:
    """The experts of every token, int32 `(tokens, experts_per_token)`, distinct."""
    experts = workload.experts
    popularity = {
        "uniform": np.zeros(experts),
        "zipf": -np.log(np.arange(1, experts + 1)),
        "same": -1e3 * np.arange(experts),
    }[workload.load]
    # The largest of perturbed logits: a draw without replacement.
    perturbed = popularity + rng.gumbel(size=(workload.tokens, experts))
    return np.argsort(-perturbed, axis=1)[:, : workload.experts_per_token].astype(np.int32)


def make_arrays(workload: Workload) -> Arrays:
    """Random arrays of unit activations; the experts of a token are distinct."""
    rng = np.random.default_rng(0)
    _, hidden, intermediate, experts, slots, tokens, *_ = workload
    indices = make_indices(workload, rng)
    normal = partial(rng.standard_normal, dtype=np.float32)
    return Arrays(
        hidden_states=normal((tokens, hidden)),
        gate=normal((experts, hidden)) * hidden**-0.5,
        gate_up=normal((experts, 2, intermediate, hidden)) * hidden**-0.5,
        down=normal((experts, intermediate, hidden)) * intermediate**-0.5,
        indices=indices,
        weights=rng.random((tokens, slots), np.float32),
        cotangent=normal((tokens, hidden)),
    )


def touched_bytes(workload: Workload, arrays: Arrays) -> int:
    """Bytes of the weights that a forward pass must read: those of every expert with a row."""
    touched = np.unique(arrays.indices).size
    return touched * workload.expert_size * _ITEM_BYTES[workload.dtype]

"""What is measured: sizes, loads and the arrays that go with them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._routing import Routing


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
    def forward_flops(self) -> int:
        """Of the two matrix products of every row, a multiplication and an addition apart."""
        return 2 * self.rows * 3 * self.hidden * self.intermediate

    @property
    def touched_bytes(self) -> int:
        """Of the weights that a forward pass reads at least once, if every row had an expert of
        its own."""
        touched = min(self.rows, self.experts)
        return touched * 3 * self.hidden * self.intermediate * jnp.dtype(self.dtype).itemsize


_S = (512, 256, 64, 6)
GROUPS: dict[str, tuple[Workload, ...]] = {
    "layers": (
        Workload("S", *_S, 4096),
        Workload("M", 1024, 512, 32, 4, 2048),
        Workload("Many", 256, 128, 256, 6, 8192),
        Workload("L", 4096, 2048, 16, 6, 512),
    ),
    "decode": tuple(Workload(f"P{tokens}", *_S, tokens) for tokens in (1, 8, 64)),
    "bfloat16": (Workload("S bf16", *_S, 4096, "bfloat16"),),
    "skew": tuple(
        Workload(f"S {load}", *_S, 4096, load=load) for load in ("uniform", "zipf", "same")
    ),
    "tokens": tuple(
        Workload(f"{tokens // 1024}k tokens", *_S, tokens)
        for tokens in (1024, 2048, 4096, 8192, 16384, 32768)
    ),
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
    """A workload's arrays, in numpy float32 so that every framework gets the same numbers."""

    hidden_states: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    cotangent: np.ndarray


def make_arrays(workload: Workload) -> Arrays:
    """Random arrays of unit activations; the experts of a token are distinct."""
    rng = np.random.default_rng(0)
    hidden, intermediate = workload.hidden, workload.intermediate
    tokens, experts, slots = workload.tokens, workload.experts, workload.experts_per_token
    popularity = {
        "uniform": np.zeros(experts),
        "zipf": -np.log(np.arange(1, experts + 1)),
        "same": -1e3 * np.arange(experts),
    }[workload.load]
    # The largest of perturbed logits: a draw without replacement.
    perturbed = popularity + rng.gumbel(size=(tokens, experts))
    return Arrays(
        hidden_states=rng.standard_normal((tokens, hidden), np.float32),
        gate_up=rng.standard_normal((experts, 2 * intermediate, hidden), np.float32) * hidden**-0.5,
        down=rng.standard_normal((experts, intermediate, hidden), np.float32) * intermediate**-0.5,
        indices=np.argsort(-perturbed, axis=1)[:, :slots].astype(np.int32),
        weights=rng.random((tokens, slots), np.float32),
        cotangent=rng.standard_normal((tokens, hidden), np.float32),
    )


def make_routing(arrays: Arrays, num_experts: int) -> Routing:
    """The assignment as a `Routing` to replay, so that only the experts are measured."""
    unused = jnp.zeros((len(arrays.indices), num_experts))
    return Routing(
        indices=jnp.asarray(arrays.indices),
        weights=jnp.asarray(arrays.weights),
        scores=unused,
        logits=unused,
        mask=None,
        dropped=jnp.zeros((), jnp.int32),
    )


def device_text() -> str:
    """What JAX runs on."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}, platform {devices[0].platform}"

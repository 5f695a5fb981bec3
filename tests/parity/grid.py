"""The table of compared blocks: a new shape or rule is one more row."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One block and its input.

    - `clips`: activations as wide as `limit`, so that gate and up do reach the clamp; else an
      eighth of it, so that none does.
    - `load`: "even", "half idle" (half of the experts get no token) or "one" (all tokens go to
      one expert, or the same `per_token` experts where a top-k router cannot repeat one).
    - `bias`: standard deviation of the selection bias in units of a typical score. Where it is
      not 0 it must change the selection of some token.
    - `seed`: one that leaves no token's selection and no activation's clamp to rounding, which
      the test asserts.

    Hash tables name an expert twice in a third of their rows.
    """

    kind: str
    score: str
    hidden: int
    intermediate: int
    experts: int
    per_token: int
    batch: tuple[int, int]
    scaling: float
    limit: float
    clips: bool
    load: str = "even"
    bias: float = 0.0
    seed: int = 0

    @property
    def weights_are_constant(self) -> bool:
        """Each token has one distinct expert: normalized, its weights do not depend on the gate."""
        one_expert = self.per_token == 1 or (self.kind == "hash" and self.load == "one")
        return one_expert and self.score != "softmax"

    def __str__(self) -> str:
        batch = "x".join(map(str, self.batch))
        text = f"{self.hidden}x{self.intermediate} {self.experts}/{self.per_token} {batch}"
        text += f" s={self.scaling:g} limit={self.limit:g}{' clips' if self.clips else ''}"
        return text + (f" bias={self.bias:g}" if self.bias else "") + f" {self.load}"


VOCAB = 64

# kind, score, hidden, intermediate, experts, per token, batch, scaling, limit, clips, load, bias
GRID = [
    # Small sizes, one dimension after another.
    Case("top_k", "sqrtsoftplus", 32, 16, 4, 1, (1, 1), 1.0, 0.5, True, "even", 2.0),
    Case("top_k", "sqrtsoftplus", 32, 16, 4, 2, (1, 2), 1.0, 1.0, True, "even", 1.0),
    Case("top_k", "sqrtsoftplus", 32, 16, 4, 4, (1, 17), 1.0, 10.0, False),
    Case("top_k", "sqrtsoftplus", 32, 16, 8, 2, (2, 33), 1.5, 10.0, True, "even", 0.2),
    Case("top_k", "sqrtsoftplus", 32, 24, 8, 8, (3, 7), 2.5, 0.5, True),
    Case("top_k", "sqrtsoftplus", 48, 20, 12, 3, (2, 50), 1.25, 2.0, True, "even", 0.3),
    Case("top_k", "sqrtsoftplus", 64, 32, 16, 1, (1, 128), 2.0, 4.0, True, "even", 0.2, seed=1),
    Case("top_k", "sqrtsoftplus", 64, 32, 16, 4, (4, 32), 1.5, 7.0, True, "even", 0.2, seed=1),
    Case("top_k", "sqrtsoftplus", 64, 32, 16, 6, (1, 511), 1.5, 10.0, True, "even", 0.1, seed=1),
    Case("top_k", "sqrtsoftplus", 96, 16, 32, 8, (3, 171), 2.5, 3.0, True, "even", 0.1),
    Case("top_k", "sqrtsoftplus", 100, 12, 60, 5, (1, 99), 1.1, 5.0, True, "even", 0.1),
    Case("top_k", "sqrtsoftplus", 128, 64, 8, 2, (2, 64), 1.5, 10.0, False, "even", 0.2),
    Case("top_k", "sqrtsoftplus", 128, 16, 64, 6, (1, 513), 1.5, 10.0, True, "even", 0.1),
    Case("top_k", "sqrtsoftplus", 256, 32, 32, 7, (2, 40), 1.75, 1.5, True, "even", 0.2),
    Case("hash", "sqrtsoftplus", 32, 16, 4, 1, (1, 1), 1.0, 0.5, True),
    Case("hash", "sqrtsoftplus", 32, 16, 4, 2, (1, 3), 1.0, 1.0, True),
    Case("hash", "sqrtsoftplus", 32, 16, 4, 4, (1, 17), 2.5, 10.0, False),
    Case("hash", "sqrtsoftplus", 32, 16, 8, 2, (2, 33), 1.5, 10.0, True),
    Case("hash", "sqrtsoftplus", 48, 20, 12, 3, (2, 50), 1.25, 2.0, True),
    Case("hash", "sqrtsoftplus", 64, 32, 16, 6, (1, 511), 1.5, 10.0, True),
    Case("hash", "sqrtsoftplus", 96, 16, 32, 8, (3, 171), 2.5, 3.0, True),
    Case("hash", "sqrtsoftplus", 128, 16, 64, 6, (1, 513), 1.5, 10.0, True, seed=1),
    Case("hash", "sqrtsoftplus", 256, 32, 32, 5, (2, 40), 1.75, 1.5, True),
    # The other scores.
    Case("top_k", "sigmoid", 32, 16, 4, 1, (1, 9), 1.0, 0.5, True, "even", 1.0),
    Case("top_k", "sigmoid", 32, 16, 8, 2, (2, 33), 1.5, 10.0, True, "even", 0.3),
    Case("top_k", "sigmoid", 64, 32, 16, 4, (4, 32), 2.5, 7.0, True, "even", 0.2, seed=1),
    Case("top_k", "sigmoid", 64, 24, 64, 8, (1, 257), 2.5, 10.0, False, "even", 0.1),
    Case("top_k", "sigmoid", 512, 16, 96, 6, (1, 100), 1.5, 2.0, True, "even", 0.1),
    Case("hash", "sigmoid", 32, 16, 8, 2, (2, 33), 1.5, 10.0, True),
    Case("hash", "sigmoid", 64, 32, 16, 4, (4, 32), 2.5, 7.0, True),
    Case("hash", "sigmoid", 512, 16, 96, 6, (1, 100), 1.0, 2.0, True),
    Case("top_k", "softmax", 32, 16, 4, 1, (1, 9), 1.0, 0.5, True, "even", 1.0),
    Case("top_k", "softmax", 32, 16, 8, 2, (2, 33), 1.5, 10.0, True, "even", 0.5),
    Case("top_k", "softmax", 64, 32, 16, 4, (4, 32), 2.5, 7.0, True, "even", 0.5, seed=1),
    Case("top_k", "softmax", 64, 24, 64, 8, (1, 257), 2.5, 10.0, False, "even", 0.5),
    Case("top_k", "softmax", 512, 16, 96, 6, (1, 100), 1.5, 2.0, True, "even", 0.5),
    Case("hash", "softmax", 32, 16, 8, 2, (2, 33), 1.5, 10.0, True),
    Case("hash", "softmax", 64, 32, 16, 4, (4, 32), 2.5, 7.0, True),
    Case("hash", "softmax", 512, 16, 96, 6, (1, 100), 1.0, 2.0, True),
    # Loads at the extremes.
    Case("top_k", "sqrtsoftplus", 32, 16, 8, 1, (1, 65), 1.5, 10.0, True, "one", 0.2),
    Case("top_k", "sqrtsoftplus", 32, 16, 16, 4, (1, 300), 1.5, 1.0, True, "one", 0.2),
    Case("top_k", "sigmoid", 64, 16, 32, 1, (2, 100), 2.5, 5.0, True, "one", 0.2),
    Case("top_k", "softmax", 64, 16, 32, 1, (2, 100), 1.0, 5.0, True, "one", 0.2),
    Case("hash", "sqrtsoftplus", 32, 16, 8, 1, (1, 65), 1.5, 10.0, True, "one"),
    Case("hash", "sqrtsoftplus", 64, 16, 64, 6, (1, 130), 1.5, 10.0, True, "one"),
    Case("hash", "sigmoid", 32, 16, 8, 4, (1, 513), 2.5, 2.0, True, "one"),
    Case("hash", "softmax", 32, 16, 8, 3, (2, 31), 1.5, 2.0, True, "one"),
    Case("top_k", "sqrtsoftplus", 64, 16, 32, 4, (2, 100), 1.5, 10.0, True, "half idle", 0.2),
    Case("top_k", "sigmoid", 48, 16, 16, 2, (1, 77), 2.0, 0.5, True, "half idle", 0.2),
    Case("top_k", "softmax", 48, 16, 16, 2, (1, 77), 2.0, 0.5, True, "half idle", 0.2),
    Case("hash", "sqrtsoftplus", 64, 16, 32, 4, (2, 100), 1.5, 10.0, True, "half idle"),
    Case("hash", "sigmoid", 48, 16, 16, 2, (1, 77), 2.0, 0.5, True, "half idle"),
    # Wide, and with the experts of the released models.
    Case("top_k", "sqrtsoftplus", 1024, 16, 64, 8, (1, 64), 2.5, 6.0, True, "even", 0.1),
    Case("top_k", "sqrtsoftplus", 2048, 16, 16, 2, (2, 20), 1.5, 10.0, True, "even", 0.2),
    Case("top_k", "sqrtsoftplus", 4096, 16, 8, 2, (1, 33), 1.5, 10.0, True, "even", 0.2),
    Case("top_k", "sqrtsoftplus", 4096, 4, 128, 6, (1, 48), 1.5, 10.0, True, "even", 0.1),
    Case("top_k", "sqrtsoftplus", 512, 8, 256, 6, (1, 200), 1.5, 10.0, True, "even", 0.1),
    Case("top_k", "sqrtsoftplus", 896, 6, 384, 6, (1, 200), 2.5, 10.0, True, "even", 0.1),
    Case("top_k", "sigmoid", 896, 8, 256, 8, (1, 200), 2.5, 10.0, True, "even", 0.1),
    Case("hash", "sqrtsoftplus", 2048, 16, 16, 2, (2, 20), 1.5, 10.0, True),
    Case("hash", "sqrtsoftplus", 4096, 4, 128, 6, (1, 48), 1.5, 10.0, True),
    Case("hash", "sqrtsoftplus", 512, 8, 256, 6, (1, 200), 1.5, 10.0, True),
    Case("hash", "sqrtsoftplus", 896, 6, 384, 6, (1, 200), 2.5, 10.0, True),
    Case("hash", "softmax", 896, 6, 384, 8, (1, 200), 2.5, 10.0, False),
]


def selection_bias(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Random, plus whatever moves the tokens where `case.load` wants them."""
    typical = {"sqrtsoftplus": 1.0, "sigmoid": 0.5, "softmax": 1 / case.experts}[case.score]
    bias = typical * case.bias * rng.standard_normal(case.experts)
    if case.load == "one":
        bias[: case.per_token] += 10.0  # more than any score here
    elif case.load == "half idle":
        bias[case.experts // 2 :] -= 10.0
    return bias.astype(np.float32)


def hash_table(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Random experts, with replacement; every third row certainly repeats its first."""
    used = {"even": case.experts, "half idle": case.experts // 2, "one": 1}[case.load]
    table = rng.integers(0, used, (VOCAB, case.per_token))
    table[::3, -1] = table[::3, 0]
    return table

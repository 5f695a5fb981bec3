"""The held-out pass: every batch of held-out windows once, and the mean of their losses."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from .corpus import Corpus
from .settings import Settings
from .windows import held_out_batches


class HeldOutPass:
    """Iterates over what `evaluate` says of each batch beside its loss.

    - `evaluate`: from windows to `(mean loss in nats per byte, anything)`.
    - `windows`: the batches, `(batches, batch, length + 1)`.
    """

    windows: Int[np.ndarray, "batches batch _"]

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        evaluate: Callable[[Int[np.ndarray, "batch _"]], tuple[Any, Any]],
    ):
        self.windows = held_out_batches(
            corpus.held_out,
            count=settings.eval_windows,
            length=settings.length,
            batch=settings.batch,
        )
        self._evaluate = evaluate
        self._losses: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        self._losses.clear()
        for windows in self.windows:
            loss, found = self._evaluate(windows)
            self._losses.append(float(loss))
            yield found

    @property
    def num_bytes(self) -> int:
        """Bytes predicted in a whole pass."""
        return self.windows[:, :, 1:].size

    @property
    def bits_per_byte(self) -> float:
        """Of the batches that were asked for."""
        return math.fsum(self._losses) / len(self._losses) / math.log(2)

"""The tokens that an expert receives, counted by token id."""

import numpy as np
from jaxtyping import Int64

_MERGE_AT_LEAST = 2**20  # pairs


class TokenCounts:
    """Assignments by (expert, token id). Only pairs that occur take memory."""

    def __init__(self):
        # The rows are expert, token id and count. One number for expert and id could overflow.
        self._counted: Int64[np.ndarray, "3 pairs"] = np.zeros((3, 0), np.int64)
        self._waiting: list[Int64[np.ndarray, "3 _"]] = []

    def add(
        self,
        experts: Int64[np.ndarray, "tokens experts_per_token"],
        ids: Int64[np.ndarray, " tokens"],
    ) -> None:
        """Count the assignments of some tokens. Nobody is an expert like any other here."""
        ids = np.broadcast_to(ids[:, None], experts.shape)
        pairs = np.stack([experts.ravel(), ids.ravel(), np.ones(experts.size, np.int64)])
        self._waiting.append(_added_up(pairs))
        # Merging sorts every pair seen so far, so a merge at every batch would take ever longer.
        num_waiting = sum(pairs.shape[1] for pairs in self._waiting)
        if num_waiting > max(_MERGE_AT_LEAST, self._counted.shape[1]):
            self._merge()

    def of_expert(self, expert: int, number: int) -> list[tuple[int, int]]:
        """The `number` most frequent `(token id, count)`. Equal counts are in order of ids."""
        self._merge()
        first, last = np.searchsorted(self._counted[0], [expert, expert + 1])
        ids, counts = self._counted[1:, first:last]
        order = np.lexsort((ids, -counts))[:number]
        return list(zip(ids[order].tolist(), counts[order].tolist(), strict=True))

    def _merge(self) -> None:
        if self._waiting:
            self._counted = _added_up(np.concatenate([self._counted, *self._waiting], axis=1))
            self._waiting = []


def _added_up(pairs: Int64[np.ndarray, "3 _"]) -> Int64[np.ndarray, "3 _"]:
    """Pairs sorted by expert and id, each of them once."""
    if pairs.shape[1] == 0:
        return pairs
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    is_new = (pairs[:2, 1:] != pairs[:2, :-1]).any(axis=0)
    starts = np.flatnonzero(np.concatenate([[True], is_new]))
    return np.concatenate([pairs[:2, starts], np.add.reduceat(pairs[2], starts)[None]])

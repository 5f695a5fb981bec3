"""Which tokens an expert sees: counts by (expert, token id), and the most frequent of them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

_MERGE_AT_LEAST = 2**20  # pairs that wait before they are added up


class TopToken(NamedTuple):
    """A token id, its text, and how many of an expert's assignments it makes up."""

    token_id: int
    text: str
    count: int


class TokenCounts:
    """Assignments by (expert, token id), of which only pairs that occur take memory."""

    def __init__(self):
        # Columns: expert, token id, count. Two columns, because one number made of both could
        # overflow where ids are wide.
        self._counted: Int64[np.ndarray, "3 pairs"] = np.zeros((3, 0), np.int64)
        self._waiting: list[Int64[np.ndarray, "3 _"]] = []
        self._num_waiting = 0

    def add(
        self,
        experts: Integer[np.ndarray, "tokens experts_per_token"],
        ids: Int64[np.ndarray, " tokens"],
    ) -> None:
        """Count the assignments of some tokens."""
        ids = np.broadcast_to(ids[:, None], experts.shape)
        ones = np.ones(experts.size, np.int64)
        pairs = np.stack([experts.reshape(-1).astype(np.int64), ids.reshape(-1), ones])
        self._waiting.append(_added_up(pairs))
        self._num_waiting += self._waiting[-1].shape[1]
        # Not at every batch: sorting all that was seen would take longer and longer.
        if self._num_waiting > max(_MERGE_AT_LEAST, self._counted.shape[1]):
            self._merge()

    def of_expert(self, expert: int) -> tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]:
        """`(token ids, counts)`, the most frequent first and the lower id first among equals."""
        self._merge()
        # Sorted by expert, so that its pairs lie together.
        first, last = np.searchsorted(self._counted[0], [expert, expert + 1])
        ids, counts = self._counted[1:, first:last]
        order = np.lexsort((ids, -counts))
        return ids[order], counts[order]

    def _merge(self) -> None:
        if self._waiting:
            self._counted = _added_up(np.concatenate([self._counted, *self._waiting], axis=1))
            self._waiting, self._num_waiting = [], 0


def _added_up(pairs: Int64[np.ndarray, "3 _"]) -> Int64[np.ndarray, "3 _"]:
    """Sorted by expert and id, equal pairs made one."""
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    if pairs.shape[1] == 0:
        return pairs
    new = np.ones(pairs.shape[1], bool)
    new[1:] = (pairs[:2, 1:] != pairs[:2, :-1]).any(axis=0)
    starts = np.flatnonzero(new)
    return np.concatenate([pairs[:2, starts], np.add.reduceat(pairs[2], starts)[None]])

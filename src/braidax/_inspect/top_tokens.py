"""The most frequent tokens of each expert: counted, and shown as lines and as tables."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from .pages import Table

_MOST_LAYERS, _MOST_EXPERTS = 12, 3


class TopToken(NamedTuple):
    """A token id, its text, and its number of assignments to an expert."""

    token_id: int
    text: str
    count: int


# `[layer][expert]`, most frequent first.
TopTokens = tuple[tuple[tuple[TopToken, ...], ...], ...]


class TokenCounts:
    """Assignments by (expert, token id). Only pairs that occur take memory."""

    def __init__(self):
        # The rows are expert, token id and count. One number for expert and id could overflow.
        # The first part is merged: sorted by expert and id, with each pair once.
        self._parts: list[Int64[np.ndarray, "3 _"]] = [np.zeros((3, 0), np.int64)]

    def add(
        self,
        experts: Int64[np.ndarray, "tokens experts_per_token"],
        ids: Int64[np.ndarray, " tokens"],
    ) -> None:
        """Count the assignments of some tokens. Nobody is an expert like any other here."""
        ids = np.broadcast_to(ids[:, None], experts.shape)
        pairs = np.stack([experts.ravel(), ids.ravel(), np.ones(experts.size, np.int64)])
        self._parts.append(pairs)
        # Merging sorts every pair seen so far, so a merge at every batch would take ever longer.
        if sum(part.shape[1] for part in self._parts) > 2 * self._parts[0].shape[1]:
            self._merge()

    def of_expert(self, expert: int, number: int) -> list[tuple[int, int]]:
        """The `number` most frequent `(token id, count)`. Equal counts are in order of ids."""
        self._merge()
        experts, ids, counts = self._parts[0]
        own = slice(*np.searchsorted(experts, [expert, expert + 1]))
        order = np.lexsort((ids[own], -counts[own]))[:number]
        return list(zip(ids[own][order].tolist(), counts[own][order].tolist(), strict=True))

    def _merge(self) -> None:
        if len(self._parts) == 1:
            return
        pairs = np.concatenate(self._parts, axis=1)
        pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
        is_new = np.ones(pairs.shape[1], bool)
        is_new[1:] = (pairs[:2, 1:] != pairs[:2, :-1]).any(axis=0)
        starts = np.flatnonzero(is_new)
        counts = np.add.reduceat(pairs[2], starts) if len(starts) else pairs[2]
        self._parts = [np.stack([*pairs[:2, starts], counts])]


def token_text(decode: Callable[[int], str] | None, token_id: int) -> str:
    """The text of an id, by default its digits. An id that `decode` does not know has a sign."""
    try:
        text = str(token_id) if decode is None else decode(token_id)
    except (LookupError, ValueError, OverflowError):
        # The pass over the data is done: one id must not lose the report.
        text = f"<id {token_id}>"
    if not isinstance(text, str):
        raise TypeError(f"`decode` must return a string. Got {text!r:.60} for id {token_id}.")
    return text


def token_lines(
    names: Sequence[str], load: Int64[np.ndarray, "layers experts"], top_tokens: TopTokens
) -> list[str]:
    """For each layer the experts that one token fills most, if they have half the mean load."""
    lines = ["experts with the most one-sided load; `.top_tokens[layer][expert]` has all:"]
    for name, counts, tokens in list(zip(names, load, top_tokens, strict=True))[:_MOST_LAYERS]:
        busy = np.flatnonzero((counts * 2 >= counts.mean()) & (counts > 0))
        one_sided = sorted(busy, key=lambda expert: -tokens[expert][0].count / counts[expert])
        for expert in one_sided[:_MOST_EXPERTS]:
            shown = _shares(tokens[expert], counts[expert])
            lines.append(f"  layer {name}, expert {expert}: {shown}")
    left = len(names) - _MOST_LAYERS
    return [*lines, *([f"  and {left} more layers"] if left > 0 else []), ""]


def token_tables(
    names: Sequence[str], load: Int64[np.ndarray, "layers experts"], top_tokens: TopTokens
) -> list[Table]:
    """A table of every layer's experts."""
    tables = []
    for name, counts, tokens in zip(names, load, top_tokens, strict=True):
        shown = map(_shares, tokens, counts)
        rows = [(str(e), text, f"{counts[e]:,}") for e, text in enumerate(shown)]
        tables.append(Table(("expert", "tokens", "load"), rows, 2, f"top tokens of layer {name}"))
    return tables


def _shares(tokens: Sequence[TopToken], load: np.int64) -> str:
    """The tokens with their shares of the expert's load. Quotes show spaces and line ends."""
    shown = []
    for token in tokens:
        text = token.text if len(token.text) <= 20 else token.text[:19] + "…"
        share = token.count / load
        shown.append(f"{text!r} {'<1%' if share < 0.005 else f'{share:.0%}'}")
    return "  ".join(shown)

"""The most frequent tokens of each expert, as lines and as tables."""

from collections.abc import Sequence
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
TopTokens = Sequence[Sequence[Sequence[TopToken]]]


def token_lines(
    names: Sequence[str], load: Int64[np.ndarray, "layers experts"], top_tokens: TopTokens
) -> list[str]:
    """For each layer the experts that one token fills most, if they have half the mean load."""
    lines = ["experts with the most one-sided load; `.top_tokens[layer][expert]` has all:"]
    for name, counts, tokens in list(zip(names, load, top_tokens, strict=True))[:_MOST_LAYERS]:
        busy = np.flatnonzero((counts * 2 >= counts.mean()) & (counts > 0))
        shares = np.array([tokens[expert][0].count / counts[expert] for expert in busy])
        for expert in busy[np.argsort(-shares, kind="stable")][:_MOST_EXPERTS]:
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

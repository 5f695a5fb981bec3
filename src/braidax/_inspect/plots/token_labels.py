"""Tokens as short texts that any font can draw, one column of type for every character."""

import operator
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from ..._checks import check
from ..assignments import on_host
from ..top_tokens import token_text

# A line has room for about a hundred columns, so longer tokens are cut.
_LONGEST = 24


def token_labels(
    tokens: Any, decode: Callable[[int], str] | None, num_tokens: int, font: Any
) -> list[str]:
    """The text of each token: visible, in characters that `font` has.

    Raises `TypeError` for tokens that are neither text nor integers and for a `decode` that
    returns no text, `ValueError` for a wrong number of tokens and a `decode` without ids.
    """
    items = range(num_tokens) if tokens is None else tokens
    if isinstance(items, bytes):
        items = [chr(byte) if byte < 128 else f"\\x{byte:02x}" for byte in items]
    elif not isinstance(items, Sequence):
        items = on_host("tokens", items)
        if items.ndim == 0:
            raise TypeError(
                f"`tokens` must be a sequence, bytes or an array of ids. Got {tokens!r}."
            )
        items = items.reshape(-1)
    if decode is not None and (tokens is None or any(isinstance(item, str) for item in items)):
        raise ValueError(
            f"`decode` needs `tokens` that are ids. Got {'None' if tokens is None else 'text'}."
        )
    must = f"hold one token for each of the routing's {num_tokens}"
    check(len(items) == num_tokens, "tokens", must, len(items))
    return [_label(item, decode, font) for item in items]


def num_columns(label: str) -> int:
    """Width in characters of a monospaced font. Wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in label)


def _label(item: Any, decode: Callable[[int], str] | None, font: Any) -> str:
    if not isinstance(item, str):
        if not hasattr(item, "__index__"):
            raise TypeError(f"`tokens` must hold strings or integers. Got {item!r}.")
        item = token_text(decode, operator.index(item))
    text = "".join(_visible(character, font) for character in item)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _visible(character: str, font: Any) -> str:
    """The character itself, a sign for a space, or an escape for what cannot be seen alone."""
    shown = "\u2423" if character == " " else character
    # A combining mark is drawn on top of the character before it.
    alone = shown.isprintable() and not unicodedata.category(shown).startswith("M")
    if alone and font.get_char_index(ord(shown)):
        return shown
    return character.encode("unicode_escape", "surrogatepass").decode() if character != " " else "_"

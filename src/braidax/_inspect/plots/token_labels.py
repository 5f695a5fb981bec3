"""Tokens as short texts that any font can draw, one column of type for every character."""

import operator
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from ..assignments import on_host

# A line has room for about a hundred columns, so longer tokens are cut.
_LONGEST = 24


def token_labels(
    tokens: Any, decode: Callable[[int], str] | None, num_tokens: int, font: Any
) -> list[str]:
    """The text of each token: visible, in characters that `font` has.

    Raises `TypeError` for tokens that are neither text nor integers and for a `decode` that
    returns no text, `ValueError` for a wrong number of tokens and a `decode` without ids.
    """
    if tokens is None:
        if decode is not None:
            raise ValueError("`decode` needs `tokens`, the ids to decode. Got None.")
        return [str(position) for position in range(num_tokens)]
    if isinstance(tokens, bytes):
        tokens = [chr(byte) if byte < 128 else f"\\x{byte:02x}" for byte in tokens]
    elif not isinstance(tokens, Sequence):
        array = on_host("tokens", tokens)
        if array.ndim == 0:
            raise TypeError(
                f"`tokens` must be a sequence, bytes or an array of ids. Got {tokens!r}."
            )
        tokens = list(array.flat)
    if decode is not None and any(isinstance(item, str) for item in tokens):
        raise ValueError("`decode` needs `tokens` that are ids. Got text.")
    texts = [item if isinstance(item, str) else _text(item, decode) for item in tokens]
    if len(texts) != num_tokens:
        raise ValueError(
            f"`tokens` must hold one token for each of the routing's {num_tokens}. "
            f"Got {len(texts)}."
        )
    labels = ["".join(_visible(character, font) for character in text) for text in texts]
    return [text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..." for text in labels]


def num_columns(label: str) -> int:
    """Width in characters of a monospaced font. Wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in label)


def _text(item: Any, decode: Callable[[int], str] | None) -> str:
    try:
        number = operator.index(item)
    except TypeError:
        raise TypeError(f"`tokens` must hold strings or integers. Got {item!r}.") from None
    text = str(number) if decode is None else decode(number)
    if not isinstance(text, str):
        raise TypeError(f"`decode` must return a string. Got {text!r} for {number}.")
    return text


def _visible(character: str, font: Any) -> str:
    """The character itself, a sign for a space, or an escape for what cannot be seen alone."""
    shown = "\u2423" if character == " " else character
    # A combining mark is drawn on top of the character before it.
    alone = shown.isprintable() and not unicodedata.category(shown).startswith("M")
    if alone and font.get_char_index(ord(shown)):
        return shown
    return character.encode("unicode_escape", "surrogatepass").decode() if character != " " else "_"

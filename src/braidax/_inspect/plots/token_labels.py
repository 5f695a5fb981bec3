"""Tokens as short texts that any font can draw, one column of type for every character."""

import operator
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from .inputs import on_host

# Longer tokens are cut: a line has room for about a hundred columns.
_LONGEST = 24


def token_labels(
    tokens: Any, decode: Callable[[int], str] | None, num_tokens: int, font: Any
) -> list[str]:
    """What to write for each token: visible, in characters that `font` has.

    Raises `TypeError` for tokens that are neither text nor integers and for a `decode` that
    returns no text, `ValueError` for a wrong number of tokens and a `decode` without ids.
    """
    if tokens is None:
        if decode is not None:
            raise ValueError("`decode` needs `tokens`, the ids to decode. Got None.")
        return [str(position) for position in range(num_tokens)]
    if isinstance(tokens, bytes):
        items = [chr(byte) if byte < 128 else f"\\x{byte:02x}" for byte in tokens]
    else:
        items = list(tokens) if isinstance(tokens, Sequence) else _array_items(tokens)
    if decode is not None and any(isinstance(item, str) for item in items):
        raise ValueError("`decode` needs `tokens` that are ids. Got text.")
    texts = [_text(item, decode) for item in items]
    if len(texts) != num_tokens:
        raise ValueError(
            f"`tokens` must hold one token for each of the routing's {num_tokens}. "
            f"Got {len(texts)}."
        )
    return [_cut("".join(_visible(character, font) for character in text)) for text in texts]


def columns(label: str) -> int:
    """Width in characters of a monospaced font, in which an East Asian wide one takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in label)


def _array_items(tokens: Any) -> list[Any]:
    array = on_host("tokens", tokens)
    if array.ndim == 0:
        raise TypeError(f"`tokens` must be a sequence, bytes or an array of ids. Got {tokens!r}.")
    return list(array.flat)


def _text(item: Any, decode: Callable[[int], str] | None) -> str:
    if isinstance(item, str):
        return item
    try:
        number = operator.index(item)
    except TypeError:
        raise TypeError(f"`tokens` must hold strings or integers. Got {item!r}.") from None
    if decode is None:
        return str(number)
    text = decode(number)
    if not isinstance(text, str):
        raise TypeError(f"`decode` must return a string. Got {text!r} for {number}.")
    return text


def _visible(character: str, font: Any) -> str:
    """The character, a sign for a space, or its escape where it would not be seen by itself."""
    shown = "\u2423" if character == " " else character
    # Marks are drawn on top of the character before; here each has its own column.
    alone = shown.isprintable() and not unicodedata.category(shown).startswith("M")
    if alone and font.get_char_index(ord(shown)):
        return shown
    return character.encode("unicode_escape", "surrogatepass").decode() if character != " " else "_"


def _cut(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 3] + "..."

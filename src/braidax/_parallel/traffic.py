"""What each strategy moves and holds: arithmetic on sizes, checked against compiled programs; for
`ragged` against the rows that its emulation moves and what is lowered for accelerators.

`size` is the number of devices on the expert axis. Bytes are those that one device sends in the
forward pass, for each of its own tokens. Outputs return as float32 sums, whatever the dtype of the
tokens; each row carries an int32 id and a float32 weight for every slot of its token.
"""

import math
from typing import NamedTuple

from .all_to_all import slots


class Sizes(NamedTuple):
    """The numbers that traffic and memory depend on; `item` is bytes per element of tokens."""

    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    tokens: int
    item: int


_SUM = 4  # bytes of an element on its way back
_SLOT = 8  # bytes of an id and its weight


def destinations(sizes: Sizes, size: int) -> float:
    """Mean number of devices that hold an expert of a token, if experts are drawn evenly and
    without repetition: `S (1 - C(E - E/S, k) / C(E, k))`."""
    elsewhere = sizes.experts - sizes.experts // size
    none = math.comb(elsewhere, sizes.experts_per_token)
    return size * (1 - none / math.comb(sizes.experts, sizes.experts_per_token))


def rows_sent(strategy: str, sizes: Sizes, size: int, capacity: float | None) -> float:
    """Rows that leave a device for each of its tokens, to other devices."""
    if strategy == "gather":
        return float(size - 1)
    if strategy == "ragged":
        return destinations(sizes, size) * (size - 1) / size
    per_pair = slots(sizes.tokens, sizes.experts_per_token, size, capacity)
    return (size - 1) * per_pair / sizes.tokens


def bytes_forward(strategy: str, sizes: Sizes, size: int, capacity: float | None) -> float:
    """Bytes per token: every row there with its slots, and its sum back."""
    row = sizes.hidden * (sizes.item + _SUM) + sizes.experts_per_token * _SLOT
    return rows_sent(strategy, sizes, size, capacity) * row


def bytes_backward(strategy: str, sizes: Sizes, size: int, capacity: float | None) -> float:
    """Bytes per token of the transpose: no ids, and half of a slot's bytes."""
    row = sizes.hidden * (sizes.item + _SUM) + sizes.experts_per_token * _SLOT // 2
    return rows_sent(strategy, sizes, size, capacity) * row


def weight_bytes(sizes: Sizes, size: int) -> int:
    """The expert weights of one device."""
    return sizes.experts // size * 3 * sizes.hidden * sizes.intermediate * sizes.item


def rows_held(strategy: str, sizes: Sizes, size: int, capacity: float | None) -> tuple[int, int]:
    """Rows of the buffers that a device sends from and receives into."""
    if strategy == "gather":
        return sizes.tokens, size * sizes.tokens
    if strategy == "ragged":
        return sizes.tokens * min(size, sizes.experts_per_token), size * sizes.tokens
    rows = size * slots(sizes.tokens, sizes.experts_per_token, size, capacity)
    return rows, rows


def working_bytes(
    strategy: str, sizes: Sizes, size: int, capacity: float | None, chunk: float
) -> int:
    """The largest buffers of the forward pass: tokens and sums on both sides of the exchange, and
    one chunk of assignments in the experts: rows, outputs and what is of intermediate width. The
    backend `blocks` holds only the rows, over which it writes the outputs."""
    assignment = sizes.hidden * (sizes.item + _SUM)
    assignment += sizes.intermediate * (2 * _SUM + sizes.item)
    own = math.ceil(chunk * sizes.tokens * sizes.experts_per_token)
    rows = sum(rows_held(strategy, sizes, size, capacity))
    return rows * sizes.hidden * (sizes.item + _SUM) + own * assignment

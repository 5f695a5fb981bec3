"""Hash tables: which experts a token id goes to, fixed before training.

Hash layers are from Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv 2106.04426).
Every builder returns a numpy int32 array of shape (vocab, experts_per_token), the same on every
host, platform and library version. Rows built here hold distinct experts. None of these rules is
the recipe of a released table, which is unpublished: load a released table and pass it through
`from_array`.
"""

import hashlib
import struct

import numpy as np
import numpy.typing as npt

from ._balanced_table import checked_counts, least_loaded, refine
from ._checks import experts_per_token, integer

_MAX_POOL_ENTRIES = 2**20


def md5(
    vocab_size: int, num_experts: int, num_experts_per_token: int, *, salt: int = 0
) -> npt.NDArray[np.int32]:
    """Experts from the MD5 digest of (salt, token): the default table, `salt` = layer index.

    `n` is the little-endian integer of `md5(struct.pack("<QQ", salt, token))`, and `pool` begins
    as `[0, ..., E - 1]`. Slot `j` takes `n, r = divmod(n, E - j)`, then `pool[r]`, then
    `pool[r] = pool[E - 1 - j]`. A larger vocabulary extends the table of a smaller one.

    **Raises:** `ValueError` or `TypeError` unless `vocab_size`, `num_experts` and
    `num_experts_per_token` are integers of at least 1, K <= E and 0 <= `salt` < 2**64.

    **Example:**

        >>> import braidax as bx
        >>> bx.hash_tables.md5(3, 8, 2).tolist()
        [[2, 0], [0, 5], [3, 0]]
    """
    vocab, experts, slots, salt = _sizes(vocab_size, num_experts, num_experts_per_token, salt)
    digests = b"".join(
        hashlib.md5(struct.pack("<QQ", salt, token), usedforsecurity=False).digest()
        for token in range(vocab)
    )
    limbs = np.frombuffer(digests, "<u4").reshape(-1, 4).astype(np.uint64)
    remainders = [_divide_in_place(limbs, experts - slot) for slot in range(slots)]
    return _distinct_experts(np.stack(remainders, axis=1), experts)


def random(
    vocab_size: int, num_experts: int, num_experts_per_token: int, *, salt: int = 0
) -> npt.NDArray[np.int32]:
    """Uniformly random distinct experts for every token, seeded by `salt`.

    The numbers are the raw output of PCG64. Numpy guarantees the stream of a bit generator across
    versions, but not that of the `Generator` methods. The modulo changes a probability by a
    relative E / 2**64 at most.

    **Raises:** as `md5` does. **Source:** the "random hash" of Hash Layers. **Example:**

        >>> import braidax as bx
        >>> bx.hash_tables.random(3, 8, 2, salt=1).tolist()
        [[7, 5], [5, 7], [1, 6]]
    """
    vocab, experts, slots, salt = _sizes(vocab_size, num_experts, num_experts_per_token, salt)
    raw = np.random.PCG64(salt).random_raw((vocab, slots))
    divisors = np.arange(experts, experts - slots, -1, dtype=np.uint64)
    return _distinct_experts(raw % divisors, experts)


def round_robin(
    vocab_size: int, num_experts: int, num_experts_per_token: int, *, salt: int = 0
) -> npt.NDArray[np.int32]:
    """Slot `j` of token `t` is `(t * K + j + salt) % E`: every expert gets as many token ids, +-1.

    **Raises:** as `md5` does. **Example:**

        >>> import braidax as bx
        >>> bx.hash_tables.round_robin(5, 8, 2).tolist()
        [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]
    """
    vocab, experts, slots, salt = _sizes(vocab_size, num_experts, num_experts_per_token, salt)
    # The salt is reduced first: unsigned 64-bit salts do not fit the int64 sum.
    flat = (np.arange(vocab * slots, dtype=np.int64) + salt % experts) % experts
    return flat.astype(np.int32).reshape(vocab, slots)


def balanced(
    token_counts: npt.ArrayLike, num_experts: int, num_experts_per_token: int, *, salt: int = 0
) -> npt.NDArray[np.int32]:
    """Distinct experts for every token so that the experts see equally many tokens.

    `token_counts` are the occurrences of each token id in the training data: non-negative
    integers (vocab,) with a sum below 2**62.

    Tokens in descending count each take the K least loaded experts. Exchanges between experts
    then lower the largest load, until it is 0.1 % above its lower bound. The bound is the mean,
    or what a few heavy tokens force. Real vocabularies, bytes included, end within 1 % of it, but
    a few dozen tokens may end further off. Tokens of count 0 give every expert the same number of
    ids, +-1. `salt` relabels experts and reorders tokens of equal count, but keeps sorted loads.

    **Raises:** `TypeError` for counts that are not integers, `ValueError` for counts that are
    empty, negative, too large or not 1-D, and as `md5` does.

    **Source:** the "balanced hash" of Hash Layers; the heuristic is our own.

    **Example:** two tokens as frequent as the other four together get an expert each.

        >>> import braidax as bx, numpy as np
        >>> counts = np.array([40, 40, 10, 10, 10, 10])
        >>> table = bx.hash_tables.balanced(counts, num_experts=3, num_experts_per_token=1)
        >>> np.bincount(table[:, 0], weights=counts).tolist()
        [40.0, 40.0, 40.0]
    """
    counts = checked_counts(token_counts)
    vocab, experts, slots, salt = _sizes(counts.size, num_experts, num_experts_per_token, salt)
    bits = np.random.PCG64(salt)
    labels = np.argsort(bits.random_raw(experts), kind="stable")
    order = np.lexsort((bits.random_raw(vocab), -counts))
    num_seen = np.count_nonzero(counts)
    seen, unseen = counts[order[:num_seen]], np.ones(vocab - num_seen, np.int64)
    rows = np.empty((vocab, slots), np.int32)
    rows[:num_seen] = least_loaded(seen, experts, slots)
    rows[num_seen:] = least_loaded(unseen, experts, slots)
    refine(rows[:num_seen], seen, experts)
    table = np.empty_like(rows)
    table[order] = labels[rows]
    return table


def from_array(array: npt.ArrayLike, num_experts: int) -> npt.NDArray[np.int32]:
    """A validated int32 copy of a given table `array`, (vocab, experts_per_token) integers.

    Duplicates within a row are accepted: their weights add up.

    **Raises:** `TypeError` if the dtype is not an integer one. `ValueError` if the array is not
    2-D, is empty, has more than `num_experts` columns, or an entry outside [0, num_experts).

    **Example:**

        >>> import braidax as bx
        >>> bx.hash_tables.from_array([[0, 3], [7, 7]], num_experts=8).dtype
        dtype('int32')
    """
    table = np.asarray(array)
    if table.ndim != 2:
        raise ValueError(f"`array` must have shape (vocab, experts_per_token). Got {table.shape}.")
    if table.dtype.kind not in "iu":
        raise TypeError(f"`array` must have an integer dtype. Got {table.dtype}.")
    experts = integer("num_experts", num_experts, 1, 2**31 - 1)
    if table.size == 0 or table.shape[1] > experts:
        raise ValueError(
            f"`array` must have at least 1 row and between 1 and num_experts={experts} columns. "
            f"Got shape {table.shape}."
        )
    outside = (table < 0) | (table >= experts)
    if outside.any():
        row, column = (int(axis) for axis in np.unravel_index(outside.argmax(), table.shape))
        raise ValueError(
            f"`array` must have entries in [0, num_experts={experts}). "
            f"Got {table[row, column]} at row {row}, column {column}."
        )
    return table.astype(np.int32)


def _sizes(
    vocab_size: object, num_experts: object, num_experts_per_token: object, salt: object
) -> tuple[int, int, int, int]:
    vocab = integer("vocab_size", vocab_size, 1, 2**31 - 1)
    experts = integer("num_experts", num_experts, 1, 2**31 - 1)
    slots = experts_per_token(num_experts_per_token, experts)
    return vocab, experts, slots, integer("salt", salt, 0, 2**64 - 1)


def _divide_in_place(limbs: npt.NDArray[np.uint64], divisor: int) -> npt.NDArray[np.uint64]:
    """Divides 128-bit integers, as four little-endian 32-bit limbs; returns the remainders."""
    remainder = np.zeros(len(limbs), np.uint64)
    for limb in reversed(range(4)):
        dividend = (remainder << np.uint64(32)) | limbs[:, limb]
        limbs[:, limb], remainder = np.divmod(dividend, np.uint64(divisor))
    return remainder


def _distinct_experts(remainders: npt.NDArray[np.uint64], experts: int) -> npt.NDArray[np.int32]:
    """Partial Fisher-Yates, many rows at once; `remainders[:, j]` is in [0, experts - j)."""
    remainders, chosen = remainders.astype(np.int64), np.empty(remainders.shape, np.int32)
    size = max(1, _MAX_POOL_ENTRIES // experts)  # the pools stay within a few MB
    for start in range(0, len(chosen), size):
        chunk = remainders[start : start + size]
        pool = np.tile(np.arange(experts, dtype=np.int32), (len(chunk), 1))
        rows = np.arange(len(chunk))
        for slot, remainder in enumerate(chunk.T):
            chosen[start : start + size, slot] = pool[rows, remainder]
            pool[rows, remainder] = pool[:, experts - 1 - slot]
    return chosen

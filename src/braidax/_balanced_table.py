"""Even load under given token counts: a greedy table, then exchanges between experts."""

import heapq

import numpy as np
import numpy.typing as npt

_MAX_REFINEMENT_ATTEMPTS = 10_000


def checked_counts(token_counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Occurrences of each token as int64 (vocab,)."""
    counts = np.asarray(token_counts)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(
            f"`token_counts` must have shape (vocab,) with vocab >= 1. Got {counts.shape}."
        )
    if counts.dtype.kind not in "iu":
        raise TypeError(f"`token_counts` must have an integer dtype. Got {counts.dtype}.")
    if counts.min() < 0:
        token = int((counts < 0).argmax())
        raise ValueError(f"`token_counts` must be >= 0. Got {counts[token]} for token {token}.")
    total = sum(counts.tolist())
    if total >= 2**62:
        raise ValueError(f"`token_counts` must sum to less than 2**62. Got {total}.")
    return counts.astype(np.int64)


def least_loaded(counts: npt.NDArray[np.int64], experts: int, slots: int) -> npt.NDArray[np.int32]:
    """Rows (len(counts), slots): each token takes the `slots` least loaded experts, in order.

    Ties are broken at random, or equal counts would glue the same experts together in every row.
    The seed is fixed: the loads must not depend on the salt.
    """
    bits = np.random.PCG64(0)
    heap = [(0, tie, expert) for expert, tie in enumerate(bits.random_raw(experts).tolist())]
    heapq.heapify(heap)
    rows = np.empty((len(counts), slots), np.int32)
    for row, count, ties in zip(rows, counts.tolist(), bits.random_raw(rows.shape), strict=True):
        taken = [heapq.heappop(heap) for _ in range(slots)]
        row[:] = [expert for _, _, expert in taken]
        for (load, _, expert), tie in zip(taken, ties.tolist(), strict=True):
            heapq.heappush(heap, (load + count, tie, expert))
    return rows


def _largest_load_bound(counts: npt.NDArray[np.int64], experts: int, slots: int) -> int:
    """No table has a smaller largest load; `counts` descend.

    The largest load is at least the mean. And by the pigeonhole principle, as soon as the `m`
    heaviest tokens fill more than `q * experts` slots, some expert holds `q + 1` of them, which
    weigh at least as much as the lightest `q + 1` of the `m`.
    """
    mean = -(-sum(counts.tolist()) * slots // experts)
    full = np.arange((len(counts) * slots - 1) // experts + 1)
    heaviest = full * experts // slots + 1
    prefix = np.concatenate([[0], np.cumsum(counts)])
    return max(mean, int(np.max(prefix[heaviest] - prefix[heaviest - full - 1])))


def refine(rows: npt.NDArray[np.int32], counts: npt.NDArray[np.int64], experts: int) -> None:
    """Lowers the largest load in place: exchanges between the fullest expert and emptier ones."""
    if len(rows) == 0:
        return
    target = _largest_load_bound(counts, experts, rows.shape[1]) * 1.001
    members = [np.flatnonzero((rows == expert).any(axis=1)) for expert in range(experts)]
    loads = np.array([counts[tokens].sum() for tokens in members])
    attempts = 0
    while loads.max() > target:
        fullest = int(loads.argmax())
        for emptier in np.argsort(loads, kind="stable").tolist():
            attempts += 1
            if attempts > _MAX_REFINEMENT_ATTEMPTS or loads[emptier] == loads[fullest]:
                return
            gap = int(loads[fullest] - loads[emptier])
            exchange = _best_exchange(members[fullest], members[emptier], counts, gap)
            if exchange is not None:
                break
        else:
            return
        for tokens, source, goal in zip(
            exchange, (fullest, emptier), (emptier, fullest), strict=True
        ):
            rows[tokens] = np.where(rows[tokens] == source, goal, rows[tokens])
            members[source] = np.setdiff1d(members[source], tokens, assume_unique=True)
            members[goal] = np.union1d(members[goal], tokens)
            loads[source] -= counts[tokens].sum()
            loads[goal] += counts[tokens].sum()


def _best_exchange(
    fuller: npt.NDArray[np.intp],
    emptier: npt.NDArray[np.intp],
    counts: npt.NDArray[np.int64],
    gap: int,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]] | None:
    """The tokens to move out of `fuller`, and into it, that bring two loads closest together.

    One token moves out, and one or none comes back. `None` if no exchange lowers the larger load.
    Tokens of both experts stay: an expert appears once in a row.
    """
    outgoing = np.setdiff1d(fuller, emptier, assume_unique=True)
    incoming = np.setdiff1d(emptier, fuller, assume_unique=True)[::-1]
    weights = np.concatenate([[0], counts[incoming]])  # ascending; the 0 is "none comes back"
    right = np.searchsorted(weights, counts[outgoing] - gap // 2)
    candidates = np.stack([np.maximum(right - 1, 0), np.minimum(right, len(incoming))])
    moved = counts[outgoing] - weights[candidates]
    distance = np.where((moved > 0) & (moved < gap), np.abs(2 * moved - gap), gap)
    if distance.size == 0 or distance.min() >= gap:
        return None
    side, index = np.unravel_index(distance.argmin(), distance.shape)
    chosen = int(candidates[side, index])
    return outgoing[index : index + 1], incoming[max(chosen - 1, 0) : chosen]

"""`report`: what routers did with the tokens of a batch or of a whole data set."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from .._checks import check, positive_integer
from .._filters import routers as find_routers
from .._routing import Routing
from .assignments import checked_names
from .batches import read_batches
from .counts import entropy, max_violation, mean_or_nan, token_sums
from .records import Report
from .routers import router_kind, router_shape
from .top_tokens import TokenCounts, TopToken, TopTokens, token_text


def report(
    routings: Routing | Iterable[Any],
    *,
    model: PyTree = None,
    input_ids: Any = None,
    layer_names: Iterable[str] | None = None,
    decode: Callable[[int], str] | None = None,
    num_top_tokens: int = 5,
) -> Report:
    """Load, balance, confidence and most frequent tokens of every expert, over many batches.

        bx.report(routing)                  # one layer
        bx.report([first, second])          # the layers of one batch
        bx.report((model(ids)[1] for ids in batches), model=model, input_ids=batches, decode=chr)

    **Arguments:**

    - `routings`: a `Routing`; a sequence of one `Routing` per layer; or any iterable of batches,
        each such a sequence. The iterable is read once, and no batch is kept.
    - `model`: anything that holds the routers in the order of the routings: a model, a block or a
        list of routers. It tells hash from top-k layers, and layers stacked in one `Routing` from
        other stacked calls. Without it each stacked call is a layer.
    - `input_ids`: the ids of the tokens, for `top_tokens`: an array of the routings' batch axes, or
        `bytes`. For batches, a list, an array or a loader of one of them per batch.
    - `layer_names`: one name a layer; by default its number, from 0.
    - `decode`: the text of a token id, such as `tokenizer.decode` or `chr`; by default `str`. An id
        for which it raises `LookupError`, `ValueError` or `OverflowError` is shown as `<id 300>`.
    - `num_top_tokens`: how many tokens are kept for every expert.

    **Returns:** a record of numpy arrays, `load` `(layers, experts)` and more; see its docstring.

    **Example:** 4 bytes, two of them equal, routed by id.

        >>> import braidax as bx, jax
        >>> table = bx.hash_tables.md5(256, 8, 2)
        >>> router = bx.HashRouter(4, 8, 2, table=table, key=jax.random.key(0))
        >>> ids = jax.numpy.array([97, 98, 97, 99])
        >>> report = bx.report(router(jax.numpy.ones((4, 4)), ids), model=router, input_ids=ids)
        >>> report.routers, int(report.load.sum()), report.top_tokens[0][table[97, 0]][0].count
        (('hash',), 8, 2)

    **Raises:** `ValueError` or `TypeError` that names the argument for counts or shapes that do
    not fit, and `TypeError` for traced arrays.
    """
    positive_integer("num_top_tokens", num_top_tokens)
    routers = kinds = None
    if model is not None:
        routers = find_routers(model)
        check(routers, "model", "hold a router", f"a {type(model).__name__}")
        kinds = tuple(router_kind(r) for r in routers for _ in range(math.prod(router_shape(r)[0])))
    figures, counts = _figures(read_batches(routings, input_ids, routers))
    names = tuple(checked_names(layer_names, len(counts)))
    tokens = None if input_ids is None else _top_tokens(counts, figures, decode, num_top_tokens)
    return Report(layer_names=names, routers=kinds, top_tokens=tokens, **figures)


def _figures(batches: Iterable[Any]) -> tuple[dict[str, np.ndarray], list[TokenCounts]]:
    """The arrays of a `Report`, and for every layer the counts of its tokens."""
    sums, violations, tokens = {}, [], []
    for layers in batches:
        found = [token_sums(layer) for layer, _ in layers]
        batch = {name: np.array([layer[name] for layer in found]) for name in found[0]}
        # A batch without load balances nothing. A 0 for it would flatter the mean of batches.
        has_load = batch["load"].any(axis=1)
        violations.append(np.where(has_load, max_violation(batch["load"]), np.nan))
        sums = {name: sums.get(name, 0) + batch[name] for name in batch}
        tokens = tokens or [TokenCounts() for _ in layers]
        for counts, (layer, ids) in zip(tokens, layers, strict=True):
            if ids is not None:
                counts.add(layer.indices[layer.mask], ids[layer.mask])
    load = sums["load"]
    shares = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    figures = {
        "max_violation": max_violation(load),
        "batch_max_violation": np.array(violations),
        "load_entropy": entropy(shares),
        "dead_experts": (load == 0).sum(axis=1, dtype=np.int64),
        "top_1_share": shares.max(axis=1),
        "confidence": mean_or_nan(*sums["confidence"].T),
        "router_entropy": mean_or_nan(*sums["router_entropy"].T),
    }
    return sums | figures, tokens


def _top_tokens(
    layers: list[TokenCounts], figures: dict[str, np.ndarray], decode: Any, number: int
) -> TopTokens:
    text = functools.cache(functools.partial(token_text, decode))

    def tokens(counts: TokenCounts, expert: int) -> tuple[TopToken, ...]:
        return tuple(TopToken(i, text(i), n) for i, n in counts.of_expert(expert, number))

    experts = range(figures["load"].shape[1])
    return tuple(tuple(tokens(counts, expert) for expert in experts) for counts in layers)

"""`report`: what routers did with the tokens of a batch or of a whole data set."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from .._checks import positive_integer
from .._routing import Routing
from .report_batches import STACKED, count_all, find_routers, router_kinds
from .report_counts import LayerCounts, entropy, max_violation
from .report_record import Report
from .top_tokens import TopToken


def report(
    routings: Routing | Iterable[Any],
    *,
    model: PyTree = None,
    input_ids: Any = None,
    layer_names: Iterable[str] | None = None,
    decode: Callable[[int], str] | None = None,
    num_top_tokens: int = 5,
) -> Report:
    """Load, balance, confidence and favourite tokens of every expert, over a batch or many.

        bx.report(routing)                  # one layer
        bx.report([first, second])          # the layers of one batch
        bx.report((model(ids)[1] for ids in batches), model=model, input_ids=batches, decode=chr)

    **Arguments:**

    - `routings`: a `Routing`; one for each layer; or any iterable of batches, each a sequence of
        one `Routing` a layer. It is read once, and a batch is counted and let go.
    - `model`: whatever holds the routers, in the order of the routings: a model, a block, a list
        of routers. It tells hash from top-k layers, which a `Routing` does not, and a router
        stacked over layers takes a `Routing` whose first axes are those layers. Without it every
        `Routing` is one layer, and all its leading axes are tokens.
    - `input_ids`: the tokens' ids: an array of the routings' batch axes, or `bytes`; for batches
        one of them each (in a list, an array or a loader, not an iterator). For `top_tokens`.
    - `layer_names`: one name a layer; by default its number, from 0.
    - `decode`: the text of a token id, as `tokenizer.decode` or, for bytes, `chr`; default `str`.
        An id for which it raises `LookupError`, `ValueError` or `OverflowError`, as one outside of
        the vocabulary, is written `<id 300>`.
    - `num_top_tokens`: how many tokens are kept of every expert.

    **Returns:** a record of numpy arrays, `load` `(layers, experts)` and more; see its docstring.

    **Example:** 4 bytes, two of them equal, routed by id.

        >>> import braidax as bx, jax
        >>> table = bx.hash_tables.md5(256, 8, 2)
        >>> router = bx.HashRouter(4, 8, 2, table=table, key=jax.random.key(0))
        >>> ids = jax.numpy.array([97, 98, 97, 99])
        >>> report = bx.report(router(jax.numpy.ones((4, 4)), ids), model=router, input_ids=ids)
        >>> report.routers, int(report.load.sum()), report.top_tokens[0][table[97, 0]][0].count
        (('hash',), 8, 2)

    **Raises:** `ValueError` or `TypeError` naming the argument where counts or shapes do not fit,
    and `TypeError` for traced arrays.
    """
    positive_integer("num_top_tokens", num_top_tokens)
    routers = find_routers(model)
    layers = count_all(routings, input_ids, routers)
    names = tuple(map(str, range(len(layers)) if layer_names is None else layer_names))
    if len(names) != len(layers):
        raise ValueError(
            "`layer_names` must hold one name per layer. "
            f"Got {len(names)} for {len(layers)} layers.{'' if routers else STACKED}"
        )
    top_tokens = None
    if input_ids is not None:
        texts = _Texts(str if decode is None else decode)
        top_tokens = tuple(_top_tokens(layer, num_top_tokens, texts) for layer in layers)
    return _report(names, router_kinds(routers), layers, top_tokens)


def _report(
    names: tuple[str, ...],
    routers: tuple[str, ...] | None,
    layers: list[LayerCounts],
    top_tokens: tuple[tuple[tuple[TopToken, ...], ...], ...] | None,
) -> Report:
    load = np.stack([layer.load for layer in layers])
    total = load.sum(axis=1)
    shares = load / np.where(total > 0, total, 1)[:, None]
    return Report(
        layer_names=names,
        routers=routers,
        num_tokens=np.array([layer.num_tokens for layer in layers], np.int64),
        dropped=np.array([layer.dropped for layer in layers], np.int64),
        undefined=np.array([layer.undefined for layer in layers], np.int64),
        load=load,
        max_violation=max_violation(load),
        batch_max_violation=np.array([layer.batch_max_violation for layer in layers]).T,
        load_entropy=entropy(shares),
        dead_experts=np.asarray((load == 0).sum(axis=1), np.int64),
        top_1_share=shares.max(axis=1),
        confidence=np.array([layer.confidence for layer in layers]),
        router_entropy=np.array([layer.router_entropy for layer in layers]),
        coactivation=np.stack([layer.coactivation for layer in layers]),
        top_tokens=top_tokens,
    )


class _Texts(dict):
    """The text of each token id, decoded once."""

    def __init__(self, decode: Callable[[int], str]):
        super().__init__()
        self._decode = decode

    def __missing__(self, token_id: int) -> str:
        try:
            text = self._decode(token_id)
        except (LookupError, ValueError, OverflowError):
            # The pass over the data is done, and one id must not lose it.
            text = f"<id {token_id}>"
        if not isinstance(text, str):
            raise TypeError(f"`decode` must return a str. Got {text!r:.60} for id {token_id}.")
        self[token_id] = text
        return text


def _top_tokens(layer: LayerCounts, number: int, texts: _Texts) -> tuple[tuple[TopToken, ...], ...]:
    experts = []
    for expert in range(layer.num_experts):
        ids, counts = layer.tokens.of_expert(expert)
        pairs = zip(ids[:number].tolist(), counts[:number].tolist(), strict=True)
        experts.append(tuple(TopToken(token, texts[token], count) for token, count in pairs))
    return tuple(experts)

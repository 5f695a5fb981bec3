"""The rows of the study: what each changes of one small language model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import braidax as bx
from braidax import training

SEEDS = (0, 1, 2)
BASE: dict[str, Any] = {"steps": 400, "hash_layers": 0}
LOSS_WEIGHT = 0.01  # of the sequence balance loss: Switch Transformers' (arXiv:2101.03961)

# After a step: `update(model, routings, rate)`.
Update = Callable[[Any, tuple[bx.Routing, ...], jax.Array], Any]
# What a layer has in place of its block: `edit(block, settings, corpus, key)`.
Edit = Callable[[Any, training.Settings, training.Corpus, jax.Array], Any]


def unchanged(model: Any, routings: tuple[bx.Routing, ...], rate: jax.Array) -> Any:
    del routings, rate
    return model


def by_quantile(model: Any, routings: tuple[bx.Routing, ...], rate: jax.Array) -> Any:
    del rate
    return bx.rebalance(model, routings, rule=bx.quantile_bias)


def no_loss(routings: tuple[bx.Routing, ...]) -> jax.Array:
    del routings
    return jnp.zeros(())


def sequence_loss(routings: tuple[bx.Routing, ...]) -> jax.Array:
    return LOSS_WEIGHT * sum(map(bx.sequence_balance_loss, routings), jnp.zeros(()))


class ShuffledRouter(bx.TopKRouter):
    """The control: each token goes to the experts of another token, with the weights of its own.

    The load is that of a top-k router, and what an expert gets says nothing about the expert."""

    def select(self, scores, logits, input_ids, *, key):
        indices, defined = super().select(scores, logits, input_ids, key=key)
        flat = indices.reshape(-1, indices.shape[-1])
        others = jax.random.permutation(jax.random.key(0), len(flat))
        return flat[others].reshape(indices.shape), defined


def sizes(settings: training.Settings) -> tuple[int, int, int]:
    return settings.hidden, settings.experts, settings.experts_per_token


def routed_by(make: Callable[..., bx.AbstractRouter]) -> Edit:
    """The block with another router, which `make(settings, corpus, key=)` constructs."""

    def edit(block, settings, corpus, key):
        router = make(settings, corpus, key=key)
        return eqx.tree_at(lambda block: block.routed.router, block, router)

    return edit


def without_shared(block, settings, corpus, key):
    del settings, corpus, key
    return block.routed


def shuffled(settings, corpus, *, key):
    del corpus
    return ShuffledRouter(*sizes(settings), key=key)


def expert_choice(block, settings, corpus, key):
    """With as many rows as there are choices, and not one for each slot."""
    del corpus
    router = bx.ExpertChoiceRouter(*sizes(settings), key=key)
    dispatch = bx.SortedDispatch(capacity=router.capacity(settings.batch * settings.length))
    block = eqx.tree_at(lambda block: block.routed.router, block, router)
    return eqx.tree_at(lambda block: block.routed.dispatch, block, dispatch)


def hashed(kind: str) -> Edit:
    def make(settings, corpus, *, key):
        known = {"balanced": np.bincount(corpus.training, minlength=256)}
        _, experts, experts_per_token = sizes(settings)
        table = getattr(bx.hash_tables, kind)(known.get(kind, 256), experts, experts_per_token)
        return bx.HashRouter(*sizes(settings), table=table, key=key)

    return routed_by(make)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: `settings` over the base, an edit of the first layers, an update of
    the bias, and a loss beside the cross entropy."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None
    edited_layers: int = 0
    update: Update = bx.rebalance
    loss: Callable[[tuple[bx.Routing, ...]], jax.Array] = no_loss


ALL = 10**6  # layers
REFERENCE = "sign bias, rate 0.01"
VARIANTS = {
    "dense": Variant({"dense": True}, update=unchanged),
    "no balancing": Variant(update=unchanged),
    "sign bias, rate 0.01": Variant(),
    "quantile bias": Variant(update=by_quantile),
    "sequence loss, weight 0.01": Variant(update=unchanged, loss=sequence_loss),
    "first layer hashed: MD5": Variant({}, hashed("md5"), 1),
    "first layer hashed: random": Variant({}, hashed("random"), 1),
    "first layer hashed: balanced": Variant({}, hashed("balanced"), 1),
    "expert choice": Variant({}, expert_choice, ALL, unchanged),
    "shuffled assignment": Variant({}, routed_by(shuffled), ALL),
    "4 experts": Variant({"experts": 4}),
    "8 experts": Variant({"experts": 8}),
    "32 experts": Variant({"experts": 32}),
    "64 experts": Variant({"experts": 64}),
    "3 routed, none shared": Variant({"experts_per_token": 3}, without_shared, ALL),
}


def settings_of(name: str, seed: int) -> training.Settings:
    return training.Settings(**{**BASE, **VARIANTS[name].settings, "seed": seed})

"""A small byte-level decoder that embeds the mixture-of-experts block as a user's model would."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._experts import FeedForward
from .._moe import RoutedAndSharedMoE
from .._routing import Routing
from .settings import VOCAB_SIZE, Settings


class DecoderLayer(eqx.Module):
    """Attention, then a mixture-of-experts block; each is normalized before and added after.

    Positions rotate queries and keys (Su et al. 2021). The dense baseline has one feed-forward
    network in place of the block.
    """

    attention_norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    positions: eqx.nn.RotaryPositionalEmbedding
    feed_forward_norm: eqx.nn.RMSNorm
    feed_forward: RoutedAndSharedMoE | FeedForward

    def __init__(self, settings: Settings, layer_idx: int, *, key: PRNGKeyArray):
        hidden, heads = settings.hidden, settings.heads
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = eqx.nn.RMSNorm(hidden, use_bias=False)
        self.attention = eqx.nn.MultiheadAttention(heads, hidden, key=attention_key)
        self.positions = eqx.nn.RotaryPositionalEmbedding(hidden // heads)
        self.feed_forward_norm = eqx.nn.RMSNorm(hidden, use_bias=False)
        if settings.dense:
            self.feed_forward = FeedForward(hidden, settings.dense_width(), key=feed_forward_key)
        else:
            self.feed_forward = RoutedAndSharedMoE.from_config(
                settings.moe_config(), layer_idx, key=feed_forward_key
            )

    def __call__(
        self,
        hidden_states: Float[Array, "batch tokens hidden"],
        input_ids: Int[Array, "batch tokens"],
    ) -> tuple[Float[Array, "batch tokens hidden"], Routing | None]:
        normed = _per_token(self.attention_norm, hidden_states)
        hidden_states = hidden_states + jax.vmap(self._attend)(normed)
        normed = _per_token(self.feed_forward_norm, hidden_states)
        if isinstance(self.feed_forward, FeedForward):
            return hidden_states + self.feed_forward(normed), None
        output, routing = self.feed_forward(normed, input_ids)
        return hidden_states + output, routing

    def _attend(self, normed: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        causal = jnp.tril(jnp.ones((len(normed), len(normed)), bool))
        rotate = jax.vmap(self.positions, in_axes=1, out_axes=1)

        def rotated(query, key, value):
            return rotate(query), rotate(key), value

        return self.attention(normed, normed, normed, causal, process_heads=rotated)


class LanguageModel(eqx.Module):
    """Predicts the next byte: `model(input_ids) -> (logits, one Routing per routed layer)`."""

    embedding: eqx.nn.Embedding
    layers: tuple[DecoderLayer, ...]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, settings: Settings, *, key: PRNGKeyArray):
        embedding_key, head_key, *layer_keys = jax.random.split(key, 2 + settings.layers)
        self.embedding = eqx.nn.Embedding(VOCAB_SIZE, settings.hidden, key=embedding_key)
        self.layers = tuple(
            DecoderLayer(settings, layer_idx, key=layer_key)
            for layer_idx, layer_key in enumerate(layer_keys)
        )
        self.norm = eqx.nn.RMSNorm(settings.hidden, use_bias=False)
        self.head = eqx.nn.Linear(settings.hidden, VOCAB_SIZE, use_bias=False, key=head_key)

    def __call__(
        self, input_ids: Int[Array, "batch tokens"]
    ) -> tuple[Float[Array, "batch tokens vocab"], tuple[Routing, ...]]:
        hidden_states = _per_token(self.embedding, input_ids)
        routings = []
        for layer in self.layers:
            hidden_states, routing = layer(hidden_states, input_ids)
            routings.append(routing)
        logits = _per_token(self.head, _per_token(self.norm, hidden_states))
        return logits, tuple(routing for routing in routings if routing is not None)


def _per_token(module, values):
    """Equinox's layers take one vector; this maps them over `batch` and `tokens`."""
    return jax.vmap(jax.vmap(module))(values)

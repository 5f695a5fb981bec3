"""A small byte-level decoder that embeds the mixture-of-experts block as a user's model would."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._experts import FeedForward
from .._moe import RoutedAndSharedMoE
from .._routing import Routing
from .settings import VOCAB_SIZE, Settings


class CausalAttention(eqx.Module):
    """Multi-head causal attention with rotary positions (Su et al. 2021)."""

    query_key_value: eqx.nn.Linear
    output: eqx.nn.Linear
    rotary: eqx.nn.RotaryPositionalEmbedding
    num_heads: int = eqx.field(static=True)

    def __init__(self, hidden_size: int, num_heads: int, *, key: PRNGKeyArray):
        """`hidden_size` must be a multiple of `2 * num_heads`."""
        keys = jax.random.split(key)
        self.query_key_value = eqx.nn.Linear(
            hidden_size, 3 * hidden_size, use_bias=False, key=keys[0]
        )
        self.output = eqx.nn.Linear(hidden_size, hidden_size, use_bias=False, key=keys[1])
        self.rotary = eqx.nn.RotaryPositionalEmbedding(hidden_size // num_heads)
        self.num_heads = num_heads

    def __call__(
        self, hidden_states: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        batch, tokens, hidden = hidden_states.shape
        projected = _per_token(self.query_key_value, hidden_states)
        heads = projected.reshape(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = jnp.moveaxis(heads, 2, 0)
        rotate = jax.vmap(jax.vmap(self.rotary, in_axes=1, out_axes=1))
        attended = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return _per_token(self.output, attended.reshape(batch, tokens, hidden))


class DenseFeedForward(eqx.Module):
    """One FeedForward for every token behind the block's interface: there is no routing to return."""

    feed_forward: FeedForward

    def __call__(
        self,
        hidden_states: Float[Array, "batch tokens hidden"],
        input_ids: Int[Array, "batch tokens"],
    ) -> tuple[Float[Array, "batch tokens hidden"], None]:
        del input_ids
        return self.feed_forward(hidden_states), None


class DecoderLayer(eqx.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    attention_norm: eqx.nn.RMSNorm
    attention: CausalAttention
    feed_forward_norm: eqx.nn.RMSNorm
    feed_forward: RoutedAndSharedMoE | DenseFeedForward

    def __init__(self, settings: Settings, layer_idx: int, *, key: PRNGKeyArray):
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = eqx.nn.RMSNorm(settings.hidden, use_bias=False)
        self.attention = CausalAttention(settings.hidden, settings.heads, key=attention_key)
        self.feed_forward_norm = eqx.nn.RMSNorm(settings.hidden, use_bias=False)
        if settings.dense:
            swiglu = FeedForward(settings.hidden, settings.dense_width(), key=feed_forward_key)
            self.feed_forward = DenseFeedForward(swiglu)
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
        hidden_states = hidden_states + self.attention(normed)
        normed = _per_token(self.feed_forward_norm, hidden_states)
        output, routing = self.feed_forward(normed, input_ids)
        return hidden_states + output, routing


class LanguageModel(eqx.Module):
    """Predicts the next byte. Returns the logits and one `Routing` per routed layer."""

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

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # In your own model
#
# **How do you put mixture-of-experts layers into an Equinox model of your own and train it with
# optax, and what can go wrong?**
#
# The model below is written here, from Equinox's layers and two blocks of `braidax`: one routed by
# hash, one by top-k. It learns to predict the next byte of Python source. Then five mistakes are
# made on purpose, to see what they look like.
#
# Runs in under a minute on a laptop. Only public names are used, so the cells can be copied.

# %%
import io
import math
import pathlib
import sysconfig
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import display

import braidax as bx

# Full float32 products on every platform, so that the checks hold on a GPU too.
jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# ## The model
#
# A decoder layer: attention, then a mixture-of-experts block where the feed-forward network would
# be. Three things are new for somebody who knows Equinox:
#
# * The block takes all tokens at once, `(batch, tokens, hidden)`, and not one vector. So attention
#   and norms are mapped with `jax.vmap`, and the block is not.
# * It also takes the token ids. A hash layer routes by them; a top-k layer ignores them.
# * It returns `(output, routing)`. The model collects the routings and returns them too.


# %%
def per_token(layer, values):
    """Apply a layer for one vector to (batch, tokens, ...)."""
    return jax.vmap(jax.vmap(layer))(values)


class DecoderLayer(eqx.Module):
    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    moe_norm: eqx.nn.LayerNorm
    moe: bx.RoutedAndSharedMoE

    def __init__(self, config, layer_idx, *, key):
        attention_key, moe_key = jax.random.split(key)
        self.attention_norm = eqx.nn.LayerNorm(config.hidden_size)
        self.attention = eqx.nn.MultiheadAttention(4, config.hidden_size, key=attention_key)
        self.moe_norm = eqx.nn.LayerNorm(config.hidden_size)
        self.moe = bx.RoutedAndSharedMoE.from_config(config, layer_idx, key=moe_key)

    def __call__(self, hidden_states, input_ids):
        causal = jnp.tri(input_ids.shape[-1], dtype=bool)
        normed = per_token(self.attention_norm, hidden_states)
        attended = jax.vmap(lambda x: self.attention(x, x, x, mask=causal))(normed)
        hidden_states = hidden_states + attended
        output, routing = self.moe(per_token(self.moe_norm, hidden_states), input_ids)
        return hidden_states + output, routing


class ByteModel(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: jax.Array
    layers: list[DecoderLayer]
    head: eqx.nn.Linear

    def __init__(self, config, num_layers, max_tokens, *, key):
        keys = jax.random.split(key, num_layers + 3)
        self.embedding = eqx.nn.Embedding(config.vocab_size, config.hidden_size, key=keys[0])
        self.positions = jax.random.normal(keys[1], (max_tokens, config.hidden_size))
        self.head = eqx.nn.Linear(config.hidden_size, config.vocab_size, key=keys[2])
        self.layers = [
            DecoderLayer(config, layer_idx, key=key) for layer_idx, key in enumerate(keys[3:])
        ]

    def __call__(self, input_ids):
        """(batch, tokens) ids to (batch, tokens, vocab) logits, and one routing for each layer."""
        hidden_states = per_token(self.embedding, input_ids) + self.positions
        routings = []
        for layer in self.layers:
            hidden_states, routing = layer(hidden_states, input_ids)
            routings.append(routing)
        return per_token(self.head, hidden_states), routings


config = bx.MoEConfig(
    hidden_size=32,
    intermediate_size=32,
    num_experts=8,
    num_experts_per_token=2,
    vocab_size=256,
    num_hash_layers=1,  # layer 0 is routed by hash, the others by top-k
)
model = ByteModel(config, num_layers=2, max_tokens=64, key=jax.random.key(0))
assert isinstance(model.layers[0].moe.routed.router, bx.HashRouter)
assert isinstance(model.layers[1].moe.routed.router, bx.TopKRouter)
display(bx.summary(model))

# %% [markdown]
# ## The text
#
# The top-level modules of your Python's standard library, as bytes. The yardstick for the loss is
# the entropy of the byte frequencies: what is possible without looking at the context.

# %% tags=["machine"]
folder = pathlib.Path(sysconfig.get_path("stdlib"))
text = np.frombuffer(b"".join(f.read_bytes() for f in sorted(folder.glob("*.py"))), np.uint8)
frequency = np.bincount(text, minlength=256) / text.size
yardstick = -sum(p * math.log2(p) for p in frequency if p > 0)
print(f"{text.size:,} bytes; byte frequencies alone: {yardstick:.2f} bits per byte")


def windows(step, batch=16, length=64):
    """Random windows of `length + 1` bytes."""
    starts = np.random.default_rng(step).integers(0, text.size - length - 1, batch)
    return jnp.asarray(text[starts[:, None] + np.arange(length + 1)], jnp.int32)


# %% [markdown]
# ## The training step
#
# The step of the README. What differs from a dense model is `has_aux=True`, the mask of the
# optimizer, and one line after the optimizer: `rebalance` moves the selection bias of every top-k
# router by `rate` towards equal load. It leaves the hash layer as it is.


# %% tags=["machine"]
def loss_function(model, tokens):
    logits, routings = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), routings


optimizer = optax.adamw(5e-3, mask=bx.decay_mask)


@eqx.filter_jit
def step(model, optimizer_state, tokens):
    (loss, routings), gradients = eqx.filter_value_and_grad(loss_function, has_aux=True)(
        model, tokens
    )
    parameters = eqx.filter(model, eqx.is_inexact_array)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
    model = eqx.apply_updates(model, updates)
    model = bx.rebalance(model, routings, rate=1e-2)  # after the optimizer
    return model, optimizer_state, loss, [bx.expert_load(routing) for routing in routings]


untrained = model
optimizer_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
losses, violations = [], []
for i in range(200):
    model, optimizer_state, loss, loads = step(model, optimizer_state, windows(i))
    losses.append(float(loss) / math.log(2))
    violations.append([float(bx.max_violation(load)) for load in loads])

first, last = np.mean(losses[:5]), np.mean(losses[-20:])
violations = np.array(violations)
print(f"bits per byte: {first:.2f} in the first 5 steps, {last:.2f} in the last 20")
print("MaxVio of hash and top-k layer, steps 1-20:   ", violations[:20].mean(axis=0).round(2))
print("MaxVio of hash and top-k layer, steps 181-200:", violations[-20:].mean(axis=0).round(2))
assert last < yardstick < first
assert violations[-20:, 1].mean() < violations[:20, 1].mean()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=90, layout="constrained")
left.plot(losses, color="#0072B2", lw=1.2)
left.axhline(yardstick, color="0.35", ls="--", lw=1, label="byte frequencies alone")
left.legend(frameon=False)
left.set(xlabel="Training step", ylabel="Bits per byte", title="Loss")
bx.plot_balance(np.arange(200), violations, ax=right, layer_names=["0 hash", "1 top-k"])
plt.show()

# %% [markdown]
# A report on fresh windows: who goes where, and which bytes each expert sees most.

# %% tags=["machine"]
tokens = windows(10_000)
_, routings = eqx.filter_jit(model)(tokens[:, :-1])
report = bx.report(routings, model=model, input_ids=tokens[:, :-1], decode=chr, num_top_tokens=4)
assert report.load.sum() == 2 * tokens[:, :-1].size * config.num_experts_per_token
display(report)

# %% [markdown]
# ## Trap 1: weight decay eats the selection bias
#
# The bias is a float array, so `eqx.filter(model, eqx.is_inexact_array)` contains it. Its gradient
# is exactly 0. But AdamW takes `learning rate × decay × parameter` away from every parameter, and
# so works against the balancing. Here are twenty updates, with and without the mask.


# %%
def bias_of(model):
    return model.layers[1].moe.routed.router.score_correction_bias


@eqx.filter_jit
def gradient_of(model, tokens):
    return eqx.filter_grad(loss_function, has_aux=True)(model, tokens)[0]


biased = eqx.tree_at(bias_of, model, jnp.full(config.num_experts, 0.5))
gradients = gradient_of(biased, tokens)
assert not np.any(bias_of(gradients))


def after_twenty_updates(optimizer):
    parameters = eqx.filter(biased, eqx.is_inexact_array)
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    for _ in range(20):
        updates, state = update(gradients, state, parameters)
        parameters = eqx.apply_updates(parameters, updates)
    return np.asarray(bias_of(parameters))


without = after_twenty_updates(optax.adamw(1e-2, weight_decay=0.1))
masked = after_twenty_updates(optax.adamw(1e-2, weight_decay=0.1, mask=bx.decay_mask))
print("bias at the start:  ", 0.5)
print("adamw:              ", without[0])
print("adamw with the mask:", masked[0])
assert np.allclose(without, 0.5 * (1 - 1e-2 * 0.1) ** 20, rtol=0, atol=1e-5)
assert np.array_equal(masked, np.full(config.num_experts, 0.5, np.float32))

# %% [markdown]
# ## Trap 2: a tree of labels gets called
#
# `optax.partition` gives each parameter the optimizer of its label, and takes the labels as a tree
# or as a function. A tree with the structure of your model *is* your model, with labels in it, and
# it has a `__call__`. So optax takes it for a function, and calls it with the parameters. Give it a
# function: nothing can go wrong then, and `bx.decay_mask` is one for the same reason.


# %%
def labels_of(params):
    return jax.tree.map(lambda yes: "train" if yes else "keep", bx.trainable(params))


parameters = eqx.filter(model, eqx.is_inexact_array)
two_optimizers = {"train": optax.adamw(1e-2, weight_decay=0.1), "keep": optax.set_to_zero()}
tree = labels_of(parameters)
assert callable(tree)
try:
    optax.partition(two_optimizers, tree).init(parameters)
except Exception:  # what it says depends on the model
    print("a tree: optax calls it, which fails")
else:
    raise AssertionError("optax did not call the tree")

kept = after_twenty_updates(optax.partition(two_optimizers, labels_of))
print("a function: the bias stays at", kept[0])
assert np.array_equal(kept, masked)

# %% [markdown]
# ## Trap 3: leaves that must stay fixed
#
# `eqx.filter_grad` differentiates float arrays only, so the hash table, an int32 array, has no
# gradient at all, and no optimizer sees it. Plain `jax.grad` refuses the whole model because of it.
# If you prefer to split the model, `bx.trainable(model)` says which leaves are trained: neither the
# table nor the bias. The optimizer then holds no state for them, and needs no mask.

# %%
assert model.layers[0].moe.routed.router.table.dtype == jnp.int32
assert gradients.layers[0].moe.routed.router.table is None

trained, fixed = eqx.partition(model, bx.trainable(model))
assert bias_of(trained) is None and bias_of(fixed) is not None
print("fixed arrays:", [f"{x.dtype} {x.shape}" for x in jax.tree.leaves(fixed) if eqx.is_array(x)])

# To freeze more, edit the specification: here the embedding.
spec = eqx.tree_at(lambda m: m.embedding.weight, bx.trainable(model), False)
trained, fixed = eqx.partition(model, spec)
assert trained.embedding.weight is None and fixed.embedding.weight is not None

# The trained model still has the table it was made with.
before, after = (m.layers[0].moe.routed.router.table for m in (untrained, model))
assert np.array_equal(before, after)
assert np.any(bias_of(model) != bias_of(untrained))

# %% [markdown]
# ## Trap 4: one balancing step for each optimizer step
#
# The sign of the update is decided by the load of the *whole* step. With gradient accumulation,
# collect the routings and rebalance once. A `jax.lax.scan` over micro-batches stacks them for you,
# and `rebalance` sums the additional axis. Forgetting a layer is an error, not a silent shift.

# %%
micro_batches = tokens[:, :-1].reshape(4, 4, 64)


@eqx.filter_jit
def accumulate(model, micro_batches):
    return jax.lax.scan(lambda _, ids: (None, model(ids)[1]), None, micro_batches)[1]


stacked = accumulate(model, micro_batches)
assert stacked[1].indices.shape == (4, 4, 64, 2)
from_scan = bias_of(bx.rebalance(model, stacked, rate=1e-2))
from_batch = bias_of(bx.rebalance(model, routings, rate=1e-2))
assert np.array_equal(from_scan, from_batch)

try:
    bx.rebalance(model, routings[1:], rate=1e-2)
except ValueError as error:
    print("ValueError:", error)
else:
    raise AssertionError("a missing routing must be an error")

# To name the router yourself:
named = bx.rebalance(model, routings[1], 1e-2, where=lambda m: m.layers[1].moe.routed.router)
assert np.array_equal(bias_of(named), from_batch)

# %% [markdown]
# ## Trap 5: vmap is right, but not the fast way
#
# In Equinox you write a layer for one example and use `jax.vmap`. That works here too, with the
# same outputs and gradients. But under `vmap` the gradient of the expert weights is formed for each
# example and then summed, so pass the batch axis to the block itself. `vmap` is for gradients of
# each example.

# %%
block = model.layers[1].moe
example = jax.random.normal(jax.random.key(1), (64, 64, config.hidden_size))


def native_loss(block, x):
    return jnp.mean(block(x)[0] ** 2)


def vmapped_loss(block, x):
    return jnp.mean(jax.vmap(lambda one: block(one)[0])(x) ** 2)


native = eqx.filter_jit(eqx.filter_value_and_grad(native_loss))
vmapped = eqx.filter_jit(eqx.filter_value_and_grad(vmapped_loss))
for a, b in zip(*(jax.tree.leaves(f(block, example)) for f in (native, vmapped)), strict=True):
    assert np.allclose(a, b, rtol=0, atol=1e-5)

of_each = jax.vmap(eqx.filter_grad(native_loss), in_axes=(None, 0))(block, example[:3])
assert of_each.routed.experts.gate_up.shape == (3, *block.routed.experts.gate_up.shape)
print("✓ the same loss and gradients; one gradient for each of 3 examples")

# %% tags=["machine"]
seconds = {}
for name, function in [("native axes", native), ("jax.vmap", vmapped)] * 5:
    start = time.perf_counter()
    jax.block_until_ready(function(block, example))
    seconds.setdefault(name, []).append(time.perf_counter() - start)
for name, values in seconds.items():
    print(f"{name:12} {1e3 * np.median(values):6.1f} ms, loss and gradient, 64 x 64 tokens")

# %% [markdown]
# ## Save and load
#
# The model is a PyTree, so Equinox's own functions do it. Bias and table are among the leaves.

# %%
file = io.BytesIO()
eqx.tree_serialise_leaves(file, model)
file.seek(0)
like = ByteModel(config, num_layers=2, max_tokens=64, key=jax.random.key(1))
loaded = eqx.tree_deserialise_leaves(file, like)
for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
    assert np.array_equal(before, after)
print(f"✓ {file.tell():,} bytes, all arrays equal")

# %% [markdown]
# ## What to remember
#
# * `from_config(config, layer_idx, key=...)` where the feed-forward network was; pass the ids, and
#   return the routings.
# * `optax.adamw(..., mask=bx.decay_mask)`, and `bx.rebalance(...)` once, after the optimizer.
# * Give the block all its axes. Use `jax.vmap` around it where you need it.

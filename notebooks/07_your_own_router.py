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
# # Your own router
#
# **Can a router that the library does not have be written in twenty lines, and does everything
# else work with it?**
#
# The router here measures distances: each expert has a prototype, and a token goes to the experts
# with the nearest ones. A busy expert raises its price, which keeps the load even. After that come
# experts with another activation. Both are put into an ordinary block, which is trained, mapped
# with `jax.vmap`, saved, loaded and reported on.
#
# Runs in about half a minute on a laptop.

# %%
import pathlib
import tempfile
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array, Float

import braidax as bx

jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# ## The router
#
# A router has a `bx.Gate`, which computes logits and scores. `bx.AbstractRouter` calls `select`,
# and the gate turns the scores of the chosen experts into weights. A new router says how it
# selects.
#
# The squared distance from a token `x` to a prototype `w` is `|x|² - 2 x·w + |w|²`. The first part
# is the same for all experts, and `x·w` is the logit. So `2 logit - |w|²` is highest for the
# nearest prototype.


# %%
class PrototypeRouter(bx.AbstractRouter):
    """Selects the experts whose prototypes are nearest, plus a price for busy ones."""

    gate: bx.Gate
    num_experts_per_token: int = eqx.field(static=True)
    price: Float[Array, " experts"]
    untrained_fields: ClassVar[tuple[str, ...]] = ("price",)

    def select(self, scores, logits, input_ids, *, key):
        nearness = 2 * logits - jnp.sum(self.gate.weight**2, axis=-1) - self.price
        _, indices = jax.lax.top_k(jax.lax.stop_gradient(nearness), self.num_experts_per_token)
        return indices, ~jnp.isnan(nearness).any(axis=-1)

    def rebalanced(self, rule, item):
        return eqx.tree_at(lambda router: router.price, self, rule(self.price, item))


def new_price(price, routing, rate):
    load = bx.expert_load(routing)
    return price + rate * (load / jnp.maximum(load.mean(), 1) - 1)


# %% [markdown]
# * `select` returns the indices, and which tokens have an answer. A token without one gets NaN.
# * `untrained_fields` names the arrays that no gradient should train: `bx.trainable` and
#   `bx.decay_mask` leave them out.
# * `rebalanced` is what `bx.rebalance` calls, with its rule and a `Routing`. Here a price rises in
#   proportion to the load above the mean. A router without this method stays as it is.
#
# Compare with distances in numpy:

# %%
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN = 512, 16, 32, 8, 2
keys = jax.random.split(jax.random.key(0), 6)
gate = bx.Gate(HIDDEN, EXPERTS, key=keys[0])
gate = eqx.tree_at(lambda g: g.weight, gate, jax.random.normal(keys[0], (EXPERTS, HIDDEN)))
router = PrototypeRouter(gate, PER_TOKEN, price=jnp.zeros(EXPERTS))
x = jax.random.normal(keys[1], (TOKENS, HIDDEN))
routing = router(x)

points, prototypes = np.asarray(x, np.float64), np.asarray(router.gate.weight, np.float64)
distance = np.linalg.norm(points[:, None] - prototypes[None], axis=-1)
nearest = np.argsort(distance, axis=1)[:, :PER_TOKEN]
assert np.array_equal(nearest, routing.indices)
print(f"✓ the {PER_TOKEN} nearest of {EXPERTS} prototypes, for {TOKENS} tokens")
print(routing)

# %% [markdown]
# ## The experts
#
# Experts get rows that are sorted by expert, how many rows each expert has, and the grouped
# product to multiply with. They never see a token or a weight. These have one matrix less than
# SwiGLU, and a squared ReLU in the middle.


# %%
class SquaredReLUExperts(bx.AbstractExperts):
    """`down(relu(up(row))²)`, a matrix pair for each expert."""

    up: Float[Array, "experts intermediate hidden"]
    down: Float[Array, "experts intermediate hidden"]

    def __call__(self, rows, group_sizes, matmul):
        before = matmul(rows, self.up, group_sizes, transposed=True)
        return matmul(jax.nn.relu(before) ** 2, self.down, group_sizes)


shape = (EXPERTS, INTERMEDIATE, HIDDEN)
experts = SquaredReLUExperts(
    up=jax.random.normal(keys[2], shape) * HIDDEN**-0.5,
    down=jax.random.normal(keys[3], shape) * INTERMEDIATE**-0.5,
)
block = bx.RoutedMoE(router, experts)
output, routing = block(x)

# The same in numpy, token by token.
up, down = np.asarray(experts.up, np.float64), np.asarray(experts.down, np.float64)
by_hand = np.zeros((TOKENS, HIDDEN))
for token, (chosen, weights) in enumerate(zip(routing.indices, routing.weights, strict=True)):
    for expert, weight in zip(np.asarray(chosen), np.asarray(weights, np.float64), strict=True):
        activation = np.maximum(up[expert] @ points[token], 0) ** 2
        by_hand[token] += weight * (activation @ down[expert])
assert np.allclose(output, by_hand, rtol=1e-5, atol=1e-5)
print("✓ the block with both: by hand = braidax")

# %%
bx.summary(block)

# %% [markdown]
# ## It maps, compiles and differentiates
#
# Nothing was written for this: `jax.vmap` over examples gives the answer of one call with a leading
# axis. A token with a NaN gets NaN, and no other token notices.

# %%
batched = x.reshape(8, 64, HIDDEN)
mapped, mapped_routing = jax.vmap(block)(batched)
assert np.allclose(mapped.reshape(TOKENS, HIDDEN), output, rtol=0, atol=1e-5)
assert np.array_equal(mapped_routing.indices.reshape(TOKENS, PER_TOKEN), routing.indices)

compiled, _ = eqx.filter_jit(block)(x)
assert np.allclose(compiled, output, rtol=0, atol=1e-5)

broken, _ = block(x.at[7].set(jnp.nan))
assert np.isnan(broken[7]).all()
assert np.array_equal(np.delete(broken, 7, axis=0), np.delete(output, 7, axis=0))

mask = jnp.arange(TOKENS) != 7
masked, masked_routing = block(x.at[7].set(jnp.nan), mask=mask)
assert not np.asarray(masked[7]).any()
assert int(bx.expert_load(masked_routing).sum()) == PER_TOKEN * (TOKENS - 1)
# A batch without a valid token has no load, and must not turn prices into NaN.
_, empty = block(x, mask=jnp.zeros(TOKENS, bool))
assert np.isfinite(bx.rebalance(block, empty, rule=partial(new_price, rate=0.3)).router.price).all()
print("✓ vmap, jit, NaN, padding")

# %% [markdown]
# ## A task with structure
#
# Tokens come from eight clusters, and each cluster has a linear map of its own that the block has
# to learn. The clusters are not equally common: the largest has 30 % of the tokens.

# %%
CLUSTERS, STEPS = 8, 300
share = np.array([0.30, 0.20, 0.14, 0.11, 0.09, 0.07, 0.05, 0.04])
centres = 1.2 * jax.random.normal(keys[4], (CLUSTERS, HIDDEN))
maps = jax.random.normal(keys[5], (CLUSTERS, HIDDEN, HIDDEN)) * HIDDEN**-0.5


def sample(key):
    """Clusters, hidden states, and the answer."""
    first, second = jax.random.split(key)
    cluster = jax.random.choice(first, CLUSTERS, (TOKENS,), p=jnp.asarray(share))
    x = centres[cluster] + 0.5 * jax.random.normal(second, (TOKENS, HIDDEN))
    return cluster, x, jnp.einsum("th,tho->to", x, maps[cluster])


def loss_of(trained, fixed, x, y):
    output, routing = eqx.combine(trained, fixed)(x)
    return jnp.mean((output - y) ** 2), routing


optimizer = optax.adamw(5e-3, mask=bx.decay_mask)


@eqx.filter_jit
def step(block, state, key, rate):
    """One step of the optimizer, one of the prices."""
    _, x, y = sample(key)
    trained, fixed = eqx.partition(block, bx.trainable(block))
    (loss, routing), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained, fixed, x, y)
    updates, state = optimizer.update(gradient, state, trained)
    block = eqx.combine(eqx.apply_updates(trained, updates), fixed)
    block = bx.rebalance(block, routing, rule=partial(new_price, rate=rate))
    return block, state, loss, bx.expert_load(routing)


def train(block, rate):
    state = optimizer.init(eqx.filter(block, bx.trainable(block)))
    losses, loads = [], []
    for key in jax.random.split(jax.random.key(1), STEPS):
        block, state, loss, load = step(block, state, key, rate)
        losses.append(float(loss))
        loads.append(np.asarray(load))
    return block, np.array(losses), np.array(loads)


runs = {name: train(block, rate) for name, rate in (("without prices", 0.0), ("with prices", 0.3))}

# %%
last = slice(-50, None)
violation = {name: loads.max(1) / loads.mean(1) - 1 for name, (_, _, loads) in runs.items()}

# %% tags=["machine"]
for name, (trained, losses, _) in runs.items():
    print(
        f"{name:15}  loss {losses[:10].mean():.2f} -> {losses[last].mean():.2f}"
        f"  MaxVio {violation[name][last].mean():.2f}"
        f"  prices {trained.router.price.min():.1f} to {trained.router.price.max():.1f}"
    )

# %%
free, priced = (trained for trained, _, _ in runs.values())
for _, losses, _ in runs.values():
    assert losses[last].mean() < losses[:10].mean() / 5
assert violation["with prices"][last].mean() < violation["without prices"][last].mean() / 2
# Without `rebalance` nothing touches a price: no gradient, no weight decay.
assert not np.asarray(free.router.price).any()

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110, layout="constrained")
for (name, (_, losses, _)), colour in zip(runs.items(), ("#D55E00", "#0072B2"), strict=True):
    axes[0].plot(losses, color=colour, label=name, lw=1.2)
    axes[1].plot(violation[name], color=colour, label=name, lw=1.2)
axes[0].set(xlabel="step", ylabel="mean squared error", yscale="log", title="Loss")
axes[1].set(xlabel="step", ylabel="MaxVio", title="Imbalance, 0 is even", ylim=(0, None))
axes[0].legend(frameon=False)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Both learn the task. With prices the load is nearly even. The price of a busy expert rises until
# some of its tokens go elsewhere, and the price of an idle one falls.
#
# ## What it learned
#
# The rows are the clusters, the largest first, and the columns are the experts. A cell is the
# share of the cluster's assignments that went to the expert.

# %%
cluster, x, _ = sample(jax.random.key(2))
routings = {name: block(x)[1] for name, (block, _, _) in runs.items()}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), dpi=110, layout="constrained", sharey=True)
for ax, (name, routing) in zip(axes, routings.items(), strict=True):
    counts = np.zeros((CLUSTERS, EXPERTS))
    np.add.at(counts, (np.asarray(cluster)[:, None], np.asarray(routing.indices)), 1)
    image = ax.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=0.5)
    ax.set(xlabel="expert", title=name.capitalize(), xticks=range(EXPERTS))
    ax.set_yticks(range(CLUSTERS), [f"{c} ({100 * s:.0f} %)" for c, s in enumerate(share)])
axes[0].set_ylabel("cluster (share of tokens)")
figure.colorbar(image, ax=axes, label="share of assignments")
plt.show()

# %% [markdown]
# The library's report and plots take the `Routing` of any router, and name its class.

# %% tags=["machine"]
bx.report(routings["with prices"], model=priced)

# %%
figure, ax = plt.subplots(figsize=(5.2, 4.2), dpi=110, layout="constrained")
bx.plot_coactivation(routings["with prices"], ax=ax)
plt.show()

# %% [markdown]
# ## Save and load
#
# Equinox serializes any module. `bx.save_moe` writes the names of DeepSeek's releases, where such a
# router does not exist, so it refuses.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "block.eqx")
    eqx.tree_serialise_leaves(path, priced)
    loaded = eqx.tree_deserialise_leaves(path, like=block)
    try:
        shared = bx.FeedForward(HIDDEN, INTERMEDIATE, key=keys[0])
        moe = bx.RoutedAndSharedMoE(priced, shared)
        bx.save_moe(pathlib.Path(folder, "layer.safetensors"), moe, 0)
    except TypeError as error:
        print("TypeError:", error)
    else:
        raise AssertionError("save_moe took a router that no release has")

for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(priced), strict=True):
    assert np.array_equal(one, other)
assert np.array_equal(loaded(x)[0], priced(x)[0])
print("✓ the loaded block is the saved one, bit for bit")

# %% [markdown]
# ## What to remember
#
# * A router is a gate and a `select`. Logits, scores, weights and padding are taken care of.
# * Experts are a function of rows and group sizes. The product to use is handed to them.
# * `untrained_fields` and `rebalanced` connect a router to the optimizer and to balancing.
# * Dispatch, losses, reports and plots only look at the `Routing`, so they work with any router.

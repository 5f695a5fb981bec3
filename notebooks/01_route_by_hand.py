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
# # Route by hand
#
# **What does a mixture-of-experts layer do to a token, number by number?**
#
# Eight words go through the four stages of the layer: router, dispatch, experts, combine. Every
# step is worked out in plain numpy (float64) and checked against `braidax`. Then the same words
# go through a hash router, one word becomes padding, and the load gets one balancing step.
#
# Runs in well under a minute on a laptop.

# %%
import hashlib
import struct

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import braidax as bx

# Full float32 products on every platform, so that the checks hold on a GPU too.
jax.config.update("jax_default_matmul_precision", "highest")


def table(header, rows, digits=4):
    """Print rows as an aligned table, floats rounded to `digits`."""

    def text(value):
        if isinstance(value, (float, np.floating)):
            return f"{round(float(value), digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.0"
        return str(value)

    cells = [[str(name) for name in header]] + [[text(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    for row in [cells[0], rule, *cells[1:]]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def check(name, by_hand, library):
    """Integers must be equal, floats within 1e-5."""
    by_hand, library = np.asarray(by_hand), np.asarray(library)
    assert by_hand.shape == library.shape, name
    if np.issubdtype(by_hand.dtype, np.integer):
        assert np.array_equal(by_hand, library), name
    else:
        assert np.allclose(by_hand, library, rtol=0, atol=1e-5), name
    print(f"✓ {name}: by hand = braidax")


# %% [markdown]
# ## The input
#
# Eight words, six different ones, so `the` and `river` come twice. Each has an id and a hidden
# state of 4 numbers. A repeated word has the same id but another hidden state, because its
# context differs. The numbers are random, rounded to one decimal.

# %%
words = "the river forks and the river joins again".split()
vocabulary = list(dict.fromkeys(words))
ids = np.array([vocabulary.index(word) for word in words])
tokens, hidden, experts, top_k, intermediate = 8, 4, 6, 2, 3
scaling_factor, limit = 1.5, 1.0

random = np.random.default_rng(185)  # a seed for which the bias and the clamp both matter
x = random.integers(-20, 21, (tokens, hidden)) / 10
gate_weight = random.integers(-9, 10, (experts, hidden)) / 10
gate_up = random.integers(-9, 10, (experts, 2, intermediate, hidden)) / 10
down = random.integers(-9, 10, (experts, intermediate, hidden)) / 10
shared_gate_up = random.integers(-9, 10, (2, intermediate, hidden)) / 10
shared_down = random.integers(-9, 10, (intermediate, hidden)) / 10
bias = np.array([0.2, -0.2, 0.1, 0.0, -0.1, 0.0])

names = [f"{i} {word}" for i, word in enumerate(words)]
expert_names = [f"e{e}" for e in range(experts)]
coordinates = [f"h{i}" for i in range(hidden)]
print("hidden states")
table(["token", "id", *coordinates], zip(names, ids, *x.T, strict=True), digits=1)
print("\ngate weight and selection bias")
table(
    ["expert", *coordinates, "bias"],
    zip(expert_names, *gate_weight.T, bias, strict=True),
    digits=1,
)

# %% [markdown]
# The same numbers in a `braidax` block. Modules are immutable: `eqx.tree_at` returns a copy with
# our weights in it.

# %%
keys = jax.random.split(jax.random.key(0), 4)


def with_values(module, **values):
    """`module` with the named fields replaced, in float32."""
    fields = list(values)
    arrays = [jnp.asarray(values[field], jnp.float32) for field in fields]
    return eqx.tree_at(lambda m: [getattr(m, field) for field in fields], module, arrays)


router = bx.TopKRouter(hidden, experts, top_k, scaling_factor=scaling_factor, key=keys[0])
router = with_values(router, score_correction_bias=bias)
router = eqx.tree_at(lambda r: r.gate, router, with_values(router.gate, weight=gate_weight))
activation = bx.activations.swiglu(limit)
stack = bx.Experts(experts, hidden, intermediate, activation=activation, key=keys[1])
stack = with_values(stack, gate_up=gate_up, down=down)
shared = bx.FeedForward(hidden, intermediate, activation=activation, key=keys[2])
shared = with_values(shared, gate_up=shared_gate_up, down=shared_down)
block = bx.RoutedAndSharedMoE(bx.RoutedMoE(router, stack), shared)

hidden_states = jnp.asarray(x, jnp.float32)
output, routing = block(hidden_states)
print("output", output.shape, " indices", routing.indices.shape, routing.indices.dtype)

# %% [markdown]
# ## Stage 1: the router
#
# One logit for each token and expert, `x · weightᵀ`. The score is `sqrt(log(1 + e^logit))`:
# always positive, and growing slowly.

# %%
logits = x @ gate_weight.T
scores = np.sqrt(np.log1p(np.exp(logits)))
print("logits")
table(["token", *expert_names], zip(names, *logits.T, strict=True))
print("\nscores")
table(["token", *expert_names], zip(names, *scores.T, strict=True))
print()
check("logits", logits, routing.logits)
check("scores", scores, routing.scores)

# %% [markdown]
# **Select.** The bias is added, and the two highest sums win (`*`). The last column is the choice
# without the bias, and `<` marks the tokens for which the bias changed the pair. The order within
# a pair does not matter.


# %%
def top_two(values):
    """The two best experts of each token, the best first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :top_k]


def pair(experts_of_token):
    return " ".join(f"e{e}" for e in experts_of_token)


def starred(values, chosen):
    return [f"{v:.4f}{'*' if e in chosen else ' '}" for e, v in enumerate(values)]


corrected = scores + bias
indices, unbiased = top_two(corrected), top_two(scores)
changed = [t for t in range(tokens) if set(indices[t]) != set(unbiased[t])]
print("score + bias")
table(
    ["token", *[f"{name} " for name in expert_names], "selected", "without bias"],
    [
        [
            names[t],
            *starred(corrected[t], indices[t]),
            pair(indices[t]),
            pair(unbiased[t]) + (" <" if t in changed else "  "),
        ]
        for t in range(tokens)
    ],
)
print()
check("indices", indices, routing.indices)
assert changed == [0, 2, 3]

# %% [markdown]
# **Weigh.** The bias is now forgotten. The weights are the *unbiased* scores of the selected
# experts, divided by their sum, times the scaling factor 1.5.

# %%
selected = np.take_along_axis(scores, indices, axis=1)
total = selected.sum(axis=1, keepdims=True)
weights = selected / total * scaling_factor
table(
    ["token", "experts", "score 1", "score 2", "sum", "weight 1", "weight 2"],
    [[names[t], pair(indices[t]), *selected[t], total[t, 0], *weights[t]] for t in range(tokens)],
)
print()
check("weights", weights, routing.weights)
assert np.allclose(weights.sum(axis=1), scaling_factor)

# With biased scores the weights would be different: the bias really is left out.
biased = np.take_along_axis(corrected, indices, axis=1)
biased = biased / biased.sum(axis=1, keepdims=True) * scaling_factor
assert np.abs(biased - np.asarray(routing.weights)).max() > 0.01

# %% [markdown]
# ## Stage 2: dispatch
#
# 8 tokens × 2 experts = 16 assignments, numbered `token * 2 + slot`. A stable sort by expert
# brings each expert's work together. `order` says which assignment is in each row, and
# `group_sizes` how many rows each expert gets. Expert 5 gets none, which is fine.

# %%
assigned = indices.reshape(-1)
order = np.argsort(assigned, kind="stable")
group_sizes = np.bincount(assigned, minlength=experts)
row_token, row_expert = order // top_k, assigned[order]
rows = x[row_token]
table(
    ["row", "expert", "order", "slot", "token", *coordinates],
    [
        [r, f"e{row_expert[r]}", order[r], order[r] % top_k, names[row_token[r]], *rows[r]]
        for r in range(len(order))
    ],
    digits=1,
)
print()
seen = {}


class ShownExperts(bx.AbstractExperts):
    """Experts that keep what they are given, and hand their rows back."""

    def __call__(self, rows, group_sizes, matmul):
        jax.debug.callback(
            lambda *given: seen.update(rows=given[0], sizes=given[1]), rows, group_sizes
        )
        return rows


bx.RoutedMoE(router, ShownExperts())(hidden_states)
jax.effects_barrier()
check(f"group_sizes {group_sizes}", group_sizes, seen["sizes"])
check("rows", rows, seen["rows"])

# %% [markdown]
# ## Stage 3: experts
#
# An expert is a small network, SwiGLU: two projections, `gate` and `up`, then
# `silu(gate) * up`, then `down`. Before that, the gate is clamped from above and the up
# projection on both sides, here at 1. First row 0 in full, then all rows.


# %%
def silu(values):
    return values / (1 + np.exp(-values))


def swiglu(row, gate_up, down):
    gate, up = gate_up @ row
    return (silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)) @ down


first = row_expert[0]
gate, up = gate_up[first] @ rows[0]
clamped_gate, clamped_up = np.minimum(gate, limit), np.clip(up, -limit, limit)
activated = silu(clamped_gate) * clamped_up
units = [f"u{i}" for i in range(intermediate)]
print(f"expert {first}, row 0 = token {names[row_token[0]]}: weights")
table(
    ["unit", *[f"gate {c}" for c in coordinates], *[f"up {c}" for c in coordinates]],
    [[units[i], *gate_up[first, 0, i], *gate_up[first, 1, i]] for i in range(intermediate)],
    digits=1,
)
print("\ngate = gate weights · row, up = up weights · row")
table(
    ["unit", "gate", "clamped", "silu", "up", "clamped", "silu * up"],
    zip(units, gate, clamped_gate, silu(clamped_gate), up, clamped_up, activated, strict=True),
)
print("\ndown weights, and the output: activation · down")
by_unit = [[units[i], *[f"{v:.1f}" for v in down[first, i]]] for i in range(intermediate)]
table(["", *coordinates], [*by_unit, ["output", *(activated @ down[first])]])
assert (gate > limit).any() and (up > limit).any() and (up < -limit).any()

# %%
# The same for all 16 rows, each with the weights of its own expert.
row_outputs = np.stack(
    [swiglu(row, gate_up[e], down[e]) for row, e in zip(rows, row_expert, strict=True)]
)
table(
    ["row", "expert", "token", *[f"out {c}" for c in coordinates]],
    [[r, f"e{row_expert[r]}", names[row_token[r]], *row_outputs[r]] for r in range(len(order))],
)
print()
for e in range(experts):  # each expert alone, as a SwiGLU of its own
    alone = with_values(shared, gate_up=gate_up[e], down=down[e])
    mine = row_expert == e
    assert np.allclose(alone(seen["rows"])[mine], row_outputs[mine], atol=1e-5)
print("✓ 16 expert outputs: by hand = braidax")

# %% [markdown]
# ## Stage 4: combine
#
# Each row goes back to its token, times its weight. A token has two rows, which are added. The
# shared expert sees every token and is added as it is, without a weight.

# %%
routed_output = np.zeros((tokens, hidden))
for r, assignment in enumerate(order):
    token, slot = divmod(assignment, top_k)
    routed_output[token] += weights[token, slot] * row_outputs[r]
shared_output = np.stack([swiglu(token, shared_gate_up, shared_down) for token in x])
by_hand = routed_output + shared_output

print("token 0")
parts = [
    [f"{weights[0, s]:.4f} × expert {indices[0, s]}", *(weights[0, s] * row_outputs[r])]
    for s in range(top_k)
    for r in np.flatnonzero(order == s)
]
table(["", *coordinates], [*parts, ["shared", *shared_output[0]], ["sum", *by_hand[0]]])
print("\nall tokens")
table(["token", *coordinates], zip(names, *by_hand.T, strict=True))
print()
check("routed sum", routed_output, block.routed(hidden_states)[0])
check("shared expert", shared_output, shared(hidden_states))
check("output of RoutedAndSharedMoE", by_hand, output)

# %% [markdown]
# ## The same words through a hash router
#
# A hash router has a fixed table: one row of experts for each id. It is built once, before
# training; `bx.hash_tables.md5` takes it from the MD5 digest of (layer, id). Nothing is left to
# choose, so both `the` go to the same experts. The gate still decides how much each one counts.

# %%
hash_table = bx.hash_tables.md5(len(vocabulary), experts, top_k, salt=0)
for token_id, row in enumerate(hash_table):
    n = int.from_bytes(hashlib.md5(struct.pack("<QQ", 0, token_id)).digest(), "little")
    n, j = divmod(n, experts)  # the first expert: one of 6
    pool = list(range(experts))
    pool[j] = pool[-1]  # it leaves the pool; the last one takes its place
    assert list(row) == [j, pool[n % (experts - 1)]]  # the second: one of the 5 left

hash_router = bx.HashRouter(
    hidden, experts, top_k, table=hash_table, scaling_factor=scaling_factor, key=keys[3]
)
hash_router = eqx.tree_at(lambda r: r.gate, hash_router, router.gate)
input_ids = jnp.asarray(ids, jnp.int32)
hashed = hash_router(hidden_states, input_ids)

hash_indices = hash_table[ids]
hash_selected = np.take_along_axis(scores, hash_indices, axis=1)
hash_weights = hash_selected / hash_selected.sum(axis=1, keepdims=True) * scaling_factor
table(
    ["id", "word", "experts"],
    [[i, vocabulary[i], pair(hash_table[i])] for i in range(len(vocabulary))],
)
print()
table(
    ["token", "id", "experts", "weight 1", "weight 2"],
    [[names[t], ids[t], pair(hash_indices[t]), *hash_weights[t]] for t in range(tokens)],
)
print()
check("hash indices", hash_indices, hashed.indices)
check("hash weights", hash_weights, hashed.weights)

# %% [markdown]
# Now turn every hidden state around (`-x`). The top-k router chooses other experts. The hash
# router keeps its experts, and only the weights move.

# %%
turned_top_k = router(-hidden_states)
turned_hash = hash_router(-hidden_states, input_ids)
table(
    ["token", "top-k: x", "-x", "hash: x", "-x", "weight 1: x", "-x"],
    [
        [
            names[t],
            pair(indices[t]),
            pair(np.asarray(turned_top_k.indices)[t]),
            pair(hash_indices[t]),
            pair(np.asarray(turned_hash.indices)[t]),
            hash_weights[t, 0],
            np.asarray(turned_hash.weights)[t, 0],
        ]
        for t in range(tokens)
    ],
)
assert np.array_equal(turned_hash.indices, hashed.indices)
assert not np.array_equal(turned_top_k.indices, routing.indices)
assert np.abs(turned_hash.weights - hashed.weights).max() > 0.01

# %% [markdown]
# ## Who goes where
#
# Top: one square for each assignment, with its weight. Bottom: the load, which is the number of
# squares in the column. The dashed line is the mean, 16 / 6.

# %%
figure, axes = plt.subplots(
    2, 2, figsize=(9, 6), dpi=110, sharex=True, height_ratios=[3, 1], layout="constrained"
)
columns = [
    ("Top-k: the hidden state decides", "#0072B2", indices, weights),
    ("Hash: the id decides", "#E69F00", hash_indices, hash_weights),
]
for (title, colour, chosen, weight), (strip, bars) in zip(columns, axes.T, strict=True):
    ink = "white" if colour == "#0072B2" else "black"
    for t, slot in np.ndindex(tokens, top_k):
        strip.add_patch(plt.Rectangle((chosen[t, slot] - 0.45, t - 0.42), 0.9, 0.84, fc=colour))
        strip.text(
            chosen[t, slot], t, f"{weight[t, slot]:.2f}", ha="center", va="center", color=ink
        )
    strip.set(xlim=(-0.6, experts - 0.4), ylim=(tokens - 0.4, -0.6), title=title)
    strip.set_yticks(range(tokens), names)
    strip.set_xticks(range(experts), expert_names)
    strip.hlines(np.arange(tokens - 1) + 0.5, -0.6, experts - 0.4, color="0.85", lw=0.8)
    strip.tick_params(length=0)
    count = np.bincount(chosen.reshape(-1), minlength=experts)
    bars.bar(range(experts), count, color=colour, width=0.9)
    bars.axhline(count.mean(), color="0.2", ls="--", lw=1)
    bars.set(xlabel="expert", ylabel="load", ylim=(0, 7), yticks=[0, 2, 4, 6])
    for edge in ("top", "right"):
        strip.spines[edge].set_visible(False)
        bars.spines[edge].set_visible(False)
plt.show()

# %% [markdown]
# ## Padding
#
# The last word becomes padding: `mask` is `False`, and to make it hard its hidden state is NaN.
# Its two assignments go to *nobody*, the index 6 after the last expert. Nobody's rows are sorted
# behind all others, into no group. The output of the word is 0, the word is not counted, and the
# other seven tokens keep their output.

# %%
mask = np.arange(tokens) < 7
padded_states = hidden_states.at[7].set(jnp.nan)
padded_output, padded_routing = block(padded_states, mask=jnp.asarray(mask))

kept = np.where(mask[:, None], indices, experts).reshape(-1)
padded_sizes = np.bincount(kept, minlength=experts + 1)[:experts]
bx.RoutedMoE(router, ShownExperts())(padded_states, mask=jnp.asarray(mask))
jax.effects_barrier()
table(
    ["", *expert_names, "sum"],
    [
        ["all tokens", *group_sizes, group_sizes.sum()],
        ["last one masked", *padded_sizes, padded_sizes.sum()],
    ],
)
print("\noutput of the masked token:", np.asarray(padded_output[7]))
print("its weights:               ", np.asarray(padded_routing.weights[7]), "\n")
check("group_sizes", padded_sizes, seen["sizes"])
check("load", padded_sizes, bx.expert_load(padded_routing))
check("output", np.where(mask[:, None], by_hand, 0), padded_output)
assert padded_routing.indices[7].tolist() == [experts, experts]
assert np.isnan(seen["rows"][-2:]).all() and np.isfinite(seen["rows"][:-2]).all()

# %% [markdown]
# ## Load and balance
#
# The load of an expert is its number of rows. `MaxVio = max(load) / mean(load) - 1` is 0 when all
# loads are equal. The balancing step needs no loss: the bias of an expert below the mean goes up
# by `rate`, above the mean down by `rate`. Training uses a rate near 0.001 and many steps; 0.1
# makes one step visible.

# %%
rate = 0.1
load = group_sizes
max_violation = load.max() / load.mean() - 1
sign = np.sign(load.mean() - load)
new_bias = bias + rate * sign
new_load = np.bincount(top_two(scores + new_bias).reshape(-1), minlength=experts)
new_violation = new_load.max() / new_load.mean() - 1

library_load = bx.expert_load(routing)
library_bias = bx.updated_bias(router.score_correction_bias, library_load, rate)
balanced = with_values(router, score_correction_bias=library_bias)

table(
    ["expert", "load", "mean", "sign", "bias", "new bias", "new load"],
    [
        [f"e{e}", load[e], load.mean(), f"{sign[e]:+.0f}", bias[e], new_bias[e], new_load[e]]
        for e in range(experts)
    ],
)
print(f"\nMaxVio before: {load.max()} / {load.mean():.4f} - 1 = {max_violation:.4f}")
print(f"MaxVio after:  {new_load.max()} / {new_load.mean():.4f} - 1 = {new_violation:.4f}\n")

check("load", load, library_load)
check("max_violation", max_violation, bx.max_violation(library_load))
check("updated_bias", new_bias, library_bias)
check("load after the step", new_load, bx.expert_load(balanced(hidden_states)))
assert new_violation < max_violation

# %% [markdown]
# ## What to remember
#
# * A router only answers *which experts, with what weight*. Top-k asks the hidden state, hash asks
#   the id. Both take their weights from the same scores.
# * The bias moves the selection and never enters the weights, so it balances the load without an
#   extra loss.
# * Dispatch is a sort, combine is a weighted sum. No token is dropped, and an expert without
#   rows does no work.
# * Padding reaches nothing, not even as NaN.

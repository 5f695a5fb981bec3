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
# # Hash routing
#
# **Which table should a hash layer use, and how evenly does it load the experts on real text?**
#
# A hash layer sends a token to experts by its id alone, through a fixed table. This notebook works
# out one row of the default table by hand, then counts what four tables do to 12 MB of real text
# (the source of your Python's standard library), as bytes, as pairs of bytes and as words.
#
# Runs in about 15 seconds on a laptop. The counts depend on your Python version; the claims do not,
# and each is asserted.

# %%
import collections
import hashlib
import re
import struct
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import braidax as bx
from braidax.training import read_corpus

num_experts, experts_per_token = 16, 4


def table(header, rows):
    """Print rows as an aligned table, floats with three digits."""

    def text(value):
        return f"{value + 0.0:.3f}" if isinstance(value, (float, np.floating)) else str(value)

    cells = [[str(name) for name in header]] + [[text(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    for row in [cells[0], rule, *cells[1:]]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


# %% [markdown]
# ## One row of the MD5 table by hand
#
# The default rule needs no random number generator: the MD5 digest of (salt, token id) is one large
# integer, and its remainders draw experts from a pool without putting them back. The salt is the
# layer index, so each hash layer gets a table of its own.

# %%
token, salt = 32, 1
digest = hashlib.md5(struct.pack("<QQ", salt, token)).digest()
n = int.from_bytes(digest, "little")
pool = list(range(num_experts))
print(f"md5(salt {salt}, token {token}) = {digest.hex()}\nn = {n}\n")

row, steps = [], []
for slot in range(experts_per_token):
    size = num_experts - slot
    n, remainder = divmod(n, size)
    row.append(pool[remainder])
    steps.append([slot, size, remainder, f"e{pool[remainder]}"])
    pool[remainder] = pool[size - 1]  # the last of the pool takes the drawn one's place
table(["slot", "pool size", "remainder", "expert"], steps)

md5_table = bx.hash_tables.md5(256, num_experts, experts_per_token, salt=salt)
assert md5_table.shape == (256, experts_per_token) and md5_table.dtype == np.int32
assert row == md5_table[token].tolist()
print(f"\n✓ row {token} of the library's table: {md5_table[token]}")

# %% [markdown]
# ## The same table on every host
#
# A table must not depend on the machine that builds it. A hash of its bytes shows that: these are
# the same everywhere. `balanced` gets counts by Zipf's law here (token `t` appears 1,000,000 / (t +
# 1) times), so that it does not depend on your text.

# %%
zipf = 1_000_000 // np.arange(1, 8193)
sizes = (8192, num_experts, experts_per_token)
digests = {
    "md5": bx.hash_tables.md5(*sizes, salt=1),
    "random": bx.hash_tables.random(*sizes, salt=1),
    "round_robin": bx.hash_tables.round_robin(*sizes, salt=1),
    "balanced": bx.hash_tables.balanced(zipf, num_experts, experts_per_token, salt=1),
}
digests = {n: hashlib.sha256(t.astype("<i4").tobytes()).hexdigest() for n, t in digests.items()}
expected = {
    "md5": "632656213e22fee0",
    "random": "2b136ceb0300443c",
    "round_robin": "7b4f1bb9ac712219",
    "balanced": "30dcb443a232765b",
}
for name, value in digests.items():
    print(f"{name:12} {value[:16]}")
    assert value.startswith(expected[name]), name

# %% tags=["machine"]
start = time.perf_counter()
large = bx.hash_tables.md5(129_280, 256, 6)
assert all(len(set(row)) == 6 for row in large.tolist())  # no expert twice in a row
print(f"DeepSeek-V4's size, {large.shape}: {time.perf_counter() - start:.1f} s")

# %% [markdown]
# ## The text, as ids
#
# The same text three times. A byte vocabulary has 256 ids. Pairs of bytes have 65,536. The words
# are the 8,191 most frequent pieces of the training part, plus one id for all others. One file in
# ten is held out, and no table sees it.

# %% tags=["machine"]
corpus = read_corpus()
print(corpus.describe(), "\n")


def pairs(data):
    even = data[: data.size // 2 * 2].reshape(-1, 2).astype(np.int64)
    return even[:, 0] * 256 + even[:, 1]


def split_words(data):
    return re.findall(rb"\w+|[^\w\s]|\s+", data.tobytes())


training_words = split_words(corpus.training)
known = [word for word, _ in collections.Counter(training_words).most_common(8191)]
word_id = {word: i for i, word in enumerate(known)}


def words(data):
    return np.array([word_id.get(word, 8191) for word in split_words(data)])


tokenizers = {"bytes": (256, np.asarray), "pairs": (65536, pairs), "words": (8192, words)}
spelling = {
    "bytes": lambda i: bytes([i]),
    "pairs": lambda i: i.to_bytes(2, "big"),
    "words": lambda i: [*known, b"(other)"][i],
}
counts, held_out, rows = {}, {}, []
for name, (vocab, ids_of) in tokenizers.items():
    counts[name] = np.bincount(ids_of(corpus.training), minlength=vocab)
    held_out[name] = np.bincount(ids_of(corpus.held_out), minlength=vocab)
    share = np.sort(counts[name])[::-1] / counts[name].sum()
    heaviest = int(counts[name].argmax())
    rows.append([name, vocab, np.count_nonzero(counts[name]), share[0], share[:10].sum()])
    rows[-1].append(repr(spelling[name](heaviest)))
table(["ids", "vocab", "seen", "share of 1st", "first 10", "the 1st"], rows)

# %% [markdown]
# ## Balanced by id is not balanced by frequency
#
# The load of an expert is the number of assignments it receives: the summed counts of the ids whose
# rows name it. `round_robin` gives every expert exactly the same number of *ids*. It does not help,
# because ids are not equally frequent. MaxVio is `max(load) / mean(load) - 1`: 0 is perfect
# balance, and 1 means that the fullest expert does twice the mean.


# %% tags=["machine"]
def load_of(hash_table, token_counts):
    """Assignments each expert receives, exactly."""
    load = np.zeros(num_experts, np.int64)
    np.add.at(load, hash_table.reshape(-1), np.repeat(token_counts, hash_table.shape[1]))
    return load


def max_violation(load):
    return load.max() / load.mean() - 1


tables = {}
for name, (vocab, _) in tokenizers.items():
    sizes = (vocab, num_experts, experts_per_token)
    tables[name] = {
        "round_robin": bx.hash_tables.round_robin(*sizes),
        "random": bx.hash_tables.random(*sizes),
        "md5": bx.hash_tables.md5(*sizes),
        "balanced": bx.hash_tables.balanced(counts[name], num_experts, experts_per_token),
    }

violation, rows = {}, []
for name in tokenizers:
    for rule, hash_table in tables[name].items():
        ids_per_expert = np.bincount(hash_table.reshape(-1), minlength=num_experts)
        training = max_violation(load_of(hash_table, counts[name]))
        unseen = max_violation(load_of(hash_table, held_out[name]))
        violation[name, rule] = training, unseen
        spread = f"{ids_per_expert.min()}-{ids_per_expert.max()}"
        rows.append([name, rule, spread, training, unseen])
table(["ids", "table", "ids per expert", "MaxVio training", "MaxVio held out"], rows)

# %%
for name, (vocab, _) in tokenizers.items():
    even = np.bincount(tables[name]["round_robin"].reshape(-1), minlength=num_experts)
    assert np.array_equal(even, np.full(num_experts, vocab * experts_per_token // num_experts))
    # No assignment is lost, whatever the rule.
    for hash_table in tables[name].values():
        total = counts[name].sum() * experts_per_token
        assert load_of(hash_table, counts[name]).sum() == total
    fixed = ("round_robin", "random", "md5")
    assert all(violation[name, rule][0] > 0.3 for rule in fixed)
    assert all(violation[name, "balanced"][0] < violation[name, rule][0] / 2 for rule in fixed)
assert violation["words", "balanced"][0] < 0.01 and violation["pairs", "balanced"][0] < 0.01
print("✓ balanced by id, uneven by load; `balanced` is even on the text it was counted on")

# %% [markdown]
# On the held-out files the `balanced` tables are close to even but not exact: those files use other
# words a little more often. That is the price of a table that is fixed before training.

# %%
assert all(violation[n, "balanced"][1] < violation[n, r][1] for n in tokenizers for r in fixed)
assert violation["words", "balanced"][1] < 0.2

figure, ax = plt.subplots(figsize=(8, 4), dpi=90, layout="constrained")
loads = [load_of(t, held_out[name]) for name in tables for t in tables[name].values()]
bx.plot_load(np.stack(loads), ax=ax, layer_names=[f"{n}, {r}" for n in tables for r in tables[n]])
ax.set(title="Load on held-out text", ylabel="")
plt.show()

# %% [markdown]
# ## What no table can do
#
# A table cannot split an id: each of the K experts of the most frequent id gets all of it. If that
# id is a share `s` of the text, then some expert has at least `s × E / K` times the mean load. In
# this text it is the space, or two of them. More experts for each token lower this floor, and
# `balanced` stays within 1 % of it.

# %% tags=["machine"]
rows = []
for name in tokenizers:
    share = counts[name].max() / counts[name].sum()
    for k in (1, 2, 4, 8):
        floor = max(0.0, share * num_experts / k - 1)
        best = bx.hash_tables.balanced(counts[name], num_experts, k)
        reached = max_violation(load_of(best, counts[name]))
        md5 = max_violation(
            load_of(bx.hash_tables.md5(counts[name].size, num_experts, k), counts[name])
        )
        rows.append([name, k, floor, reached, md5])
        assert floor - 1e-9 <= reached <= 1.01 * (1 + floor) - 1
        assert reached < md5 + 1e-9
table(["ids", "experts per token", "floor of MaxVio", "balanced", "md5"], rows)

# %% [markdown]
# A top-k router has no such floor: it may send the same id to other experts in another context.
#
# ## In a layer
#
# The table goes into a `HashRouter`, and the router into the block. The gate's weights are learned;
# the table is an int32 leaf, which no gradient and no optimizer touches. The load that the layer
# counts is the one counted by hand, to the last assignment.

# %% tags=["machine"]
hidden = 32
keys = jax.random.split(jax.random.key(0), 4)
router = bx.HashRouter(
    hidden, num_experts, experts_per_token, table=tables["words"]["balanced"], key=keys[0]
)
experts = bx.Experts(num_experts, hidden, 16, key=keys[1])
shared = bx.FeedForward(hidden, 16, key=keys[2])
layer = bx.RoutedAndSharedMoE(bx.RoutedMoE(router, experts), shared)

input_ids = words(corpus.held_out)[:4096].reshape(4, 1024)
hidden_states = jax.random.normal(keys[3], (4, 1024, hidden))
output, routing = eqx.filter_jit(layer)(hidden_states, jnp.asarray(input_ids))
assert np.array_equal(routing.indices, tables["words"]["balanced"][input_ids])

by_count = load_of(tables["words"]["balanced"], np.bincount(input_ids.reshape(-1), minlength=8192))
assert np.array_equal(bx.expert_load(routing), by_count)
print("load of 4,096 words:", by_count.tolist())
print(f"MaxVio: {max_violation(by_count):.2f}")

# %% [markdown]
# 4,096 words are a small sample, so the load is less even than on the whole text.
#
# One line of code through the same router, with the experts of each piece below it, the largest
# weight first. `name` comes three times, with the same four experts and other weights, because its
# hidden state differs.

# %%
line = np.frombuffer(b"if name is None: name = default  # the same name", np.uint8)
pieces, line_ids = split_words(line), jnp.asarray(words(line))
_, line_routing = layer(hidden_states[0, : len(pieces)], line_ids)
one, other, _ = [i for i, piece in enumerate(pieces) if piece == b"name"]
assert set(line_routing.indices[one].tolist()) == set(line_routing.indices[other].tolist())
assert not np.allclose(line_routing.weights[one], line_routing.weights[other])

figure, ax = plt.subplots(figsize=(8, 2.3), dpi=100, layout="constrained")
bx.plot_token_experts(line_routing, [piece.decode() for piece in pieces], ax=ax)
plt.show()

# %% [markdown]
# A table belongs to its tokenizer. An id that the table does not know is a mistake in the data, and
# it must not go unnoticed: that token becomes NaN, and no other token changes by a bit.

# %%
wrong = jnp.asarray(input_ids).at[0, 0].set(8192)  # the table has the ids 0 to 8191
damaged, _ = eqx.filter_jit(layer)(hidden_states, wrong)
assert np.isnan(damaged[0, 0]).all()
assert np.array_equal(damaged.reshape(-1, hidden)[1:], output.reshape(-1, hidden)[1:])

try:
    layer(hidden_states)  # no ids
except ValueError as error:
    print("without ids:", error)
else:
    raise AssertionError("a hash layer needs input_ids")

# %% [markdown]
# ## What to remember
#
# * The default, `md5`, needs nothing but the sizes. Choose it when the text is not known.
# * Equal numbers of ids are not equal loads. If you have counts, use `balanced`: on the same text
#   it reaches the floor, and on other text it stays close.
# * The floor is set by the most frequent id, `s × E / K - 1`. More experts for each token lower it,
#   and so does a tokenizer whose most frequent id is rarer.
# * Save the table with the model. It is part of the weights.

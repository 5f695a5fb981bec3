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
# # Expert parallelism
#
# **When the experts are spread over several devices, is the answer the same, and what does it cost
# to move the tokens?**
#
# A layer is spread over four virtual CPU devices. Outputs, gradients and drops are compared with
# one device. The bytes that move are read from the compiled programs and compared with the
# formulas of `bx.plan`. At the end, the same formulas are used for a layer of DeepSeek-V4-Flash.
#
# Virtual devices share the processor, so nothing here is a timing. Runs in about half a minute on a
# laptop.

# %%
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import braidax as bx

# Before anything else is computed: JAX counts its devices once.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
print(len(jax.devices()), "devices")
assert len(jax.devices("cpu")) == 4

# %% [markdown]
# ## One device
#
# 16 experts, 2 for each token, 512 tokens. This answer is the reference.

# %%
HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN, TOKENS = 128, 32, 16, 2, 512
config = bx.MoEConfig(HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN)
keys = jax.random.split(jax.random.key(0), 3)
block = bx.RoutedAndSharedMoE.from_config(config, 0, key=keys[0])
hidden_states = jax.random.normal(keys[1], (TOKENS, HIDDEN))
target = jax.random.normal(keys[2], (TOKENS, HIDDEN))


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def step(block, hidden_states):
    output, routing = block(hidden_states)
    return jnp.mean((output - target) ** 2), (output, routing)


(loss, (output, routing)), gradient = step(block, hidden_states)
print("loss", f"{loss:.4f}", " busiest expert", bx.expert_load(routing).max(), "assignments")

# %% [markdown]
# ## Four devices
#
# A mesh names its axes. `ExpertParallel` spreads the experts over the axis `"expert"`, and the
# tokens over both axes. `shard` returns the same model with its arrays placed. It is called as
# before.


# %%
GATHER, ALL_TO_ALL, RAGGED = bx.exchange.Gather(), bx.exchange.AllToAll, bx.exchange.Ragged()


def name_of(exchange):
    return type(exchange).__name__


def spread(shape, exchange=GATHER):
    """`ExpertParallel` on a mesh of `shape`, the sharded block, and the sharded tokens."""
    mesh = jax.make_mesh(shape, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    parallel = bx.ExpertParallel(mesh, exchange=exchange)
    over_all = NamedSharding(mesh, PartitionSpec(parallel.tokens))
    return parallel, parallel.shard(block), jax.device_put(hidden_states, over_all)


parallel, sharded, tokens = spread((1, 4))
print("device  gate_up (experts, 2, intermediate, hidden)  experts   tokens")
for weights, states in zip(
    sharded.routed.experts.gate_up.addressable_shards, tokens.addressable_shards, strict=True
):
    rows, own = (
        np.arange(size)[shard.index[0]] for size, shard in ((EXPERTS, weights), (TOKENS, states))
    )
    print(
        f"{weights.device.id:>6}  {str(weights.data.shape):43}  {rows[0]:>2} - {rows[-1]:<2}"
        f"  {own[0]:>3} - {own[-1]}"
    )
    assert weights.data.shape == (EXPERTS // 4, 2, INTERMEDIATE, HIDDEN)

# %% [markdown]
# ## The answer is the same
#
# Three exchanges, two meshes: 1 × 4 has all experts on four devices, 2 × 2 has every expert twice.
# The chosen experts must be equal, output and gradients within 1e-5 of their largest number. The
# order of sums differs, so the last bits may differ too.


# %%
def close(one, other):
    """Integers equal, floats within 1e-5 of the largest in their array."""
    one, other = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (one, other))
    for a, b in zip(one, other, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        integer = np.issubdtype(a.dtype, np.integer)
        assert np.array_equal(a, b) if integer else np.allclose(a, b, 0, 1e-5 * np.abs(b).max())
    return True


print("mesh   exchange    output  gradient  dropped")
for shape in ((1, 4), (2, 2)):
    for exchange in (GATHER, ALL_TO_ALL(), RAGGED):
        _, sharded, tokens = spread(shape, exchange)
        (_, (ours, our_routing)), our_gradient = step(sharded, tokens)
        assert np.array_equal(our_routing.indices, routing.indices)
        assert close(ours, output) and close(our_gradient, gradient)
        assert int(our_routing.dropped) == 0
        name = name_of(exchange)
        print(f"{shape[0]} × {shape[1]}  {name:10}  ✓       ✓         {our_routing.dropped}")

# %% [markdown]
# ## Capacity, and what is lost
#
# `Gather()` brings every token to every device. `AllToAll(capacity)` sends a token only to the
# devices of its experts, but needs a fixed number of slots for each pair of devices. `capacity` is
# that number, as a multiple of the even share. If the slots of a pair run out, later tokens lose
# their experts there. Every lost assignment is counted in `routing.dropped`.
#
# The table counts again in plain numpy. The second column of drops is for a router with a bias
# towards the experts 0 to 3, which are all on device 0.


# %%
def slots(capacity, size=4):
    """Rows that one device can send to another."""
    own = TOKENS // size
    return min(own, math.ceil(capacity * own * min(1, PER_TOKEN / size)))


def recount(indices, capacity, size=4):
    """Assignments whose token found no free slot, sender by sender, in the order of tokens."""
    dropped = 0
    for sender in np.split(indices, size):
        used = [0] * size
        for token in sender:
            devices = [expert // (EXPERTS // size) for expert in token]
            for device in set(devices):
                used[device] += 1
            dropped += sum(used[device] > slots(capacity) for device in devices)
    return dropped


def routed_to(bias):
    """The block with a bias for the experts of device 0."""
    where = lambda m: m.routed.router.score_correction_bias  # noqa: E731
    return eqx.tree_at(where, block, jnp.where(jnp.arange(EXPERTS) < 4, bias, 0.0))


def compiled(parallel):
    """The forward pass as a compiled program: `program(arrays, tokens) -> (output, routing)`."""
    arrays, static = eqx.partition(parallel.shard(block), eqx.is_array)
    over_all = NamedSharding(parallel.mesh, PartitionSpec(parallel.tokens))
    states = jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.float32, sharding=over_all)
    call = lambda arrays, states: eqx.combine(arrays, static)(states)  # noqa: E731
    return jax.jit(call).lower(arrays, states).compile()


capacities = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
programs = {GATHER: compiled(spread((1, 4))[0])}
drops = {"as initialised": [], "skewed to device 0": []}
print("capacity  slots  dropped of 1,024  dropped, skewed  output as on one device")
for capacity in capacities:
    parallel, *_, tokens = spread((1, 4), ALL_TO_ALL(capacity))
    programs[parallel.exchange] = compiled(parallel)
    for counts, bias in zip(drops.values(), (0.0, 0.25), strict=True):
        arrays = eqx.filter(parallel.shard(routed_to(bias)), eqx.is_array)
        ours, our_routing = programs[parallel.exchange](arrays, tokens)
        counts.append(int(our_routing.dropped))
        assert counts[-1] == recount(np.asarray(our_routing.indices), capacity)
        if bias == 0.0:
            same = bool(np.allclose(ours, output, rtol=0, atol=1e-5))
            assert same == (counts[-1] == 0)
    plain, skewed = (counts[-1] for counts in drops.values())
    answer = "yes" if same else "no"
    print(f"{capacity:<8}  {slots(capacity):>5}  {plain:>16}  {skewed:>15}  {answer}")

for counts in drops.values():
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0
assert all(skewed >= plain for plain, skewed in zip(*drops.values(), strict=True))

# %% [markdown]
# A capacity of 2 drops nothing here, whatever the router does: with 2 experts on 4 devices the even
# share is half of the tokens, and twice that is a slot for every token. But then it moves as many
# bytes as `Gather()`.
#
# ## What moves, read from the compiled program
#
# The compiler writes down every operation that moves data between devices. In an all-gather or an
# all-to-all each device sends its part of the result to the others, `(n - 1) / n` of it. In a
# reduce-scatter it sends `n - 1` times its part of the result.

# %%
ITEM = {"f32": 4, "s32": 4}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|reduce-scatter|all-to-all)(?:-start)?\((.*)$", re.M)


def collectives(program, size=4):
    """`(operation, shape as text, bytes sent by one device)` of a compiled forward pass."""
    for result, name, _ in COLLECTIVE.findall(program.as_text()):
        shapes = re.findall(r"(f32|s32)\[([\d,]+)\]", result)
        total = sum(ITEM[kind] * math.prod(map(int, shape.split(","))) for kind, shape in shapes)
        factor = size - 1 if name == "reduce-scatter" else (size - 1) / size
        kind, shape = shapes[0]
        times = f"{len(shapes)} × " if len(shapes) > 1 else ""
        yield name, f"{times}{kind}[{shape}]", total * factor


local_tokens = TOKENS // 4
print("exchange    operation       result            bytes a token")
for exchange in (GATHER, ALL_TO_ALL(1.25)):
    for name, shape, sent in collectives(programs[exchange]):
        print(f"{name_of(exchange):10}  {name:14}  {shape:16}  {sent / local_tokens:>13,.0f}")
        assert f"{2 * INTERMEDIATE},{HIDDEN}]" not in shape  # no expert weight moves
        assert f"{INTERMEDIATE},{HIDDEN}]" not in shape

# %% [markdown]
# The tokens travel, and so do the ids and weights of their experts. The sums travel back. No expert
# weight ever moves.
#
# ## Measured against planned
#
# `bx.plan` computes the same bytes a token from sizes alone. The columns must agree within 5 %.

# %%
print("exchange    capacity  measured  planned")
plan = bx.plan(
    config, 4, local_tokens, bandwidth=1e9, flops=1e12, exchanges=tuple(programs), dtype="float32"
)
planned = {row.exchange: row.bytes_per_token for row in plan.rows if row.size == 4}
measured = {}
for exchange, program in programs.items():
    found = sum(sent for *_, sent in collectives(program)) / local_tokens
    assert abs(found / planned[exchange] - 1) < 0.05
    measured[exchange] = found
    capacity = getattr(exchange, "capacity", "-")
    print(f"{name_of(exchange):10}  {capacity:<8}  {found:>8,.0f}  {planned[exchange]:>7,.0f}")

costs = [measured[ALL_TO_ALL(capacity)] for capacity in capacities]
assert costs == sorted(costs)
assert costs[-1] == measured[GATHER]
assert costs[3] < 0.65 * measured[GATHER]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110, layout="constrained")
for (name, counts), colour in zip(drops.items(), ("#0072B2", "#D55E00"), strict=True):
    share = [100 * count / (TOKENS * PER_TOKEN) for count in counts]
    left.plot(capacities, share, "o-", color=colour, label=name)
left.set(xlabel="capacity", ylabel="dropped assignments, %", title="What is lost")
left.legend(frameon=False)
right.plot(capacities, [cost / 1024 for cost in costs], "o-", color="#009E73", label="AllToAll")
right.axhline(measured[GATHER] / 1024, color="0.2", ls="--", lw=1, label="Gather")
right.set(xlabel="capacity", ylabel="KiB a token", title="What moves", ylim=(0, None))
right.legend(frameon=False, loc="lower right")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## A layer of DeepSeek-V4-Flash: a simulation
#
# Nothing below was measured. It is arithmetic for 64 devices with 8,192 tokens each, bfloat16, an
# assumed bandwidth of 450 GB/s for each device and 400 TFLOP/s in the experts. Routing is taken to
# be even, and communication not to overlap with computing. `EP` is the size of the expert axis.

# %%
flash = bx.MoEConfig.deepseek_v4_flash()
plan = bx.plan(flash, devices=64, tokens_per_device=8192, bandwidth=450e9, flops=400e12)
print("SIMULATION\n")
print(plan)

# %%
names = {GATHER: "Gather", ALL_TO_ALL(1.25): "AllToAll, capacity 1.25", RAGGED: "Ragged"}
colours = dict(zip(names, ("#0072B2", "#009E73", "#E69F00"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, layout="constrained")
lines = {}
for exchange, name in names.items():
    rows = [row for row in plan.rows if row.exchange == exchange]
    lines[exchange] = {row.size: row for row in rows}
    sizes = [row.size for row in rows if row.size > 1]
    micro = [1e6 * row.communication_seconds for row in rows if row.size > 1]
    left.plot(sizes, micro, "o-", color=colours[exchange], label=name)
compute = 1e6 * plan.rows[0].compute_seconds
left.axhline(compute, color="0.2", ls="--", lw=1, label="computing")
left.set(xscale="log", yscale="log", xlabel="EP", ylabel="µs a token", title="Simulated time")
left.legend(frameon=False)
weights = [row.weight_bytes / 1e9 for row in lines[GATHER].values()]
right.bar([str(size) for size in lines[GATHER]], weights, color="#0072B2")
right.bar_label(right.containers[0], fmt="%.1f", padding=2)
right.set(xlabel="EP", ylabel="GB a device", title="Expert weights of one layer", ylim=(0, 15))
left.set_xticks([2, 4, 8, 16, 32, 64], [2, 4, 8, 16, 32, 64])
left.minorticks_off()
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

for size in (8, 16, 32, 64):
    moved = [lines[exchange][size].bytes_per_token for exchange in reversed(names)]
    assert moved == sorted(moved)
assert lines[GATHER][64].bytes_per_token == 63 * (4096 * 6 + 48)
assert lines[GATHER][64].communication_seconds > compute * 1e-6

# %% [markdown]
# ## What to remember
#
# * Sharding changes where things are computed, not what: same experts, output and gradients.
# * `Gather()` is simple and drops nothing. Its traffic grows with the number of devices.
# * `AllToAll(capacity)` moves less, if the capacity is small, and then it may drop.
#   `routing.dropped` is the exact count.
# * A skewed router drops more. Balance the load before you lower the capacity.
# * `bx.plan` tells you the bytes before you rent a cluster.

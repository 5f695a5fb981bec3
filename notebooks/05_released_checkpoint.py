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
# # Open a released checkpoint
#
# **What is in the files of a DeepSeek-V4 checkpoint, and do the numbers come out right?**
#
# This notebook writes a small checkpoint of the same structure: `config.json`, an index, two
# shards, FP4 experts with scales, an FP8 shared expert, a hash table in the first layer. Then it
# looks inside: with the command line, with a few lines of plain Python, and with `bx.load_moe`.
# Two tensors are decoded by hand, bit by bit, and compared.
#
# Runs in about 15 seconds on a laptop. For a real checkpoint, replace the folder.

# %%
import json
import pathlib
import subprocess
import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import braidax as bx

# %% [markdown]
# ## The configuration
#
# The keys are those of the released `config.json`. Only the sizes are small. `MoEConfig.from_hf`
# reads what a mixture-of-experts layer needs, and complains about what it does not know.

# %%
config_json = {
    "model_type": "deepseek_v4",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_hash_layers": 1,
    "vocab_size": 512,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "topk_method": "noaux_tc",
    "expert_dtype": "fp4",
    "quantization_config": {"fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
}
config = bx.MoEConfig.from_hf(config_json)
for name, value in vars(config).items():
    print(f"{name:22} {value}")
assert config.is_hash_layer(0) and not config.is_hash_layer(1)

# %% [markdown]
# ## Write the files
#
# `bx.save_moe` writes one layer in the released names. `quantization="fp4"` stores it as
# DeepSeek-V4 does: experts in FP4, the shared expert in FP8, the router untouched. The index says
# which tensor is in which shard.

# %%
temporary = tempfile.TemporaryDirectory()
folder = pathlib.Path(temporary.name, "tiny-v4")
folder.mkdir()


def read_header(path):
    """The table of contents of a safetensors file, and the position where its data starts."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + size


def raw(path, name, dtype=np.uint8):
    """The stored bytes of one tensor, in the shape that the header says."""
    header, data_start = read_header(path)
    start, stop = header[name]["data_offsets"]
    data = path.read_bytes()[data_start + start : data_start + stop]
    return np.frombuffer(data, dtype).reshape(header[name]["shape"])


original, shards = [], [folder / f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
for layer_idx, key in enumerate(jax.random.split(jax.random.key(0), 2)):
    layer = bx.RoutedAndSharedMoE.from_config(config, layer_idx, dtype=jnp.bfloat16, key=key)
    if not config.is_hash_layer(layer_idx):  # a new bias is zero, a trained one is not
        bias = 0.05 * jax.random.normal(key, (config.num_experts,))
        layer = eqx.tree_at(lambda m: m.routed.router.score_correction_bias, layer, bias)
    original.append(layer)
    bx.save_moe(shards[layer_idx], layer, layer_idx, quantization="fp4")

weight_map = {name: path.name for path in shards for name in read_header(path)[0]}
index = {"metadata": {}, "weight_map": weight_map}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
(folder / "config.json").write_text(json.dumps(config_json))

for path in sorted(folder.iterdir()):
    print(f"{path.name:36} {path.stat().st_size:>9,} bytes")
print(f"{len(weight_map)} tensors")

# %% [markdown]
# ## What the command line says
#
# `python -m braidax summary` reads headers and hash tables only, so it is quick on 160 GB too. It
# counts FP4 as two numbers a byte, and does not count scales as parameters.

# %%
command = [sys.executable, "-m", "braidax", "summary", folder.name]
done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=True)
print(done.stdout)

expert_parameters = 3 * config.hidden_size * config.intermediate_size
gate_parameters = config.num_experts * config.hidden_size
active = 3 * expert_parameters + gate_parameters  # two routed experts and the shared one
assert f"{active:,}" in done.stdout
assert "hash table of 512 token ids" in done.stdout

# %% [markdown]
# ## The names and shapes of one layer
#
# A safetensors file is a JSON header and then bytes. Here is the second layer without the
# experts 1 to 7. An FP4 matrix is called `I8`, and is half as wide as it should be, because a byte
# holds two numbers. Its scale has one byte for each 32 numbers of a row. The FP8 shared expert has
# one scale for each 128 × 128 block.

# %%
header, _ = read_header(shards[1])
for name, entry in sorted(header.items()):
    expert = name.split("experts.")[-1].split(".")[0]
    if expert not in map(str, range(1, 8)):
        start, stop = entry["data_offsets"]
        shape = str(entry["shape"])
        print(f"{name:37} {entry['dtype']:8} {shape:12} {stop - start:>7,} bytes")

weights = header["layers.1.ffn.experts.0.w1.weight"]
scales = header["layers.1.ffn.experts.0.w1.scale"]
assert weights["shape"] == [config.intermediate_size, config.hidden_size // 2]
assert scales["shape"] == [config.intermediate_size, config.hidden_size // 32]

# %% [markdown]
# ## Load it, twice
#
# `dtype=jnp.float32`, the default, decodes the experts. `dtype="packed"` keeps their bytes and
# decodes each expert when it has tokens. That is about one eighth of the memory of float32.

# %%
decoded = [bx.load_moe(folder, i) for i in range(2)]
packed = [bx.load_moe(folder, i, dtype="packed") for i in range(2)]


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


for i in range(2):
    router = type(decoded[i].routed.router).__name__
    experts = [num_bytes(layer.routed.experts) for layer in (decoded[i], packed[i])]
    print(f"layer {i}, {router:10}  experts: float32 {experts[0]:,} bytes, packed {experts[1]:,}")

stored_bytes = sum(
    entry["data_offsets"][1] - entry["data_offsets"][0]
    for name, entry in header.items()
    if ".experts." in name
)
numbers = config.num_experts * expert_parameters
assert num_bytes(packed[1].routed.experts) == stored_bytes == numbers * 4.25 / 8
assert num_bytes(packed[1].routed.experts) < num_bytes(decoded[1].routed.experts) / 7
print(f"\npacked: {8 * stored_bytes / numbers} bits for each number, 4 and its share of a scale")

# %%
bx.summary(decoded[1])

# %% [markdown]
# ## Decode FP4 by hand
#
# Take the gate projection `w1` of expert 3 in the second layer, straight from the file. The low
# half of a byte is the first of its two numbers. Four bits are a sign, two bits of exponent and
# one of mantissa (E2M1), so there are only 15 different numbers. The scale is a power of two: its
# byte is the exponent plus 127 (E8M0).

# %%
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]

payload = raw(shards[1], "layers.1.ffn.experts.3.w1.weight")
exponents = raw(shards[1], "layers.1.ffn.experts.3.w1.scale")
codes = np.stack([payload & 15, payload >> 4], axis=-1).reshape(len(payload), -1)
fp4_scale = np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=1)
by_hand = np.array(E2M1)[codes] * fp4_scale

print("row 0 starts with")
print("byte   low half         high half        scale        numbers")
for i in range(4):
    byte, factor = payload[0, i], f"2^{int(exponents[0, 0]) - 127}"
    low, high = f"{byte & 15:04b} = {E2M1[byte & 15]:>4}", f"{byte >> 4:04b} = {E2M1[byte >> 4]:>4}"
    pair = f"{by_hand[0, 2 * i]:>9.6f}, {by_hand[0, 2 * i + 1]:>9.6f}"
    print(f"{byte:02x}     {low:15}  {high:15}  {factor:11}  {pair}")

gate = decoded[1].routed.experts.gate_up[3, 0]
assert np.array_equal(by_hand, np.asarray(gate, np.float64))
print(f"\n✓ all {by_hand.size:,} numbers of the matrix: by hand = bx.load_moe, bit for bit")

# %% [markdown]
# ## Decode FP8 by hand
#
# The shared expert is E4M3: a sign, four bits of exponent with a bias of 7, three of mantissa, and
# a scale for each block. `w2` is the down projection. The library keeps its transpose, with the
# intermediate axis first.

# %%
codes = raw(shards[1], "layers.1.ffn.shared_experts.w2.weight").astype(np.int64)
exponents = raw(shards[1], "layers.1.ffn.shared_experts.w2.scale")
sign, exponent, mantissa = np.where(codes >> 7, -1.0, 1.0), (codes >> 3) & 15, codes & 7
normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
subnormal = mantissa / 8 * 2.0**-6
magnitude = np.where(exponent > 0, normal, subnormal)
scale = np.repeat(np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 128, 0), 128, 1)
by_hand_fp8 = sign * magnitude * scale

assert not (codes & 127 == 127).any()  # the code of NaN
assert np.array_equal(by_hand_fp8.T, np.asarray(decoded[1].shared.down, np.float64))
powers = ", ".join(f"2^{int(exponent) - 127}" for exponent in exponents.ravel())
print(f"scales {exponents.shape}: {powers}")
print(f"✓ all {by_hand_fp8.size:,} numbers of the matrix: by hand = bx.load_moe, bit for bit")

# %% [markdown]
# ## What four bits keep
#
# Left: the original numbers of that matrix against the stored ones, for the first group of 32. A
# number moves to the nearest of the 15 that its group can hold. Right: the relative error of all
# matrices of the layer. FP8 has two more bits of mantissa than FP4, and its error is much smaller.

# %%
gate = np.asarray(original[1].routed.experts.gate_up[3, 0], np.float64)


def relative_error(before, after):
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    return np.linalg.norm(after - before) / np.linalg.norm(before)


errors = {
    "gate and up": [m.routed.experts.gate_up for m in (original[1], decoded[1])],
    "down": [m.routed.experts.down for m in (original[1], decoded[1])],
    "shared gate and up": [m.shared.gate_up for m in (original[1], decoded[1])],
    "shared down": [m.shared.down for m in (original[1], decoded[1])],
}
errors = {name: relative_error(*pair) for name, pair in errors.items()}

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), dpi=110, layout="constrained", width_ratios=[3, 2]
)
grid = np.unique(E2M1) * fp4_scale[0, 0]
left.hlines(grid, gate[0, :32].min(), gate[0, :32].max(), color="0.85", lw=0.8)
left.axline((0, 0), slope=1, color="0.5", ls="--", lw=1)
left.plot(gate[0, :32], by_hand[0, :32], "o", color="#0072B2", ms=5)
left.set(xlabel="original number", ylabel="stored number", title="One group of 32 in FP4")
names = list(errors)[::-1]
colours = ["#E69F00" if name.startswith("shared") else "#0072B2" for name in names]
bars = right.barh(names, [100 * errors[name] for name in names], color=colours)
right.bar_label(bars, fmt="%.1f %%", padding=3)
right.set(xlabel="relative error, %", xlim=(0, 16), title="Blue FP4, orange FP8")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

worst_fp8 = max(error for name, error in errors.items() if name.startswith("shared"))
best_fp4 = min(error for name, error in errors.items() if not name.startswith("shared"))
assert worst_fp8 < best_fp4 / 3
assert np.isin(by_hand[0, :32], grid).all()

# %% [markdown]
# ## Run both layers
#
# The hash layer takes its experts from the table, whatever the hidden state. The top-k layer takes
# no ids. Packed experts give the same answer as decoded ones, because both multiply by the same
# float32 numbers.

# %%
key = jax.random.key(1)
hidden_states = jax.random.normal(key, (64, config.hidden_size))
input_ids = jnp.arange(64) % 16  # 16 different ids, four times each
run = eqx.filter_jit(lambda layer, x, ids: layer(x, ids))

routings = []
for i in range(2):
    output, routing = run(decoded[i], hidden_states, input_ids)
    from_packed, routing_packed = run(packed[i], hidden_states, input_ids)
    before, _ = run(original[i], hidden_states, input_ids)
    assert np.array_equal(routing.indices, routing_packed.indices)
    assert np.allclose(output, from_packed, rtol=0, atol=1e-5)
    assert 0 < relative_error(before, output) < 0.3
    routings.append(routing)
    print(f"layer {i}: packed equals float32 within 1e-5")

pairs = [np.sort(np.asarray(r.indices), axis=1).reshape(4, 16, 2) for r in routings]
changes = [int((p != p[0]).any(axis=(0, 2)).sum()) for p in pairs]
print("\nids whose experts depend on where they stand:")
print(f"layer 0 (hash) {changes[0]} of 16, layer 1 (top-k) {changes[1]} of 16")
assert changes[0] == 0 and changes[1] > 8

# The table in the file is int64, as released; the router keeps it as int32.
table = raw(shards[0], "layers.0.ffn.gate.tid2eid", np.int64)
assert np.array_equal(table[np.asarray(input_ids)], routings[0].indices)
print("✓ the hash layer uses the rows of the table in the file")

# %%
bx.report(routings, model=decoded, input_ids=input_ids)

# %% [markdown]
# ## Save it back
#
# Packed experts are written as the bytes they are. Decoded experts, saved without quantization,
# give the same layer when they are loaded again. In both cases the layer is the same bit for bit.

# %%
copy = pathlib.Path(temporary.name, "copy.safetensors")


def same_bits(one, other):
    leaves = [jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


bx.save_moe(copy, packed[1], 1)
experts = [name for name in header if ".experts." in name]
for name in experts:
    assert read_header(copy)[0][name]["dtype"] == header[name]["dtype"]
    assert np.array_equal(raw(copy, name), raw(shards[1], name))
assert same_bits(bx.load_moe(copy, 1, config=config, dtype="packed"), packed[1])
print(f"✓ packed: {len(experts)} expert tensors with the bytes of the checkpoint")

bx.save_moe(copy, decoded[1], 1)
assert same_bits(bx.load_moe(copy, 1, config=config), decoded[1])
print("✓ float32: the same layer after saving and loading")

bx.save_moe(copy, decoded[1], 1, quantization="fp4")
assert same_bits(bx.load_moe(copy, 1, config=config), decoded[1])
print("✓ float32 to FP4 again: nothing is lost the second time")
temporary.cleanup()

# %% [markdown]
# ## What to remember
#
# * A checkpoint is a JSON header, bytes, and an index. Dtype and shape of a tensor say how it is
#   stored. The configuration is not asked about that.
# * FP4 costs 4.25 bits a number. It stores a sign and one of eight magnitudes, times a power of two
#   for each group of 32.
# * `bx.load_moe(folder, layer_idx)` decodes exactly. `dtype="packed"` keeps the bytes and computes
#   the same.
# * Quantizing twice loses nothing more than quantizing once.

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
# # Two families side by side
#
# **Do a Qwen3-MoE and a GPT-OSS route tokens alike, if their gates hold the same numbers?**
#
# This notebook makes two small folders, one in the names of Qwen3-MoE and one in those of GPT-OSS.
# `bx.load_moe` opens both. Then the notebook gives both gates the same weights, and compares which
# experts each token goes to, with what weight, and what comes out.
#
# Runs in about 20 seconds on a laptop. For real checkpoints, replace the folders.

# %%
import json
import pathlib
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import braidax as bx

# %% [markdown]
# ## Two configurations
#
# The keys are those of the families' own `config.json`. The `model_type` says how to read them:
# what the sizes are called, which numbers hold where a key is missing, and which layers are
# mixtures.

# %%
configurations = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
}
configs = {name: bx.MoEConfig.from_hf(raw) for name, raw in configurations.items()}
for name, config in configs.items():
    layers = [layer_idx for layer_idx in range(2) if config.is_moe_layer(layer_idx)]
    print(f"{name:9}  mixtures: layers {layers}, activation {config.activation},", end=" ")
    print(f"biases: gate {config.use_gate_bias}, experts {config.use_expert_bias}")

# %% [markdown]
# ## Two folders
#
# `bx.save_moe` writes a layer in the names of a family. GPT-OSS has one stack for all experts, and
# Qwen3-MoE has three matrices for each.

# %%
temporary = tempfile.TemporaryDirectory()
folders = {}
for seed, (name, config) in enumerate(configs.items()):
    folders[name] = pathlib.Path(temporary.name, name)
    folders[name].mkdir()
    (folders[name] / "config.json").write_text(json.dumps(configurations[name]))
    layer = bx.RoutedMoE.from_config(config, 1, key=jax.random.key(seed))
    path = folders[name] / "model.safetensors"
    bx.save_moe(path, layer, 1, model_type=config.model_type)
    _, _, *lines = str(bx.Checkpoint(folders[name]).summary()).splitlines()  # without the path
    print(name, *lines, "", sep="\n")

# %% [markdown]
# ## The same gate in both
#
# Both families take the softmax of the logits and share one unit among the chosen experts. GPT-OSS
# takes the softmax over the chosen logits alone, which is the same number. So with the same gate,
# and with the bias of GPT-OSS at 0, both route alike.

# %%
blocks = {name: bx.load_moe(folder, 1) for name, folder in folders.items()}
gate = blocks["qwen3_moe"].router.gate.weight
blocks["gpt_oss"] = eqx.tree_at(lambda b: b.router.gate.weight, blocks["gpt_oss"], gate)

hidden_states = 4 * jax.random.normal(jax.random.key(7), (256, 64))
outputs, routings = {}, {}
for name, block in blocks.items():
    outputs[name], routings[name] = block(hidden_states)

qwen, gpt = routings["qwen3_moe"], routings["gpt_oss"]
assert (qwen.indices == gpt.indices).all()
assert jnp.allclose(qwen.weights, gpt.weights, atol=1e-6)
print("the same experts and weights for", len(hidden_states), "tokens")

# %% [markdown]
# By hand, for one token: the softmax over the two chosen logits.

# %%
logits = np.asarray(qwen.logits[0], np.float64)
chosen = np.argsort(-logits)[:2]
weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
print("experts", chosen.tolist(), "weights", weights.round(4).tolist())
assert chosen.tolist() == qwen.indices[0].tolist()
np.testing.assert_allclose(gpt.weights[0], weights, rtol=1e-5)

# %% [markdown]
# ## What the trained bias of GPT-OSS does
#
# The bias of the gate is added to the logits. It moves the selection *and* the weights. The
# selection bias of DeepSeek-V3 moves the selection alone.

# %%
bias = jnp.zeros(8).at[3].set(2.0)
biased = eqx.tree_at(lambda b: b.router.gate.bias, blocks["gpt_oss"], bias)
_, moved = biased(hidden_states)
loads = {"without a bias": bx.expert_load(gpt), "2 on expert 3": bx.expert_load(moved)}
for name, load in loads.items():
    print(f"{name:15} {load.tolist()}")
assert loads["2 on expert 3"][3] > 2 * loads["without a bias"][3]

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for shift, (name, load) in zip((-0.2, 0.2), loads.items(), strict=True):
    axis.bar(np.arange(8) + shift, load, width=0.4, label=name)
axis.set(xlabel="expert", ylabel="assignments", title="GPT-OSS: the load of 256 tokens")
axis.legend()
plt.show()

# %% [markdown]
# ## The experts differ
#
# The activation of GPT-OSS is `gate * sigmoid(1.702 gate) * (up + 1)`, with gate and up clamped at
# 7. Its gate and up rows take turns in the file, and `load_moe` puts them apart.

# %%
for name, block in blocks.items():
    experts, size = block.experts, float(jnp.abs(outputs[name]).mean())
    print(
        f"{name:9}  gate_up {experts.gate_up.shape}, {experts.activation}, mean |output| {size:.3f}"
    )
stored = bx.to_state_dict(blocks["gpt_oss"], model_type="gpt_oss")["experts.gate_up_proj"]
np.testing.assert_array_equal(
    stored[:, :, ::2].swapaxes(1, 2), blocks["gpt_oss"].experts.gate_up[:, 0]
)
temporary.cleanup()

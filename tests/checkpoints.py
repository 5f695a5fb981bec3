"""Checkpoints of every layout, tiny or of full size, with the numbers that they must decode to.

The decoding here is written from the formats' bit fields, in float64, and shares nothing with the
library; only the files are written with its writer.
"""

import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, VOCAB = 256, 128, 4, 2, 64
HASH_LAYERS = 2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Layout(NamedTuple):
    """How a layer is spelled and stored. `payload` is a dtype of the file, FP4 as the dtype that
    holds it; `scale` the dtype of the scales, None without."""

    prefix: str = ""
    block: str = "ffn"
    fused: bool = False
    proj: bool = False  # gate_proj, up_proj, down_proj in place of w1, w3, w2
    payload: str = "I8"
    scale: str | None = "F8_E8M0"
    scale_name: str = ".scale"
    shared_block: tuple[int, int] = (128, 128)
    expert_block: tuple[int, int] = (1, 32)
    hf_gate: bool = False


FP8 = {"payload": "F8_E4M3", "expert_block": (128, 128)}
FLOAT = {"scale": None}
HF = {"prefix": "model.", "block": "mlp", "proj": True, "hf_gate": True}
FUSED = {**HF, "fused": True, "scale_name": "_scale_inv"}
LAYOUTS = {
    "V4-Flash and Pro": Layout(),
    "V4 Base": Layout(**FP8, scale="F32"),
    "V4.1": Layout(shared_block=(32, 32)),
    "V3": Layout(**HF, **FP8, scale="F32", scale_name=".weight_scale_inv"),
    "transformers, upstream names, FP4": Layout(prefix="model."),
    "transformers, upstream names, FP8": Layout(prefix="model.", **FP8),
    "transformers, upstream names, float32": Layout(prefix="model.", payload="F32", **FLOAT),
    "transformers, upstream names, bfloat16": Layout(prefix="model.", payload="BF16", **FLOAT),
    "transformers, fused, FP4": Layout(**FUSED),
    "transformers, fused, FP8": Layout(**FUSED, **FP8),
    "transformers, fused, bfloat16": Layout(**FUSED, payload="BF16", **FLOAT),
    "transformers, fused, float16": Layout(**FUSED, payload="F16", **FLOAT),
    "one by one, projections": Layout(**HF, scale_name=".weight_scale_inv"),
    "mlp, upstream leaves": Layout(block="mlp", scale_name="_scale_inv"),
    "raw scale bytes": Layout(payload="U8", scale="U8"),
    "FP4 under its own name": Layout(payload="F4"),
    "MXFP8": Layout(payload="F8_E4M3", expert_block=(1, 32), scale="U8"),
    "FP8 in 32x32": Layout(payload="F8_E4M3", expert_block=(32, 32)),
    "FP8 E5M2": Layout(payload="F8_E5M2", expert_block=(128, 128), scale="F32"),
    "bfloat16 with scales of one": Layout(payload="BF16", scale="F32", expert_block=(128, 128)),
}


def float8(codes, exponent_bits, bias):
    """The numbers of 8-bit codes (sign, exponent, mantissa), NaN and infinity left out."""
    mantissa_bits = 7 - exponent_bits
    codes = np.asarray(codes, np.int64)
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & (2**mantissa_bits - 1)
    normal = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    subnormal = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    return np.where(codes & 128, -1.0, 1.0) * np.where(exponent > 0, normal, subnormal)


def decode_payload(codes, payload):
    """Float64 numbers of stored bytes."""
    if payload in ("I8", "U8", "F4"):
        return np.array(E2M1)[np.stack((codes & 15, codes >> 4), -1)].reshape(*codes.shape[:-1], -1)
    return float8(codes, 4, 7) if payload == "F8_E4M3" else float8(codes, 5, 15)


def spread(scale, block, shape):
    """Each scale over its block of rows and columns, cut off at `shape`."""
    rows, columns = (
        np.arange(size) // width for size, width in zip(shape[-2:], block, strict=True)
    )
    return scale[..., rows[:, None], columns]


def random_matrix(rng, shape, payload, scale, block):
    """A stored weight, its stored scale, and its numbers in float64."""
    if payload in ("F32", "BF16", "F16"):
        dtype = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}[payload]
        weight = (0.1 * rng.standard_normal(shape)).astype(dtype)
        numbers = weight.astype(np.float64)
    else:
        packed = payload in ("I8", "U8", "F4")
        stored_shape = (*shape[:-1], shape[-1] // 2) if packed else shape
        codes = rng.integers(0, 256, stored_shape, dtype=np.uint8)
        if not packed:
            largest = 119 if payload == "F8_E4M3" else 63  # below infinity and NaN, about 1
            codes = (codes & 128) | np.minimum(codes & 127, largest)
        numbers = decode_payload(codes, payload)
        weight = _as_stored(codes, payload)
    if scale is None:
        return weight, None, numbers
    grid = tuple(-(-size // width) for size, width in zip(shape[-2:], block, strict=True))
    exponents = rng.integers(118, 123, (*shape[:-2], *grid), dtype=np.uint8)
    if payload in ("F32", "BF16", "F16"):
        exponents[:] = 127
    numbers = numbers * spread(2.0 ** (exponents.astype(np.float64) - 127), block, shape)
    stored = exponents
    if scale == "F8_E8M0":
        stored = exponents.view(jnp.float8_e8m0fnu)
    elif scale == "F32":
        stored = (2.0 ** (exponents.astype(np.float64) - 127)).astype(np.float32)
    return weight, stored, numbers


def _as_stored(codes, payload):
    from braidax._checkpoint.safetensors_writer import Lazy

    if payload == "F4":
        return Lazy("F4", (*codes.shape[:-1], 2 * codes.shape[-1]), lambda: codes)
    dtypes = {"I8": np.int8, "U8": np.uint8, "F8_E4M3": jnp.float8_e4m3fn}
    return codes.view(dtypes.get(payload, jnp.float8_e5m2))


def layer_tensors(layout, layer_idx, seed=0, sizes=(HIDDEN, INTERMEDIATE, EXPERTS)):
    """The tensors of a layer by name, and the numbers of the block: `weight`, `bias` or `table`,
    `gate_up`, `down`, `shared_gate_up`, `shared_down`, in the library's axes."""
    rng = np.random.default_rng(100 * seed + layer_idx)
    hidden, intermediate, experts = sizes
    prefix = f"{layout.prefix}layers.{layer_idx}.{layout.block}."
    weight = rng.standard_normal((experts, hidden)).astype(jnp.bfloat16)
    tensors = {f"{prefix}gate.weight": weight}
    numbers = {"weight": weight.astype(np.float64)}
    if layer_idx < HASH_LAYERS:
        numbers["table"] = rng.integers(0, experts, (VOCAB, SLOTS))
        tensors[f"{prefix}gate.tid2eid"] = numbers["table"]
    else:
        bias = (0.1 * rng.standard_normal(experts)).astype(np.float32)
        numbers["bias"] = bias.astype(np.float64)
        name = "e_score_correction_bias" if layout.hf_gate else "bias"
        tensors[f"{prefix}gate.{name}"] = bias

    def matrix(stem, shape, payload, scale, block, fused=False):
        stored, stored_scale, values = random_matrix(rng, shape, payload, scale, block)
        tensors[prefix + stem + ("" if fused else ".weight")] = stored
        if stored_scale is not None:
            suffix = "_scale_inv" if fused else layout.scale_name
            suffix = ".weight_scale_inv" if suffix == "_scale_inv" and not fused else suffix
            tensors[prefix + stem + suffix] = stored_scale
        return values

    names = ("gate_proj", "up_proj", "down_proj") if layout.proj else ("w1", "w3", "w2")
    own = (layout.payload, layout.scale, layout.expert_block)
    if layout.fused:
        shape = (experts, 2 * intermediate, hidden)
        gate_up = matrix("experts.gate_up_proj", shape, *own, fused=True)
        numbers["gate_up"] = gate_up.reshape(experts, 2, intermediate, hidden)
        down = matrix("experts.down_proj", (experts, hidden, intermediate), *own, fused=True)
    else:
        triples = [
            [
                matrix(f"experts.{expert}.{name}", shape, *own)
                for name, shape in zip(names, _shapes(hidden, intermediate), strict=True)
            ]
            for expert in range(experts)
        ]
        numbers["gate_up"] = np.stack([triple[:2] for triple in triples])
        down = np.stack([triple[2] for triple in triples])
    numbers["down"] = np.swapaxes(down, -1, -2)
    floating = layout.scale is None
    shared = (layout.payload, None, None) if floating else ("F8_E4M3", layout.scale)
    shared = shared if floating else (*shared, layout.shared_block)
    gate, up, down = (
        matrix(f"shared_experts.{name}", shape, *shared)
        for name, shape in zip(names, _shapes(hidden, intermediate), strict=True)
    )
    numbers["shared_gate_up"], numbers["shared_down"] = np.stack((gate, up)), down.T
    return tensors, numbers


def _shapes(hidden, intermediate):
    return (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)


def config(bx, **changes):
    """The configuration of the tiny checkpoints."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_token": SLOTS,
        "vocab_size": VOCAB,
        "num_hash_layers": HASH_LAYERS,
        "scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    }
    return bx.MoEConfig(**{**sizes, **changes})


def config_json(**changes):
    """A `config.json` as released, whose words on dtypes are wrong on purpose."""
    return {
        "model_type": "deepseek_v4",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": SLOTS,
        "vocab_size": VOCAB,
        "num_hash_layers": HASH_LAYERS,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "expert_dtype": "fp8",
        "quantization_config": {"weight_block_size": [64, 64], "scale_fmt": "ue8m0"},
        **changes,
    }


def write_shards(folder, shards):
    """Files `{shard: tensors}` with an index and a configuration."""
    from braidax._checkpoint.safetensors_writer import write_safetensors

    folder.mkdir(exist_ok=True)
    weight_map = {}
    for shard, tensors in shards.items():
        write_safetensors(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_json()))
    return folder


def write_flash_layer(path, layer_idx):
    """A layer of DeepSeek-V4-Flash's size, 3.4 GB, with random payload, one tensor at a time."""
    from braidax._checkpoint.safetensors_writer import Lazy, write_safetensors

    rng = np.random.default_rng(0)
    prefix, hidden, intermediate, experts = f"layers.{layer_idx}.ffn.", 4096, 2048, 256

    def random(low, high, dtype, *shape):
        return Lazy(dtype, shape, lambda: rng.integers(low, high, shape, dtype=np.uint8))

    weight = (0.02 * rng.standard_normal((experts, hidden))).astype(jnp.bfloat16)
    tensors = {
        f"{prefix}gate.weight": weight,
        f"{prefix}gate.bias": np.zeros(experts, np.float32),
    }
    for name, (size_out, size_in) in zip(
        ("w1", "w3", "w2"), _shapes(hidden, intermediate), strict=True
    ):
        for expert in range(experts):
            stem = f"{prefix}experts.{expert}.{name}"
            tensors[f"{stem}.weight"] = Lazy(
                "I8",
                (size_out, size_in // 2),
                lambda count=size_out * size_in // 2: np.frombuffer(rng.bytes(count), np.int8),
            )
            tensors[f"{stem}.scale"] = random(118, 123, "F8_E8M0", size_out, size_in // 32)
        stem = f"{prefix}shared_experts.{name}"
        tensors[f"{stem}.weight"] = random(0, 64, "F8_E4M3", size_out, size_in)
        tensors[f"{stem}.scale"] = random(118, 123, "F8_E8M0", size_out // 128, size_in // 128)
    write_safetensors(path, tensors)

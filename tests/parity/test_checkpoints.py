"""Files: what transformers writes we read, what we write it reads, and both decode alike."""

import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from whole_model import HASH_LAYERS, LAYERS, make_model

import braidax as bx
from braidax._checkpoint.dtypes import DTYPES
from braidax._checkpoint.quantization import decode_blocks, decode_fp4
from braidax._checkpoint.safetensors_reader import read_header
from braidax._checkpoint.safetensors_writer import write_safetensors

CODES = np.broadcast_to(np.arange(256, dtype=np.uint8), (255, 256)).copy()
# Without 255, NaN: transformers reads it as infinity where it is a raw byte, we refuse the file.
SCALES = np.arange(255, dtype=np.uint8)[:, None]
DTYPE = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(jnp.bfloat16),
    torch.float16: np.dtype(np.float16),
}
FLOAT8 = {torch.float8_e4m3fn: jnp.float8_e4m3fn, torch.float8_e5m2: jnp.float8_e5m2}


def to_torch(array, dtype):
    return torch.from_numpy(np.ascontiguousarray(array)).view(dtype)


def scales_of_every_kind(scale):
    """The same scales as torch and numpy hold them: E8M0, raw bytes, float32."""
    exponents = to_torch(scale, torch.float8_e8m0fnu)
    return {
        "F8_E8M0": (exponents, scale.view(jnp.float8_e8m0fnu)),
        "U8": (torch.from_numpy(scale.copy()), scale),
        "F32": (exponents.float(), exponents.float().numpy()),
    }


def assert_same_bytes(found, reference):
    """Byte for byte; of NaN, whose bits depend on torch's vector width, only that it is one."""
    numbers = ~torch.isnan(reference).numpy()
    bits = {4: torch.int32, 2: torch.int16}[reference.element_size()]
    wanted = reference.view(bits).numpy()
    assert found.shape == wanted.shape and found.dtype.itemsize == wanted.dtype.itemsize
    assert np.array_equal(np.isnan(found.astype(np.float32)), ~numbers)
    assert np.array_equal(found.view(wanted.dtype)[numbers], wanted[numbers])


@pytest.mark.parametrize("kind", ["F8_E8M0", "U8", "F32"])
@pytest.mark.parametrize("dtype", DTYPE, ids=str)
def test_fp4_decodes_as_transformers_does(dtype, kind):
    """Every byte at every scale, those of subnormal numbers among them."""
    theirs, ours = scales_of_every_kind(np.repeat(SCALES, 16, axis=1))[kind]
    wanted = Fp8Dequantize(None)._dequantize_one(to_torch(CODES, torch.int8), theirs, dtype)
    assert_same_bytes(decode_fp4(CODES, ours, DTYPE[dtype]), wanted)


@pytest.mark.parametrize("kind", ["F8_E8M0", "U8", "F32"])
@pytest.mark.parametrize("float8", FLOAT8, ids=str)
@pytest.mark.parametrize("dtype", DTYPE, ids=str)
def test_fp8_decodes_as_transformers_does(dtype, float8, kind):
    theirs, ours = scales_of_every_kind(SCALES)[kind]
    wanted = Fp8Dequantize(None)._dequantize_one(to_torch(CODES, float8), theirs, dtype)
    found = decode_blocks(CODES.view(FLOAT8[float8]), ours, (1, 256), DTYPE[dtype])
    assert_same_bytes(found, wanted)


def test_golden_digests(request):
    """Every byte at every scale, as the ordinary tests check it without torch."""
    dequantize = Fp8Dequantize(None)._dequantize_one
    found = {}
    for dtype in DTYPE:
        name = str(dtype).removeprefix("torch.")
        theirs, _ = scales_of_every_kind(np.repeat(SCALES, 16, axis=1))["F8_E8M0"]
        decoded = {"fp4": dequantize(to_torch(CODES, torch.int8), theirs, dtype)}
        theirs, _ = scales_of_every_kind(SCALES)["F8_E8M0"]
        for float8 in FLOAT8:
            kind = str(float8).removeprefix("torch.")
            decoded[kind] = dequantize(to_torch(CODES, float8), theirs, dtype)
        for kind, numbers in decoded.items():
            bits = numbers.view({4: torch.int32, 2: torch.int16}[numbers.element_size()])
            found[f"{kind} to {name}"] = golden.digest(bits.numpy().view(DTYPE[dtype]))
    if request.config.getoption("--write-golden"):
        golden.DECODED.write_text(json.dumps(found, indent=2) + "\n")
    else:
        assert json.loads(golden.DECODED.read_text()) == found


@pytest.mark.parametrize("block", [(128, 128), (32, 32)])
def test_fp8_in_blocks_decodes_as_transformers_does(block):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (256, 384), dtype=np.uint8)
    scale = rng.standard_normal((256 // block[0], 384 // block[1])).astype(np.float32)
    wanted = Fp8Dequantize(None)._dequantize_one(
        to_torch(codes, torch.float8_e4m3fn), torch.from_numpy(scale), torch.bfloat16
    )
    found = decode_blocks(codes.view(jnp.float8_e4m3fn), scale, block, DTYPE[torch.bfloat16])
    assert_same_bytes(found, wanted)


def test_files_of_the_safetensors_package(tmp_path):
    """Its file, read by us; ours, by it: names, dtypes, shapes and bytes."""
    bits = torch.arange(256, dtype=torch.uint8)
    types = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        **{f"I{size}": getattr(torch, f"int{size}") for size in (8, 16, 32, 64)},
        **{f"U{size}": getattr(torch, f"uint{size}") for size in (8, 16, 32, 64)},
    }
    tensors = {name: bits.clone().view(dtype).reshape(2, -1) for name, dtype in types.items()}
    tensors |= {"BOOL": bits > 99, "scalar": torch.tensor(3), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    file = read_header(tmp_path / "theirs.safetensors")
    assert file.keys() == tensors.keys()
    arrays = {name: file[name].read() for name in tensors}
    for name, tensor in tensors.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].dtype == DTYPES.get(name, arrays[name].dtype)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert arrays[name].tobytes() == raw.tobytes()
    write_safetensors(tmp_path / "ours.safetensors", arrays)
    with safe_open(tmp_path / "ours.safetensors", "pt") as again:
        assert again.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs)


def test_fp4_of_the_safetensors_package(tmp_path):
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16)
    save_file({"x": to_torch(codes, torch.float4_e2m1fn_x2)}, tmp_path / "theirs.safetensors")
    file = read_header(tmp_path / "theirs.safetensors")
    entry, array = file["x"], file["x"].read()
    assert (entry.dtype, entry.shape, array.shape) == ("F4", (2, 32), (2, 32))
    assert file["x"].raw().tobytes() == codes.tobytes()
    write_safetensors(tmp_path / "ours.safetensors", {"x": array})
    found = load_file(tmp_path / "ours.safetensors")["x"]
    assert found.dtype == torch.float4_e2m1fn_x2
    assert found.view(torch.uint8).numpy().tobytes() == codes.tobytes()


@pytest.fixture(scope="module")
def model():
    return make_model()


def reference_tensors(model, layer_idx):
    return {name: t.numpy() for name, t in model.model.layers[layer_idx].mlp.state_dict().items()}


@pytest.mark.parametrize("original", [True, False], ids=["upstream names", "module names"])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_what_transformers_saves_is_loaded(tmp_path, model, original, shard_size):
    """In both of its spellings, in one file and in shards that cut through layers."""
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    for layer_idx in range(LAYERS):
        found = bx.to_state_dict(bx.load_moe(tmp_path, layer_idx))
        wanted = reference_tensors(model, layer_idx)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def saved_by_us(folder, model, quantization=None):
    """The model, its MoE layers written by `save_moe` and all else by transformers."""
    model.save_pretrained(folder, save_original_format=False)
    (whole,) = folder.glob("*.safetensors")
    rest = {name: t for name, t in load_file(whole).items() if ".mlp." not in name}
    whole.unlink()  # transformers prefers its name to an index
    path = folder / "rest.safetensors"
    save_file(rest, path, metadata={"format": "pt"})
    weight_map = dict.fromkeys(rest, path.name)
    config = bx.MoEConfig.from_hf(model.config.to_dict())
    layers = []
    for layer_idx in range(LAYERS):
        moe = bx.from_state_dict(config, layer_idx, reference_tensors(model, layer_idx))
        shard = folder / f"layer-{layer_idx}.safetensors"
        bx.save_moe(shard, moe, layer_idx, quantization=quantization)
        weight_map |= dict.fromkeys(read_header(shard), shard.name)
        layers.append(moe)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def test_what_we_save_is_loaded_by_transformers(tmp_path, model):
    layers = saved_by_us(tmp_path, model)
    found, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for layer_idx, moe in enumerate(layers):
        wanted, ours = bx.to_state_dict(moe), reference_tensors(found, layer_idx)
        assert ours.keys() == wanted.keys()
        for name, array in wanted.items():
            assert ours[name].dtype == array.dtype and np.array_equal(ours[name], array)
    assert HASH_LAYERS < LAYERS  # both kinds of router


@pytest.mark.parametrize("quantization", ["fp4", "fp8"])
def test_what_we_quantize_is_loaded_by_transformers(tmp_path, model, quantization):
    """The whole model, decoded by transformers to bfloat16, byte for byte as we decode it."""
    saved_by_us(tmp_path, model, quantization)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {
        "expert_dtype": quantization,
        "dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }
    path.write_text(json.dumps(config))
    found, info = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    for layer_idx in range(LAYERS):
        moe = bx.load_moe(tmp_path, layer_idx, dtype=jnp.bfloat16)
        for name, array in bx.to_state_dict(moe).items():
            theirs = found.model.layers[layer_idx].mlp.state_dict()[name]
            if "experts" in name:
                assert_same_bytes(array, theirs)


def test_outputs_of_a_loaded_layer(tmp_path, model):
    """From transformers' file to a running block: its layer's output."""
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    hidden_states = torch.randn(2, 7, model.config.hidden_size)
    input_ids = torch.randint(0, model.config.vocab_size, (2, 7))
    for layer_idx in (0, LAYERS - 1):
        moe = bx.load_moe(tmp_path, layer_idx)
        output, _ = moe(jnp.asarray(hidden_states.numpy()), jnp.asarray(input_ids.numpy()))
        wanted = model.model.layers[layer_idx].mlp(hidden_states, input_ids=input_ids).numpy()
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(output), wanted, rtol=0, atol=1e-5 * scale)
    assert jax.default_backend() == "cpu"

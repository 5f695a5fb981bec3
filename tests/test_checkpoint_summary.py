"""What is said about a checkpoint, from its headers."""

import json
import os
import subprocess
import sys

import checkpoints
import numpy as np
import pytest
from checkpoints import EXPERTS, HIDDEN, INTERMEDIATE, LAYOUTS, SLOTS, VOCAB, Layout

import braidax as bx
from braidax._checkpoint.safetensors_writer import write_safetensors
from braidax._checkpoint.summary import TableStatistics

EXPERT = 3 * HIDDEN * INTERMEDIATE
GATE = EXPERTS * HIDDEN


def summarize(path, layer_idx=None):
    return bx.Checkpoint(path).summary(layer_idx)


def write(folder, names=("V4-Flash and Pro",) * 3):
    """Layers 0 to 2 in a shard each, and an embedding."""
    shards = {"embed.safetensors": {"embed.weight": np.zeros((VOCAB, HIDDEN), np.float16)}}
    for layer_idx, name in enumerate(names):
        shards[f"{layer_idx}.safetensors"], _ = checkpoints.layer_tensors(LAYOUTS[name], layer_idx)
    return checkpoints.write_shards(folder / "model", shards)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_bytes_and_router_of_every_layout(tmp_path, name):
    summary = summarize(write(tmp_path, (name,) * 3))
    hashed, _, scored = summary.layers
    shapes = [(layer.name, layer.router, layer.num_experts) for layer in summary.layers]
    assert shapes == [
        ("layers.0", "hash", EXPERTS),
        ("layers.1", "hash", EXPERTS),
        ("layers.2", "top-k", EXPERTS),
    ]
    assert {layer.num_experts_per_token for layer in summary.layers} == {SLOTS}
    assert hashed.parameters == (EXPERTS + 1) * EXPERT + GATE
    assert scored.parameters == hashed.parameters + EXPERTS
    assert hashed.active == (SLOTS + 1) * EXPERT + GATE
    embedding = VOCAB * HIDDEN
    layers = 3 * hashed.parameters + EXPERTS
    assert (summary.parameters, summary.num_files) == (layers + embedding, 4)
    assert summary.active == 3 * hashed.active + EXPERTS + embedding
    files = (tmp_path / "model").glob("*.safetensors")
    sizes = [len(data) - 8 - int.from_bytes(data[:8], "little") for data in map(_bytes, files)]
    assert sum(summary.num_bytes.values()) == sum(sizes)
    payload = LAYOUTS[name].payload
    assert ("FP4" if payload in ("I8", "U8", "F4") else payload) in scored.num_bytes


def _bytes(path):
    return path.read_bytes()


def test_bytes_of_a_release(tmp_path):
    """By the formula of the format: half a byte a weight and a byte for 32; FP8 in 128x128."""
    layer = summarize(write(tmp_path)).layers[2]
    assert layer.num_bytes == {
        "FP4": EXPERTS * EXPERT // 2,
        "F8_E4M3": EXPERT,
        "F8_E8M0": EXPERTS * EXPERT // 32 + EXPERT // 128**2,
        "BF16": 2 * GATE,
        "F32": 4 * EXPERTS,
    }


def test_table_statistics(tmp_path):
    table = np.array([[0, 1], [1, 1], [1, 3]])
    tensors, _ = checkpoints.layer_tensors(Layout(), 0)
    tensors["layers.0.ffn.gate.tid2eid"] = table
    write_safetensors(tmp_path / "model.safetensors", tensors)
    summary = summarize(tmp_path)
    assert summary.layers[0].table == TableStatistics(3, fewest=0, most=4, unused=1, repeated=1)
    assert "hash table of 3 token ids, 0 to 4 an expert, 1 experts unused" in str(summary)


def test_what_is_damaged_is_said(tmp_path):
    tensors, _ = checkpoints.layer_tensors(Layout(), 0)
    tensors["layers.0.ffn.gate.tid2eid"][3, 1] = EXPERTS
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"a.safetensors: `layers.0.ffn.gate.tid2eid` .* row 3"):
        summarize(tmp_path)
    tensors["layers.0.ffn.gate.weight"] = np.zeros(3, np.float32)
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"gate.weight` must have shape \(experts, hidden\)"):
        summarize(tmp_path)
    with pytest.raises(FileNotFoundError):
        summarize(tmp_path / "nothing")


def test_one_layer(tmp_path):
    folder = write(tmp_path)
    (folder / "0.safetensors").unlink()  # not opened
    summary = summarize(folder, 2)
    assert [layer.name for layer in summary.layers] == ["layers.2"]
    assert summary.num_files == 1 and summary.active == summary.layers[0].active
    with pytest.raises(ValueError, match="index.json: `layers.7` must be in the checkpoint"):
        summarize(folder, 7)
    with pytest.raises(ValueError, match="must lie in the shard 0.safetensors"):
        summarize(folder)


def test_dense_layers_and_multi_token_prediction(tmp_path):
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": np.zeros((8, 4), np.float32),
        "mtp.0.ffn.gate.weight": np.zeros((2, 4), np.float32),
        "mtp.0.ffn.experts.0.w1.weight": np.zeros((3, 4), np.float32),
        "model.layers.0.attn_norm.weight": np.zeros(5, np.float32),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    summary = summarize(tmp_path)
    dense, predicting = summary.layers
    assert (dense.router, dense.parameters, dense.active) == ("dense", 32, 32)
    assert (predicting.router, predicting.parameters, predicting.active) == ("top-k", 20, None)
    assert (summary.parameters, summary.active) == (57, 37)


def test_what_is_not_understood_is_not_counted_as_active(tmp_path):
    """A DBRX and a Llama-4: experts, under names and routers of other families."""
    matrix = np.zeros((4, 8), np.float32)
    dbrx = {
        "transformer.wte.weight": matrix,
        "transformer.blocks.0.ffn.router.layer.weight": matrix,
        "transformer.blocks.0.ffn.experts.mlp.w1": matrix,
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, dbrx)
    summary = summarize(path)
    assert (summary.parameters, summary.active, summary.layers) == (96, None, ())
    assert "no table has `transformer.blocks.0.ffn.experts.mlp.w1`" in summary.note
    (tmp_path / "config.json").write_text('{"model_type": "dbrx"}')
    note = summarize(path).note
    assert "`model_type` must be one of deepseek_v2" in note and "Got 'dbrx'" in note
    write_safetensors(
        path,
        {"model.layers.0.mlp.chooser.weight": matrix, "model.layers.0.mlp.experts.down": matrix},
    )
    (layer,) = summarize(path).layers
    assert (layer.router, layer.parameters, layer.active) == ("?", 64, None)
    assert layer.row()[1:4] == ("?", "-", "?")


def test_a_dense_model_is_active_as_a_whole(tmp_path):
    tensors = {"model.layers.0.mlp.up_proj.weight": np.zeros((4, 8), np.float32)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    summary = summarize(tmp_path)
    assert summary.parameters == summary.active == 32


def test_experts_per_token_may_be_unknown(tmp_path):
    folder = write(tmp_path)
    (folder / "config.json").unlink()
    summary = summarize(folder)
    assert [layer.num_experts_per_token for layer in summary.layers] == [SLOTS, SLOTS, None]
    assert summary.active is None and "config.json" in summary.note
    assert "? active" in str(summary)


def test_text(tmp_path):
    lines = str(summarize(write(tmp_path))).splitlines()
    assert lines[0] == str(tmp_path / "model")
    assert lines[2].split() == (
        "layer router experts a token stored as bytes parameters active".split()
    )
    row = "layers.2 top-k 4 2 FP4 + F8_E4M3 + F8_E8M0 + BF16 + F32 309.27 kB 492,548 295,940"
    assert lines[5].split() == row.split()
    assert lines[-2].startswith("97 tensors in 4 files, 962.59 kB: FP4")
    assert lines[-1] == "1,494,020 parameters, 904,196 active for a token"


@pytest.mark.slow
def test_seventy_thousand_tensors_in_seconds_and_not_minutes(tmp_path):
    """46 shards by hand, their data a hole in the file: only headers can be read in that time."""
    weight_map = {}
    for shard in range(46):
        header, position = {}, 0
        prefix = f"layers.{shard}.ffn."
        names = {f"{prefix}gate.weight": ("BF16", [256, 4096], 2**21)}
        for expert in range(256):
            for matrix in ("w1", "w2", "w3"):
                stem = f"{prefix}experts.{expert}.{matrix}"
                names[f"{stem}.weight"] = ("I8", [2048, 2048], 2**22)
                names[f"{stem}.scale"] = ("F8_E8M0", [2048, 128], 2**18)
        for name, (dtype, shape, size) in names.items():
            offsets = [position, position + size]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            position += size
        text = json.dumps(header).encode()
        with (tmp_path / f"{shard}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    assert len(weight_map) > 70_000
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # Without the import hook of the tests, which checks each of the calls.
    code = (
        "import sys, time; import braidax as bx;"
        "start = time.process_time(); summary = bx.Checkpoint(sys.argv[1]).summary();"
        "print(time.process_time() - start, summary.parameters)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    seconds, parameters = output.split()
    assert float(seconds) < 20  # about 1 on a quiet machine; quadratic in the names takes minutes
    assert int(parameters) == 46 * (256 * 4096 + 768 * 2**23)

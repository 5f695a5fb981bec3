"""`bx.summary`: parameters, bytes and FLOPs against numbers worked out by hand."""

import inspect
import json

import checkpoints
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from checkpoints import EXPERTS, HASH_LAYERS, HIDDEN, INTERMEDIATE, LAYOUTS, SLOTS

import braidax as bx
from braidax._checkpoint.safetensors_writer import write_safetensors

TINY = bx.MoEConfig.tiny()  # hidden 32, intermediate 16, 8 experts, 2 a token, vocabulary of 256
GATE, EXPERT = 8 * 32, 3 * 32 * 16
HASH_LAYER, TOP_K_LAYER = 0, 2


@pytest.mark.parametrize(
    "config, total, active",
    [
        # 256 experts of 3 * 4096 * 2048 = 25,165,824, one shared; gate 256 * 4096; bias 256.
        ("deepseek_v4_flash", 257 * 25_165_824 + 1_048_576 + 256, 7 * 25_165_824 + 1_048_576 + 256),
        # 256 of 3 * 7168 * 2048 = 44,040,192, 8 a token; gate 256 * 7168 = 1,835,008.
        ("deepseek_v3", 257 * 44_040_192 + 1_835_008 + 256, 9 * 44_040_192 + 1_835_008 + 256),
        # 384 of 3 * 7168 * 3072 = 66,060,288, 6 a token; gate 384 * 7168 = 2,752,512.
        ("deepseek_v4_pro", 385 * 66_060_288 + 2_752_512 + 384, 7 * 66_060_288 + 2_752_512 + 384),
    ],
)
def test_released_layers(config, total, active):
    config = getattr(bx.MoEConfig, config)()
    summary = bx.summary(config)
    assert (summary.parameters, summary.active) == (total, active)
    assert summary.num_bytes == 4 * total
    # Two FLOPs a weight that is multiplied with: all but the bias. Backward twice as much.
    assert summary.forward_flops == 2 * (active - config.num_experts)
    assert summary.backward_flops == 2 * summary.forward_flops


def test_v4_flash_in_round_numbers():
    summary = bx.summary(bx.MoEConfig.deepseek_v4_flash())
    assert f"{summary.parameters / 1e9:.2f} {summary.active / 1e6:.0f}" == "6.47 177"
    assert summary.forward_flops == 354_418_688


def test_a_hash_layer_has_a_table_instead_of_a_bias(getkey):
    block = bx.RoutedAndSharedMoE.from_config(TINY, HASH_LAYER, key=getkey())
    (counted,) = bx.summary(block).blocks
    assert (counted.router, counted.path, counted.layers) == ("hash", "", 1)
    assert counted.parameters == GATE + 9 * EXPERT
    assert counted.active == GATE + 3 * EXPERT
    assert counted.num_bytes == 4 * (GATE + 9 * EXPERT) + 4 * 256 * 2
    router, experts, shared = counted.parts
    assert router.shapes == {"gate.weight": "f32[8,32]", "table": "i32[256,2]"}
    assert (router.parameters, experts.parameters, shared.parameters) == (GATE, 8 * EXPERT, EXPERT)
    assert (router.forward_flops, experts.forward_flops) == (2 * GATE, 2 * 2 * EXPERT)


def test_without_a_shared_expert_and_in_bfloat16(getkey):
    block = bx.RoutedMoE.from_config(TINY, TOP_K_LAYER, dtype=jnp.bfloat16, key=getkey())
    summary = bx.summary(block)
    assert (summary.parameters, summary.active) == (GATE + 8 + 8 * EXPERT, GATE + 8 + 2 * EXPERT)
    assert summary.num_bytes == 2 * (GATE + 8 * EXPERT) + 4 * 8  # the bias stays float32
    assert [part.name for part in summary.blocks[0].parts] == ["router", "experts"]
    assert summary.other is None


class Layers(eqx.Module):
    """A model of every kind of thing: blocks in a list, in a stack, arrays that are not weights."""

    embedding: eqx.nn.Embedding
    layers: list
    stacked: bx.RoutedAndSharedMoE
    positions: jax.Array
    name: str = eqx.field(static=True)

    def __init__(self, key):
        one = lambda layer, key: bx.RoutedAndSharedMoE.from_config(TINY, layer, key=key)  # noqa: E731
        self.embedding = eqx.nn.Embedding(256, 32, key=key)
        self.layers = [one(HASH_LAYER, key), eqx.nn.Linear(32, 32, key=key), one(TOP_K_LAYER, key)]
        self.stacked = eqx.filter_vmap(lambda key: one(TOP_K_LAYER, key))(jax.random.split(key, 5))
        self.positions = jnp.arange(100)
        self.name = "layers"


@pytest.fixture(scope="module")
def layers():
    return Layers(jax.random.key(0))


def test_a_model_lists_every_block_and_the_rest(layers):
    summary = bx.summary(layers)
    assert [(block.path, block.router, block.layers) for block in summary.blocks] == [
        ("layers[0]", "hash", 1),
        ("layers[2]", "top-k", 1),
        ("stacked", "top-k", 5),
    ]
    other = 256 * 32 + 32 * 32 + 32
    assert summary.other.parameters == summary.other.active == other
    assert summary.other.num_bytes == 4 * (other + 100)
    one, bias = GATE + 9 * EXPERT, 8
    assert [block.parameters for block in summary.blocks] == [one, one + bias, 5 * (one + bias)]
    used = GATE + 3 * EXPERT
    assert [block.active for block in summary.blocks] == [used, used + bias, 5 * (used + bias)]
    assert [block.forward_flops for block in summary.blocks] == [2 * used, 2 * used, 10 * used]
    assert summary.parameters == 7 * one + 6 * bias + other
    assert summary.active == 7 * used + 6 * bias + other
    arrays = jax.tree.leaves(eqx.filter(layers, eqx.is_array))
    assert summary.num_bytes == sum(array.nbytes for array in arrays)
    assert summary.backward_flops == 2 * summary.forward_flops == 28 * used


def test_shapes_are_enough(layers):
    shapes = eqx.filter_eval_shape(Layers, jax.eval_shape(lambda: jax.random.key(0)))
    assert bx.summary(shapes).to_dict() == bx.summary(layers).to_dict()


def test_a_dense_model_has_no_blocks(getkey):
    summary = bx.summary(eqx.nn.Linear(3, 4, key=getkey()))
    assert (summary.blocks, summary.parameters, summary.active) == ((), 16, 16)
    assert "Linear, all" in str(summary)


@pytest.mark.parametrize("name", ["V4-Flash and Pro", "V3"])
def test_packed_experts_count_as_what_they_hold(tmp_path, name):
    tensors, _ = checkpoints.layer_tensors(LAYOUTS[name], HASH_LAYERS)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config_json()))
    packed, decoded = (
        bx.summary(bx.load_moe(path, HASH_LAYERS, dtype=dtype)).blocks[0]
        for dtype in ("packed", "float32")
    )
    assert packed.parameters == decoded.parameters
    assert packed.active == decoded.active
    assert packed.forward_flops == decoded.forward_flops
    expert = 3 * HIDDEN * INTERMEDIATE
    # The weights are constants: only the rows get a gradient, one product instead of two.
    assert decoded.parts[1].backward_flops - packed.parts[1].backward_flops == 2 * SLOTS * expert
    arrays = (packed.parts[1].num_bytes, decoded.parts[1].num_bytes)
    per_weight = 0.5 if name.startswith("V4") else 1
    assert EXPERTS * expert * per_weight < arrays[0] < EXPERTS * expert * (per_weight + 0.2)
    assert arrays[1] == 4 * EXPERTS * expert
    alone = bx.summary(bx.load_moe(path, HASH_LAYERS, dtype="packed").routed.experts)
    assert alone.parameters == alone.active == EXPERTS * expert
    assert (alone.blocks, alone.num_bytes) == ((), arrays[0])


class Linears(bx.AbstractExperts):
    """Experts of another class: one matrix and a bias each."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, rows, group_sizes, matmul):
        raise NotImplementedError


def test_experts_and_routers_of_other_classes(getkey):
    class Mine(bx.AbstractRouter):
        gate: bx.Gate
        num_experts_per_token: int = eqx.field(static=True)

        def select(self, scores, logits, input_ids, *, key):
            raise NotImplementedError

    router = Mine(bx.Gate(32, 8, key=getkey()), 2)
    experts = Linears(jnp.zeros((8, 32, 32)), jnp.zeros((8, 32)))
    (block,) = bx.summary(bx.RoutedMoE(router, experts)).blocks
    assert block.router == "Mine"
    assert block.parameters == GATE + 8 * (32 * 32 + 32)
    assert block.active == GATE + 2 * (32 * 32 + 32)
    assert block.forward_flops == 2 * (GATE + 2 * 32 * 32)  # the bias is added, not multiplied


def test_biases_are_added_and_not_multiplied(getkey):
    sizes = {"use_bias": True, "key": getkey()}
    router = bx.TopKRouter(32, 8, 2, **sizes)
    block = bx.RoutedMoE(router, bx.Experts(8, 32, 16, **sizes))
    block = bx.RoutedAndSharedMoE(block, bx.FeedForward(32, 16, **sizes))
    counted = bx.summary(block)
    biases = 2 * 16 + 32
    assert counted.active == GATE + 8 + 8 + 3 * (EXPERT + biases)
    assert counted.forward_flops == 2 * (GATE + 3 * EXPERT)
    assert counted.blocks[0].parts[1].shapes["gate_up_bias"] == "f32[8,2,16]"


def test_the_dispatch_and_what_auto_chooses_are_told(getkey):
    def told(dispatch):
        block = bx.top_k_moe(32, 16, 8, 2, dispatch=dispatch, key=getkey())
        (block,) = bx.summary({"block": block}).blocks
        return block.dispatch, block.matmul

    chosen = f"Auto(), which is {bx.matmul.Auto().chosen()} on {jax.default_backend()}"
    assert told(bx.SortedDispatch()) == ("SortedDispatch", chosen)
    assert told(bx.SortedDispatch(bx.matmul.Ragged())) == ("SortedDispatch", "Ragged()")
    assert told(bx.DenseDispatch()) == ("DenseDispatch", "")
    mesh = jax.make_mesh((1, 1), ("data", "expert"))
    assert told(bx.ExpertParallel(mesh)) == ("ExpertParallel", chosen)
    text = str(bx.summary(TINY))
    assert f"dispatch: SortedDispatch {chosen}" in " ".join(text.split())


def test_text_and_html_and_dictionary(layers):
    summary = bx.summary(layers)
    lines = str(summary).splitlines()
    assert lines == repr(summary).splitlines()
    assert "module arrays parameters active bytes forward backward" == " ".join(lines[0].split())
    hashed = "layers[0]: RoutedAndSharedMoE hash, 2 of 8 experts 14,080 4,864 58.37 kB 9.7 k 19.5 k"
    assert " ".join(lines[1].split()) == hashed
    assert "top-k, 2 of 8 experts, 5 layers" in str(summary)
    assert "gate_up f32[5,8,2,16,32]" in str(summary)
    html = summary._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") == 18
    assert "color" not in html and "overflow-x:auto" in html
    record = json.loads(json.dumps(summary.to_dict()))
    assert record["blocks"][2]["layers"] == 5
    assert record["active"] == summary.active
    assert record["blocks"][0]["parts"][1]["active"] == 2 * EXPERT


def test_names_are_escaped(getkey):
    block = bx.RoutedMoE.from_config(TINY, TOP_K_LAYER, key=getkey())
    html = bx.summary({"<script>": block, "rest": jnp.zeros(3)})._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_mistakes_are_named():
    summary = inspect.unwrap(bx.summary)
    for wrong in (bx.RoutedMoE, "model", None):
        with pytest.raises(TypeError, match="`model` must be a MoEConfig or a PyTree"):
            summary(wrong)


def test_half_of_a_partition_is_named(getkey):
    block = bx.RoutedMoE.from_config(TINY, TOP_K_LAYER, key=getkey())
    half = eqx.partition(block, bx.trainable(block))[1]
    with pytest.raises(ValueError, match="Got a TopKRouter whose `gate.weight` is None"):
        bx.summary(half)

"""`MoEConfig`: the record, the layers made of it, the presets, and Hugging Face configurations."""

import dataclasses
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import braidax as bx

# The main fields of the released configurations: `config.json` of DeepSeek-V3 and V4-Flash, and
# the nested form of V4.1-Flash.
V3_JSON = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "vocab_size": 129280,
}
V4_FLASH_JSON = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "vocab_size": 129280,
}
V4_1_TEXT_JSON = {
    "hidden_size": 5120,
    "moe_intermediate_size": 2304,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "vocab_size": 129280,
}


from_hf = bx.MoEConfig.from_hf


def without(key, config=V4_FLASH_JSON):
    return {name: value for name, value in config.items() if name != key}


SIZES = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 8, "num_experts_per_token": 2}


def make(**changes):
    return bx.MoEConfig(**{**SIZES, **changes})


def layer(config, layer_idx=0):
    return bx.RoutedAndSharedMoE.from_config(config, layer_idx, key=jax.random.key(0))


def test_defaults():
    assert dataclasses.astuple(make()) == (
        *(8, 4, 8, 2, None, 1, "sqrtsoftplus", True, 1.0),
        *(1, 1, 0, None, None, 1.0, "top2", "swiglu", False, False),
        *(None, False, None, 0, False, (), "deepseek_v4"),
    )


def test_config_is_frozen_and_hashable():
    config = make()
    assert hash(config) == hash(make())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 3


def test_shared_limit_follows_unless_given():
    assert make(swiglu_limit=10.0).shared_swiglu_limit == 10.0
    assert make(swiglu_limit=10.0, shared_swiglu_limit=None).shared_swiglu_limit is None
    assert make(swiglu_limit=None, shared_swiglu_limit=7.0).shared_swiglu_limit == 7.0


def test_numbers_become_python_numbers(unchecked):
    """In the layer: the record keeps what it is given."""
    config = make(num_experts_per_token=np.int64(2), scaling_factor=2, swiglu_limit=np.float32(10))
    assert config.scaling_factor == 2 and type(config.scaling_factor) is int
    routed = layer(config).routed
    assert type(routed.router.num_experts_per_token) is int
    assert type(routed.router.gate.scaling_factor) is float
    assert type(routed.experts.activation.limit) is float


NOT_ABOVE_0 = (0.0, -1.0, math.nan, math.inf)


@pytest.mark.hazard(1)
@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0) for name in ("hidden_size", "intermediate_size", "num_experts")],
        *[(name, -1) for name in ("num_experts_per_token", "vocab_size", "num_hash_layers")],
        *[("num_shared_experts", value) for value in (0, -1)],
        *[(name, 0) for name in ("num_groups", "num_selected_groups")],
        *[("scaling_factor", value) for value in NOT_ABOVE_0],
        *[("temperature", value) for value in NOT_ABOVE_0],
        *[("swiglu_limit", value) for value in NOT_ABOVE_0],
        ("shared_swiglu_limit", 0.0),
        ("score_function", "relu"),
        ("num_experts_per_token", 9),
        ("num_groups", 3),  # does not divide 8
        ("num_groups", 8),  # groups of one expert
        ("num_selected_groups", 2),  # of one group
    ],
)
def test_value_out_of_range(name, value):
    """The record holds it; the layer refuses it, hashed where only a hash layer reads it."""
    hashed = {"num_hash_layers": 1} if name == "vocab_size" else {}
    config = make(**{**hashed, name: value})
    named = name.removeprefix("shared_").removeprefix("swiglu_")
    with pytest.raises(ValueError, match=f"`(config.)?{named}` must .*Got "):
        layer(config)


@pytest.mark.parametrize("value", [True, 2.0, "2"])
@pytest.mark.parametrize(
    "name", ["num_experts", "num_hash_layers", "num_shared_experts", "vocab_size", "num_groups"]
)
def test_only_integers_are_counts(name, value, unchecked):
    hashed = {"num_hash_layers": 1} if name == "vocab_size" else {}
    with pytest.raises(TypeError, match=f"`{name}` must be an integer"):
        layer(make(**{**hashed, name: value}))


@pytest.mark.parametrize("name", ["scaling_factor", "swiglu_limit", "temperature"])
@pytest.mark.parametrize("value", [True, "1"])
def test_only_numbers_are_factors(name, value, unchecked):
    with pytest.raises(TypeError, match=f"`{name.removeprefix('swiglu_')}` must be a number"):
        layer(make(**{name: value}))


def test_normalize_is_a_bool(unchecked):
    with pytest.raises(TypeError, match="`normalize` must be a bool"):
        layer(make(normalize=1))


def test_hash_layers_need_a_vocabulary():
    config = make(num_hash_layers=1)
    with pytest.raises(ValueError, match="`config.vocab_size` must be given for a hash layer"):
        layer(config)
    assert isinstance(layer(config, 1).routed.router, bx.TopKRouter)
    router = layer(make(num_hash_layers=1, vocab_size=5)).routed.router
    np.testing.assert_array_equal(np.asarray(router.table), bx.hash_tables.md5(5, 8, 2, salt=0))


@pytest.mark.hazard(8)
def test_experts_per_token_fit_in_the_selected_groups():
    groups = {"num_groups": 4, "num_selected_groups": 2}
    router = layer(make(**groups, num_experts_per_token=4)).routed.router
    assert (router.num_groups, router.num_selected_groups) == (4, 2)
    text = "`num_experts_per_token` must be at most .*selected groups, 2 \\* 2. Got 5"
    with pytest.raises(ValueError, match=text):
        layer(make(**groups, num_experts_per_token=5))


@pytest.mark.hazard(2)
def test_every_score_function_is_known():
    """By the names of the oracle, and every other name is an error that lists them."""
    logits = np.linspace(-3, 2, 8)
    for name, scores in oracle.SCORES.items():
        gate = layer(make(score_function=name)).routed.router.gate
        got = eqx.tree_at(lambda g: g.weight, gate, jnp.eye(8))(jnp.asarray(logits, jnp.float32))
        np.testing.assert_allclose(np.asarray(got[0]), scores(logits), rtol=1e-5)
    with pytest.raises(ValueError, match=", ".join(oracle.SCORES)):
        layer(make(score_function="tanh"))


def test_presets_equal_the_released_configurations():
    pro = V4_FLASH_JSON | {
        "hidden_size": 7168,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
    }
    assert from_hf(V3_JSON) == bx.MoEConfig.deepseek_v3()
    assert from_hf(V4_FLASH_JSON) == bx.MoEConfig.deepseek_v4_flash()
    assert from_hf(pro) == bx.MoEConfig.deepseek_v4_pro()
    nested = {"model_type": "deepseek_v41", "text_config": V4_1_TEXT_JSON}
    assert from_hf(nested) == bx.MoEConfig.deepseek_v4_1_flash()
    assert bx.MoEConfig.tiny().num_hash_layers == 2


def test_reads_a_file_or_its_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V4_FLASH_JSON))
    assert from_hf(path) == from_hf(str(tmp_path)) == from_hf(V4_FLASH_JSON)


@pytest.mark.parametrize("spelling", ["n_routed_experts", "num_local_experts", "num_experts"])
def test_spellings_of_num_experts(spelling):
    config = without("n_routed_experts")
    assert from_hf({**config, spelling: 256}) == from_hf(V4_FLASH_JSON)


def test_agreeing_spellings_are_fine_and_conflicting_ones_are_not():
    assert from_hf({**V4_FLASH_JSON, "num_local_experts": 256}).num_experts == 256
    match = "`n_routed_experts` = 256, `num_local_experts` = 128"
    with pytest.raises(ValueError, match=match):
        from_hf({**V4_FLASH_JSON, "num_local_experts": 128})


def test_mlp_layer_types_count_as_hash_layers():
    """Without either key, three layers are hashed, as in transformers' `DeepseekV4Config`."""
    config = {**V4_FLASH_JSON, "num_hash_layers": None}
    assert from_hf({**config, "mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}) == (
        dataclasses.replace(from_hf(V4_FLASH_JSON), num_hash_layers=2)
    )
    assert from_hf({**config, "mlp_layer_types": ["moe"]}).num_hash_layers == 0
    assert (
        from_hf(config).num_hash_layers == from_hf(without("num_hash_layers")).num_hash_layers == 3
    )
    with pytest.raises(ValueError, match="`mlp_layer_types` must list every hash_moe layer before"):
        from_hf({**config, "mlp_layer_types": ["hash_moe", "moe", "hash_moe"]})
    with pytest.raises(ValueError, match="`num_hash_layers` = 3, `mlp_layer_types` = 1"):
        from_hf({**V4_FLASH_JSON, "mlp_layer_types": ["hash_moe", "moe"]})


@pytest.mark.parametrize("limit", [None, 0, 0.0, -1.0])
def test_no_positive_limit_is_no_clamp(limit):
    config = from_hf({**V4_FLASH_JSON, "swiglu_limit": limit})
    assert config.swiglu_limit is None and config.shared_swiglu_limit is None


def test_null_groups_are_one_group_and_gate_temp_is_the_temperature():
    config = from_hf({**V4_FLASH_JSON, "n_group": None, "topk_group": None, "gate_temp": 0.5})
    assert (config.num_groups, config.num_selected_groups, config.temperature) == (1, 1, 0.5)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", oracle.SCORES)
def test_the_file_says_whether_scores_are_divided(name, said):
    assert (
        from_hf({**V4_FLASH_JSON, "scoring_func": name, "norm_topk_prob": said}).normalize is said
    )


# What the code of each model type has for a key that is missing. Read off DeepseekV2Config,
# DeepseekV3Config and DeepseekV4Config of transformers 5.23; `tests/parity` compares with them.
SILENT = {
    "deepseek_v2": (2, "softmax", False, 1.0, 1, 1, 0, None),
    "deepseek_v3": (1, "sigmoid", True, 2.5, 8, 4, 0, None),
    "deepseek_v32": (1, "sigmoid", True, 2.5, 8, 4, 0, None),
    "kimi_k2": (1, "sigmoid", True, 2.5, 8, 4, 0, None),
    "deepseek_v4": (1, "sqrtsoftplus", True, 1.5, 1, 1, 3, 10.0),
    "deepseek_v41": (1, "sqrtsoftplus", True, 1.5, 1, 1, 0, 10.0),
    "deepseek_v41_text": (1, "sqrtsoftplus", True, 1.5, 1, 1, 0, 10.0),
}
SIZES_JSON = {
    "hidden_size": 8,
    "moe_intermediate_size": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("model_type", SILENT)
def test_a_missing_key_means_what_it_means_to_the_model(model_type):
    config = from_hf({"model_type": model_type, **SIZES_JSON})
    names = ("num_shared_experts", "score_function", "normalize", "scaling_factor", "num_groups")
    names += ("num_selected_groups", "num_hash_layers", "swiglu_limit")
    assert tuple(getattr(config, name) for name in names) == SILENT[model_type]


@pytest.mark.parametrize("base", [V3_JSON, V4_FLASH_JSON], ids=["V3", "V4"])
@pytest.mark.parametrize(
    "key, field, meaning",
    [
        ("n_shared_experts", "num_shared_experts", 0),  # `if config.n_shared_experts is not None:`
        ("norm_topk_prob", "normalize", False),  # `if self.norm_topk_prob:`
        ("n_group", "num_groups", 1),
        ("topk_group", "num_selected_groups", 1),
        ("swiglu_limit", "swiglu_limit", None),
        ("vocab_size", "vocab_size", None),
    ],
)
def test_null_means_what_it_means_to_the_models_own_code(key, field, meaning, base):
    assert getattr(from_hf({**base, key: None}), field) == meaning


@pytest.mark.parametrize("key", [*SIZES_JSON, "routed_scaling_factor", "scoring_func", "gate_temp"])
def test_a_null_that_means_nothing_is_named(key):
    with pytest.raises(ValueError, match=f"^config: `{key}` must "):
        from_hf({**V4_FLASH_JSON, key: None})


def test_the_other_spelling_of_shared_experts_is_read():
    config = without("n_shared_experts")
    assert from_hf({**config, "num_shared_experts": 2}).num_shared_experts == 2
    with pytest.raises(ValueError, match="`n_shared_experts` = 1, `num_shared_experts` = 2"):
        from_hf({**V4_FLASH_JSON, "num_shared_experts": 2})


@pytest.mark.parametrize("model_type", ["grok", "", None, ["deepseek_v3"], 3])
def test_an_unknown_model_type_is_named_with_those_that_are_known(model_type, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**V4_FLASH_JSON, "model_type": model_type}))
    with pytest.raises(ValueError) as error:
        from_hf(path)
    message = str(error.value)
    assert message.startswith(f"{path}: `model_type` must be one of deepseek_v2, deepseek_v3, ")
    assert message.endswith(f"Got {model_type!r}.")
    with pytest.raises(ValueError, match="`model_type` must be one of .*Got None"):
        from_hf(without("model_type"))


class Configuration:
    """As transformers' `PreTrainedConfig` is."""

    def to_dict(self):
        return V3_JSON


def test_a_configuration_object_is_read():
    assert from_hf(Configuration()) == bx.MoEConfig.deepseek_v3()
    for other in (None, 3, object()):
        with pytest.raises(TypeError, match="`source` must be a path, a dictionary or .*Got "):
            from_hf(other)


@pytest.mark.parametrize("key", SIZES_JSON)
def test_missing_key_is_named(key):
    with pytest.raises(ValueError, match=f"^config: .*`{key}`"):
        from_hf(without(key))


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("topk_method", "group_limited_greedy", "topk_method"),
        ("hidden_act", "gelu", "hidden_act"),
        ("scoring_func", "relu", "scoring_func"),
        ("mlp_layer_types", "hash_moe", "mlp_layer_types"),
    ],
)
def test_unsupported_value_is_named(key, value, named):
    with pytest.raises(ValueError, match=f"^config: `{named}` must "):
        from_hf({**V4_FLASH_JSON, key: value})


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("num_experts_per_tok", True, "num_experts_per_token"),
        ("swiglu_limit", math.nan, "limit"),
        ("swiglu_limit", True, "limit"),
        ("n_shared_experts", -1, "num_shared_experts"),
        ("vocab_size", None, "config.vocab_size"),
    ],
)
def test_a_value_that_no_layer_can_have_is_read_and_refused_by_the_layer(
    key, value, named, unchecked
):
    small = {"hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 8}
    config = from_hf({**V4_FLASH_JSON, **small, key: value})
    with pytest.raises((TypeError, ValueError), match=f"^`{named}` must .*Got "):
        layer(config)


def test_a_mistake_is_found_before_the_experts_are_made(monkeypatch):
    """DeepSeek-V3's take 45 GB."""
    monkeypatch.setattr("braidax._moe.routed.Experts", None)
    with pytest.raises(ValueError, match="`score_function` must be one of"):
        layer(make(score_function="relu"))


def test_bad_files_name_the_path(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_hf(tmp_path)
    for text, message in [("{", "not valid JSON"), ("[1]", "JSON object"), ("{}", "`model_type`")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            from_hf(path)


def test_is_hash_layer():
    config = bx.MoEConfig.deepseek_v4_flash()
    assert [config.is_hash_layer(layer) for layer in range(5)] == [True] * 3 + [False] * 2
    assert not bx.MoEConfig.deepseek_v3().is_hash_layer(0)


@pytest.mark.parametrize("layer_idx", [True, 1.0, None])
def test_layer_idx_is_an_integer(layer_idx, unchecked):
    for call in (bx.MoEConfig.tiny().is_hash_layer, lambda i: layer(bx.MoEConfig.tiny(), i)):
        with pytest.raises(TypeError, match="`layer_idx` must be an integer"):
            call(layer_idx)


def test_layer_idx_may_be_any_integer(unchecked):
    tiny = bx.MoEConfig.tiny()
    assert tiny.is_hash_layer(np.int32(1)) and not tiny.is_hash_layer(np.int64(2))


def test_layer_idx_is_not_traced_or_negative(unchecked):
    for call in (bx.MoEConfig.tiny().is_hash_layer, lambda i: layer(bx.MoEConfig.tiny(), i)):
        with pytest.raises(TypeError, match="`layer_idx` must be static, not traced"):
            jax.jit(call)(0)
        with pytest.raises(ValueError, match="`layer_idx` must be at least 0. Got -1"):
            call(-1)

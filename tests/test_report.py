"""`bx.report`: counts and figures against numbers worked out by hand, and what it prints."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routings import one_routing

import braidax as bx
from braidax._inspect.counts import coactivations, entropy, max_violation, token_sums
from braidax._inspect.records import load_bars
from braidax._inspect.top_tokens import TokenCounts

# Four tokens; the last is padding, the third names an expert twice.
INDICES = [[0, 1], [0, 2], [0, 0], [3, 3]]
WEIGHTS = [[3, 1], [1, 1], [2, 2], [9, 0]]
SCORES = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
MASK = [True, True, True, False]
IDS = np.array([7, 7, 9, 8])


@pytest.fixture(scope="module")
def by_hand():
    routing = one_routing(INDICES, WEIGHTS, SCORES, MASK, dropped=3)
    return bx.report(routing, input_ids=IDS)


def test_counts_by_hand(by_hand):
    assert by_hand.num_tokens.tolist() == [3]
    assert by_hand.load.tolist() == [[4, 1, 1, 0]]
    assert by_hand.load.dtype == by_hand.coactivation.dtype == np.int64
    assert by_hand.dead_experts.tolist() == [1]
    assert by_hand.dropped.tolist() == [3]
    assert by_hand.undefined.tolist() == [0]
    assert by_hand.coactivation.tolist() == [
        [[3, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    ]


def test_figures_by_hand(by_hand):
    assert by_hand.max_violation.tolist() == [4 / 1.5 - 1]
    assert by_hand.batch_max_violation.tolist() == [[4 / 1.5 - 1]]
    assert by_hand.top_1_share.tolist() == [4 / 6]
    shares = (4 / 6, 1 / 6, 1 / 6)
    wanted = -sum(share * math.log(share) for share in shares) / math.log(4)
    np.testing.assert_allclose(by_hand.load_entropy, [wanted], rtol=1e-14)
    np.testing.assert_allclose(by_hand.confidence, [(3 / 4 + 1 / 2 + 1) / 3], rtol=1e-14)
    # Entropies log 4, 0 and log 2, in units of log 4.
    np.testing.assert_allclose(by_hand.router_entropy, [(1 + 0 + 0.5) / 3], rtol=1e-14)


def test_top_tokens_by_hand(by_hand):
    assert by_hand.top_tokens == ((((7, "7", 2), (9, "9", 2)), ((7, "7", 1),), ((7, "7", 1),), ()),)
    (layer,) = bx.report(
        one_routing(INDICES, mask=MASK), input_ids=IDS, decode=lambda i: "x" * i, num_top_tokens=1
    ).top_tokens
    assert layer == (((7, "x" * 7, 2),), ((7, "x" * 7, 1),), ((7, "x" * 7, 1),), ())


def test_the_functions_of_the_load_agree():
    load = np.array([[5, 0, 3, 7], [1, 1, 1, 1], [0, 0, 0, 0]])
    shares = load / np.maximum(load.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(max_violation(load), bx.max_violation(jnp.array(load)), rtol=1e-6)
    np.testing.assert_allclose(entropy(shares), bx.load_entropy(jnp.array(load)), rtol=1e-6)


def test_counts_above_what_float32_holds(monkeypatch):
    """2**25 + 1 is not a float32."""
    loads = iter([2**25, 1])

    def with_large_load(layer):
        return token_sums(layer) | {"load": np.array([next(loads), 0, 0, 0])}

    monkeypatch.setattr("braidax._inspect.reports.token_sums", with_large_load)
    assert bx.report([[one_routing([[0]])]] * 2).load.tolist() == [[2**25 + 1, 0, 0, 0]]
    assert max_violation(np.array([2**25 + 1, 2**25 - 1])) == 2.0**-25


@pytest.fixture(scope="module")
def batches():
    """Three batches of two layers, `(batch, tokens) = (2, 5)`, by numpy's generator."""
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(3):
        layers = []
        for _ in range(2):
            indices = np.array([generator.permutation(4)[:2] for _ in range(10)]).reshape(2, 5, 2)
            weights, scores = generator.uniform(size=(2, 5, 2)), generator.uniform(size=(2, 5, 4))
            mask = generator.uniform(size=(2, 5)) < 0.7
            layers.append(one_routing(indices, weights, scores, mask))
        drawn.append((layers, generator.integers(0, 3, (2, 5))))
    return [layers for layers, _ in drawn], [ids for _, ids in drawn]


def test_a_data_set_adds_up(batches):
    routings, ids = batches
    found = bx.report(iter(routings), input_ids=ids)
    for layer in range(2):
        load = np.zeros(4, int)
        together, seen = np.zeros((4, 4), int), np.zeros((4, 3), int)
        first_share, entropies, violations = [], [], []
        for batch, batch_ids in zip(routings, ids, strict=True):
            routing, batch_load = batch[layer], np.zeros(4, int)
            for place in np.ndindex(2, 5):
                if not routing.mask[place]:
                    continue
                experts = np.asarray(routing.indices)[place]
                for expert in experts:
                    batch_load[expert] += 1
                    seen[expert, batch_ids[place]] += 1
                    for other in experts:
                        together[expert, other] += 1
                weights = np.asarray(routing.weights)[place].astype(float)
                shares = np.asarray(routing.scores)[place].astype(float)
                shares /= shares.sum()
                first_share.append(max(weights) / sum(weights))
                entropies.append(-sum(shares * np.log(shares)) / np.log(4))
            load += batch_load
            violations.append(batch_load.max() / batch_load.mean() - 1)
        assert found.load[layer].tolist() == load.tolist()
        assert found.num_tokens[layer] == load.sum() // 2
        assert found.coactivation[layer].tolist() == together.tolist()
        np.testing.assert_allclose(found.batch_max_violation[:, layer], violations, rtol=1e-14)
        np.testing.assert_allclose(found.confidence[layer], np.mean(first_share), rtol=1e-12)
        np.testing.assert_allclose(found.router_entropy[layer], np.mean(entropies), rtol=1e-12)
        for expert, tokens in enumerate(found.top_tokens[layer]):
            counts = sorted(((-n, i) for i, n in enumerate(seen[expert]) if n), key=tuple)
            assert tokens == tuple((i, str(i), -n) for n, i in counts)
    loads = [
        sum(np.asarray(bx.expert_load(batch[layer])) for batch in routings) for layer in (0, 1)
    ]
    assert found.load.tolist() == np.array(loads).tolist()


def test_one_batch_of_layers_is_not_a_data_set(batches):
    routings, ids = batches
    one, several = bx.report(routings[0], input_ids=ids[0]), bx.report([routings[0]])
    assert one.batch_max_violation.shape == several.batch_max_violation.shape == (1, 2)
    assert one.load.tolist() == several.load.tolist()
    assert bx.report(routings[0][1]).load.tolist() == one.load[1:].tolist()
    assert bx.report(layer[:1] for layer in routings).batch_max_violation.shape == (3, 1)
    assert several.top_tokens is None and several.routers is None and several.is_hash is None


@pytest.fixture(scope="module")
def model():
    """A hash layer, and two top-k layers stacked for a scan."""
    config = bx.MoEConfig.tiny()
    one = lambda layer, key: bx.RoutedMoE.from_config(config, layer, key=key)  # noqa: E731
    keys = jax.random.split(jax.random.key(0))
    return [one(0, keys[0]), eqx.filter_vmap(lambda key: one(2, key))(keys)]


def test_hash_layers_are_told_apart_and_stacked_layers_split(model, getkey):
    hidden_states, ids = jax.random.normal(getkey(), (3, 8, 32)), jnp.arange(24).reshape(3, 8)
    mask = jnp.arange(24).reshape(3, 8) > 3

    @eqx.filter_jit
    def routings(model):
        hashed = model[0].router(hidden_states, ids, mask=mask)
        stacked = eqx.filter_vmap(lambda r: r(hidden_states, ids, mask=mask))(model[1].router)
        return hashed, stacked

    hashed, stacked = routings(model)
    given = {"model": model, "input_ids": ids, "layer_names": ["a", "b", "c"]}
    report = bx.report((hashed, stacked), num_top_tokens=20, **given)
    assert report.routers == ("hash", "top-k", "top-k")
    assert report.is_hash.tolist() == [True, False, False]
    assert report.load.shape == (3, 8)
    table = np.asarray(model[0].router.table)[np.arange(4, 24)]
    assert report.load[0].tolist() == np.bincount(table.reshape(-1), minlength=8).tolist()
    for layer in range(2):
        kept = np.asarray(stacked.indices[layer])[np.asarray(mask)]
        assert report.load[1 + layer].tolist() == np.bincount(kept.ravel(), minlength=8).tolist()
        count = sum(token.count for expert in report.top_tokens[1 + layer] for token in expert)
        assert count == 40
    text = str(report)
    top_k, hash_ = text.index("top-k layers\n"), text.index("hash layers: fixed by token id")
    assert top_k < text.index("\nb ") < text.index("\nc ") < hash_ < text.index("\na ")
    assert "3 layers of 8 experts, 20 tokens in 1 batch\n" in text


def test_stacked_layers_of_a_scan(model, getkey):
    """The layers are told from the router, and without it from the stacked calls."""
    hidden_states = jax.random.normal(getkey(), (2, 32))
    arrays, static = eqx.partition(model[1], eqx.is_array)

    def step(carry, layer):
        return carry, eqx.combine(layer, static).router(carry)

    stacked = jax.lax.scan(step, hidden_states, arrays)[1]
    wanted = [np.bincount(np.ravel(layer), minlength=8).tolist() for layer in stacked.indices]
    assert wanted[0] != wanted[1]
    for report in (bx.report(stacked, model=model[1]), bx.report(stacked)):
        assert report.load.tolist() == wanted and report.num_tokens.tolist() == [2, 2]
    mixed = bx.report([model[1].router.__class__(32, 8, 2, key=getkey())(hidden_states), stacked])
    assert mixed.load[1:].tolist() == wanted and mixed.layer_names == ("0", "1", "2")


def test_stacked_calls_of_one_router_are_one_layer_of_a_model(getkey):
    router = bx.TopKRouter(32, 8, 2, key=getkey())
    examples = jax.vmap(router)(jax.random.normal(getkey(), (3, 5, 32)))
    load = np.bincount(np.ravel(examples.indices), minlength=8).tolist()
    assert bx.report(examples, model=router).load.tolist() == [load]
    assert bx.report(examples).load.shape == (3, 8)


def test_tokens_without_an_answer_are_counted_apart():
    weights, scores = np.array(WEIGHTS, float), np.array(SCORES, float)
    weights[0, 1], scores[1, 3] = np.nan, np.inf
    report = bx.report(one_routing(INDICES, weights, scores))
    assert report.undefined.tolist() == [2]
    assert report.load.tolist() == [[4, 1, 1, 2]]  # as `expert_load` counts
    np.testing.assert_allclose(report.confidence, [(1 + 1) / 2])
    assert "tokens with a weight or score that is not finite: 2 in layer 0" in str(report)
    assert "assignments dropped: 3 in layer 0" in str(bx.report(one_routing(INDICES, dropped=3)))


def test_nobody_is_not_counted():
    """Four is nobody: of token 1 one assignment, of token 2 all, and of padding."""
    indices, weights = [[0, 1], [2, 4], [4, 4], [4, 4]], [[3, 1], [2, 0], [0, 0], [0, 0]]
    routing = one_routing(indices, weights, SCORES, MASK, dropped=3)
    report = bx.report([[routing], [bx.over_capacity(routing, 0)]], input_ids=[IDS, IDS])
    assert report.load.tolist() == [[1, 1, 1, 0]]
    assert report.num_tokens.tolist() == [6] and report.undefined.tolist() == [0]
    assert report.dropped.tolist() == [3 + 6]
    assert report.coactivation[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0] * 4]
    np.testing.assert_array_equal(report.batch_max_violation, [[4 / 3 - 1], [np.nan]])
    # Tokens without an expert have no confidence, but they have scores.
    np.testing.assert_allclose(report.confidence, [(3 / 4 + 1) / 2], rtol=1e-14)
    np.testing.assert_allclose(report.router_entropy, [(1 + 0 + 0.5) / 3], rtol=1e-14)
    assert report.top_tokens == ((((7, "7", 1),), ((7, "7", 1),), ((7, "7", 1),), ()),)


def test_nothing_to_count():
    report = bx.report(one_routing(np.zeros((0, 2), int)), input_ids=np.zeros(0, int))
    assert report.load.tolist() == [[0, 0, 0, 0]]
    assert (report.max_violation[0], report.load_entropy[0], report.dead_experts[0]) == (0, 0, 4)
    assert math.isnan(report.confidence[0]) and math.isnan(report.router_entropy[0])
    assert report.to_dict()["confidence"] == [None]
    assert report.top_tokens == (((),) * 4,)
    assert "····" in str(report)
    padding = bx.report(one_routing(INDICES, mask=[False] * 4))
    assert padding.load.tolist() == report.load.tolist()


def test_a_single_expert():
    report = bx.report(one_routing(np.zeros((3, 1), int), experts=1))
    figures = (report.load_entropy, report.router_entropy, report.confidence, report.top_1_share)
    assert [figure.tolist() for figure in figures] == [[1], [1], [1], [1]]
    assert report.max_violation.tolist() == [0]


def test_token_counts_are_merged_and_wide_ids_kept():
    counts, wide = TokenCounts(), 2**62
    for ids in ([1, 1], [wide, 1], [2, wide], [wide, wide]):
        counts.add(np.array([[0], [1]]), np.array(ids))
    assert counts.of_expert(0, 9) == [(wide, 2), (1, 1), (2, 1)]
    assert counts.of_expert(1, 9) == [(1, 2), (wide, 2)]
    assert counts.of_expert(0, 1) == [(wide, 2)] and counts.of_expert(2, 9) == []


def test_bars():
    assert load_bars(np.array([0, 1, 4, 8, 7])) == "·▁▄█▇"  # mean 4: half height
    assert load_bars(np.zeros(3, int)) == "···"
    assert load_bars(np.array([1001, 999, 1000])) == "▄▄▄"
    assert load_bars(np.array([1, 1000])) == "▁█"  # used, however little
    many = np.zeros(384, int)
    many[[0, 383]] = 5
    assert load_bars(many) == "█" + "·" * 30 + "█"


def test_html_is_escaped_and_without_colours():
    routing = one_routing(INDICES, mask=MASK)
    report = bx.report(routing, input_ids=IDS, decode=lambda i: "<b>&", layer_names=["<script>"])
    html = report._repr_html_()
    assert "<b>" not in html and "<script>" not in html
    assert "&lt;script&gt;" in html and "&lt;b&gt;&amp;" in html
    assert "color" not in html and "background" not in html and "overflow-x:auto" in html
    assert html.count("<details>") == html.count("</details>") == 1
    assert "1.67" in html and "1.67" in str(report)
    for experts in (257, 2000):
        many = one_routing(np.arange(experts)[:, None], experts=experts)
        html = bx.report(many, input_ids=np.arange(experts))._repr_html_()
        assert "expert 0: &#x27;0&#x27; 100%" in html and len(html) < 5000


def test_dictionary_is_json(by_hand):
    record = json.loads(json.dumps(by_hand.to_dict(), allow_nan=False))
    assert record["load"] == [[4, 1, 1, 0]]
    assert record["top_tokens"][0][1] == [{"token_id": 7, "text": "7", "count": 1}]
    assert record["routers"] is None
    assert record["layer_names"] == ["0"]


def test_most_one_sided_experts_are_shown():
    indices = [[0], [0], [0], [0], [1], [1], [1], [1], [2]]
    ids = np.array([1, 1, 1, 1, 1, 2, 3, 4, 5])
    lines = str(bx.report(one_routing(indices), input_ids=ids, decode=lambda i: "_abcd\n"[i]))
    assert "layer 0, expert 0: 'a' 100%\n  layer 0, expert 1: 'a' 25%" in lines
    assert "expert 2" not in lines  # less than half the mean load
    many = bx.report([one_routing(indices)] * 14, input_ids=ids)
    assert "and 2 more layers" in str(many)


def test_mistakes_are_named(unchecked, model):
    routing, five = one_routing(INDICES), one_routing([[0]], experts=5)

    def says(kind, message, *args, **kwargs):
        with pytest.raises(kind, match=message):
            bx.report(*args, **kwargs)

    says(TypeError, "one Routing per layer.*Got a int", 3)
    for nothing in ([], [[]], iter(())):
        says(ValueError, "at least one Routing, in every batch. Got none", nothing)
    says(TypeError, "one Routing per layer.*Got a str", [routing, "other"])
    says(ValueError, r"number of experts. Got \[4, 5\] .* of \[4, 4\]", [routing, five])
    other = [[routing], [routing] * 2]
    says(ValueError, r"same layers in every batch.*Got \[4, 4\] .* of \[4\]", other)
    outside = [routing, one_routing([[0], [5]])]
    says(ValueError, r"`routings\[1\].indices` must be in \[0, experts=4\].*0 to 5", outside)
    says(ValueError, "Got 1 for 2 routers", routing, model=model)
    other = r"`routings\[0\]` must come from a router of 8 experts. Got 4"
    says(ValueError, other, routing, model=model[0])
    eight = one_routing(np.zeros((5, 2)), experts=8)
    layers = r"must be stacked over the layers \(2,\) of its router and over nothing else. Got "
    says(ValueError, layers + r"\(\)", eight, model=model[1])
    micro = one_routing(np.zeros((2, 2, 5, 2)), experts=8, dropped=np.zeros((2, 2)))
    says(ValueError, layers + r"\(2, 2\)", micro, model=model[1])
    says(ValueError, "`model` must hold a router. Got a list", routing, model=[jnp.ones(3)])
    says(ValueError, r"have the batch axes.*Got \(3,\).$", routing, input_ids=IDS[:3])
    says(TypeError, "`input_ids` must have an integer dtype", routing, input_ids=IDS * 1.0)
    says(ValueError, "one array per batch. Got fewer", [[routing]] * 2, input_ids=[IDS])
    says(ValueError, "one array per batch. Got more", [[routing]], input_ids=[IDS, IDS])
    says(TypeError, "not an iterator", [[routing]], input_ids=iter([IDS]))
    says(ValueError, "one name per layer. Got 2 for 1", routing, layer_names=["a", "b"])
    stacked = one_routing(np.zeros((2, 4, 2)), experts=8, dropped=[0, 0])
    says(ValueError, "Got 1 for 2 layers.$", stacked, layer_names=["a"])
    hint, both = ": without `model`, each call stacked .*is a layer", {"input_ids": [IDS, IDS]}
    says(ValueError, rf"\(4,\){hint}. Got \(2, 4\)", stacked, **both)
    says(ValueError, r"\(4,\). Got \(2, 4\)", stacked, model=model[1], **both)
    split = {"model": model[1]}
    says(ValueError, "Got 1 for 2 layers.$", stacked, layer_names=["a"], **split)
    one = one_routing(np.zeros((2, 4, 2)), experts=8)
    says(ValueError, r"\(2, 4\). Got \(4,\).$", one, input_ids=IDS, model=model[0])
    says(ValueError, "`num_top_tokens` must be at least 1", routing, num_top_tokens=0)
    not_text = "`decode` must return a string. Got 7 for id 7"
    says(TypeError, not_text, routing, input_ids=IDS, decode=int)
    with pytest.raises(TypeError, match=r"`routings\[0\]` must be concrete"):
        jax.jit(lambda routing: bx.report(routing).load)(routing)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_narrow_indices_count_as_wide_ones(unchecked, dtype):
    """100 experts: 101 * 101 fits neither 8 bits nor, squared sums apart, a signed byte."""
    indices = np.array([[99, 0], [99, 50], [7, 99]])
    wide = one_routing(indices, experts=100)
    narrow = eqx.tree_at(lambda r: r.indices, wide, indices.astype(dtype))
    for report in (bx.report(wide), bx.report(narrow)):
        assert report.load[0, [0, 7, 50, 99]].tolist() == [1, 1, 1, 3] and report.load.sum() == 6
        together = report.coactivation[0]
        assert together.sum() == 3 + 3 + 2 * 3 and together[99, 99] == 3
        assert together[99, [0, 7, 50]].tolist() == together[[0, 7, 50], 99].tolist() == [1] * 3
    experts = 300
    table = coactivations(np.array([[299, 298]]), experts)
    assert table[298:, 298:].tolist() == [[1, 1], [1, 1]] and table.sum() == 4


def test_ids_may_be_unsigned_or_bytes(by_hand):
    routing = one_routing(INDICES, WEIGHTS, SCORES, MASK)
    for ids in (IDS.astype(np.uint8), IDS.astype(np.uint64), bytes(IDS.tolist())):
        assert bx.report(routing, input_ids=ids).top_tokens == by_hand.top_tokens
        assert bx.report([[routing]], input_ids=[ids]).top_tokens == by_hand.top_tokens
    with pytest.raises(
        ValueError, match=r"`input_ids` must be below 2\*\*63. Got 9223372036854775808"
    ):
        bx.report(routing, input_ids=np.array([0, 0, 0, 2**63], np.uint64))


@pytest.mark.parametrize(
    "decode", [["a"].__getitem__, {0: "a"}.__getitem__, lambda i: bytes([i]).decode() if i else "a"]
)
def test_an_id_without_a_text_loses_no_report(decode):
    ids = np.array([0, 0, 300, 0])
    (layer,) = bx.report(one_routing(INDICES), input_ids=ids, decode=decode).top_tokens
    assert layer[0] == ((0, "a", 2), (300, "<id 300>", 2))


def test_a_batch_without_a_token_has_no_violation():
    used = one_routing(INDICES, mask=MASK)
    padding = one_routing(INDICES, mask=[False] * 4)
    report = bx.report([[used], [padding], [used]])
    wanted = 4 / 1.5 - 1
    np.testing.assert_array_equal(report.batch_max_violation, [[wanted], [np.nan], [wanted]])
    assert f"{wanted:.2f} {wanted:.2f} 0" in " ".join(str(report).split()).replace("0.790 ", "")
    assert bx.report(padding).to_dict()["batch_max_violation"] == [[None]]
    assert "nan" in str(bx.report(padding))


def test_entropy_without_a_minus():
    for report in (
        bx.report(one_routing([[1, 1]], scores=[[0, 1, 0, 0]])),
        bx.report(one_routing(INDICES, mask=[False] * 4)),
    ):
        assert "0.000" in str(report) and "-0.0" not in str(report)


def test_one_of_each_is_singular():
    report = bx.report(one_routing([[0]], experts=1))
    assert str(report).startswith("1 layer of 1 expert, 1 token in 1 batch\n")
    assert str(bx.report(one_routing(INDICES))).startswith("1 layer of 4 experts, 4 tokens in")


def test_half_of_a_partition_is_named(model):
    half = eqx.partition(model[0], bx.trainable(model[0]))[1]
    with pytest.raises(ValueError, match="Got a HashRouter whose `gate.weight` is None"):
        bx.report(one_routing(INDICES, experts=8), model=half)

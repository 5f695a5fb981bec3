"""Quantile balancing against an exact quantile in numpy, and by the balance that it reaches."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_balance import make_routing

import braidax as bx


def random_routing(seed, tokens, num_experts, k, *, bias=None, uneven=(), **options):
    """Scores of `sqrt_softplus`, which have no upper end, as the router would select by them."""
    logits = np.random.default_rng(seed).normal(size=(tokens, num_experts))
    logits[:, : len(uneven)] += uneven
    scores = np.asarray(bx.sqrt_softplus(jnp.asarray(logits, jnp.float32)))
    biased = scores if bias is None else scores + np.asarray(bias)
    indices = np.argsort(-biased, axis=-1, kind="stable")[:, :k]
    return make_routing(scores, k, logits=logits, indices=indices, **options)


def random_bias(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, shape), jnp.float32)


def of_scores(routing):
    return np.asarray(routing.scores, np.float64)


def stacked(*routings):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *routings)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"), [(40, 8, 2), (41, 8, 3), (7, 5, 1), (1, 8, 2), (3, 4, 3)]
)
def test_the_exact_quantile(tokens, num_experts, k):
    bias = random_bias(1, num_experts)
    routing = random_routing(0, tokens, num_experts, k, bias=bias)
    new = bx.quantile_bias(bias, routing)
    assert new.dtype == jnp.float32
    expected = oracle.quantile_bias(of_scores(routing), np.asarray(bias, np.float64), k)
    np.testing.assert_allclose(new, expected, atol=1e-6)


def test_masked_and_undefined_tokens_are_left_out():
    bias, mask = random_bias(1, 8), np.arange(40) % 3 != 1
    routing = random_routing(0, 40, 8, 2, mask=mask)
    scores = np.where(mask[:, None], routing.scores, np.nan)
    scores[6, 3] = np.nan  # a valid token without an answer
    mask[6] = False
    poisoned = eqx.tree_at(lambda r: r.scores, routing, jnp.asarray(scores))
    expected = oracle.quantile_bias(scores[mask].astype(np.float64), np.asarray(bias), 2)
    np.testing.assert_allclose(bx.quantile_bias(bias, poisoned), expected, atol=1e-6)
    counts = bx.bias_histogram(bias, poisoned).counts
    np.testing.assert_array_equal(counts.sum(axis=-1), np.full(8, mask.sum()))


def test_layers_are_balanced_one_by_one_and_micro_batches_together():
    bias = random_bias(1, 3, 8)
    layers = [random_routing(seed, 40, 8, 2) for seed in range(3)]
    expected = [
        oracle.quantile_bias(of_scores(layer), np.asarray(b, np.float64), 2)
        for layer, b in zip(layers, bias, strict=True)
    ]
    np.testing.assert_allclose(bx.quantile_bias(bias, stacked(*layers)), expected, atol=1e-6)
    histogram = bx.bias_histogram(bias, stacked(*layers))
    one_by_one = [bx.bias_histogram(*pair).counts for pair in zip(bias, layers, strict=True)]
    np.testing.assert_array_equal(histogram.counts, np.stack(one_by_one))

    together = np.concatenate([of_scores(layer) for layer in layers])
    expected = oracle.quantile_bias(together, np.asarray(bias[0], np.float64), 2)
    np.testing.assert_allclose(bx.quantile_bias(bias[0], stacked(*layers)), expected, atol=1e-6)


def test_what_cannot_be_moved_stays():
    bias = random_bias(1, 8)
    none = random_routing(0, 40, 8, 2, mask=np.zeros(40, bool))
    everyone = random_routing(0, 40, 8, 8)
    empty = random_routing(0, 0, 8, 2)
    undefined = eqx.tree_at(lambda r: r.scores, none, jnp.full((40, 8), jnp.nan))
    for routing in (none, everyone, empty, undefined):
        np.testing.assert_array_equal(bx.quantile_bias(bias, routing), bias)
        histogram = bx.bias_histogram(bias, routing)
        np.testing.assert_array_equal(bx.quantile_bias(bias, histogram), bias)


def test_an_expert_that_no_token_can_choose_keeps_its_bias():
    """A logit of -inf loses at any bias."""
    routing = random_routing(0, 40, 8, 2)
    logits = routing.logits.at[:, 3].set(-jnp.inf)
    scores = routing.scores.at[:, 3].set(0)
    routing = eqx.tree_at(lambda r: (r.scores, r.logits), routing, (scores, logits))
    for given in (routing, bx.bias_histogram(jnp.zeros(8), routing)):
        new = np.asarray(bx.quantile_bias(jnp.zeros(8), given))
        assert np.abs(new).max() < 2  # 0 but for the mean


def load_after(bias, routing):
    """MaxVio in numpy of the selection by a new bias."""
    biased = of_scores(routing) + np.asarray(bias, np.float64)
    chosen = np.argsort(-biased, axis=-1, kind="stable")[:, : routing.indices.shape[-1]]
    load = np.bincount(chosen.reshape(-1), minlength=biased.shape[-1])
    return load.max() / load.mean() - 1


UNEVEN = np.random.default_rng(9).normal(0, 0.5, 64)


@pytest.mark.parametrize(
    ("num_experts", "k", "uneven"),
    [(8, 2, [4]), (64, 2, [4]), (64, 8, [4]), (8, 2, UNEVEN[:8]), (64, 8, UNEVEN)],
    ids=lambda value: f"{len(value)} uneven" if np.ndim(value) else str(value),
)
def test_a_frozen_batch_is_balanced_in_three_applications(num_experts, k, uneven):
    """Of 4096 tokens. One expert that dominates, or every expert preferred or disliked."""
    routing = random_routing(3, 4096, num_experts, k, uneven=uneven)
    exact = binned = jnp.zeros(num_experts)
    for _ in range(3):
        exact = bx.quantile_bias(exact, routing)
        binned = bx.quantile_bias(binned, bx.bias_histogram(binned, routing))
    assert load_after(jnp.zeros(num_experts), routing) > 0.8
    assert load_after(exact, routing) < 0.1
    assert load_after(binned, routing) < 0.1


def test_a_balanced_bias_stays():
    bias = jnp.asarray([0.25, -0.25, 0.5, -0.5])
    scores = np.stack([np.roll([1.0, 0.75, 0.5, 0.0], shift) for shift in range(4)])
    scores = scores - np.asarray(bias)
    routing = make_routing(scores, 1)
    np.testing.assert_array_equal(bx.quantile_bias(bias, routing), bias)
    np.testing.assert_array_equal(bx.quantile_bias(bias, bx.bias_histogram(bias, routing)), bias)


def test_histograms_add_up_and_are_within_a_bin():
    bias = random_bias(1, 8)
    whole = random_routing(0, 4096, 8, 2)
    cut = lambda part: eqx.tree_at(  # noqa: E731
        lambda r: (r.indices, r.weights, r.scores, r.logits),
        whole,
        (whole.indices[part], whole.weights[part], whole.scores[part], whole.logits[part]),
    )
    histogram = bx.bias_histogram(bias, whole)
    parts = [bx.bias_histogram(bias, cut(part)) for part in (slice(1000), slice(1000, None))]
    np.testing.assert_array_equal((parts[0] + parts[1]).counts, histogram.counts)
    kept = stacked(*parts)  # what a scan over micro-batches gives
    exact = oracle.quantiles(of_scores(whole), np.asarray(bias, np.float64), 2)
    half_bin = np.abs(exact - bias) / 32
    for given in (histogram, parts[0] + parts[1], kept):
        error = np.abs(bx.quantile_bias(bias, given) - (exact - exact.mean()))
        assert error.max() > 0
        # The mean that is subtracted has an error too.
        np.testing.assert_array_less(error, half_bin + half_bin.mean() + 1e-6)
    # Rises by hand: cutoff 1, so that 2**e + n / 16 of 2**e is the n-th bin of its power of two.
    rises = np.asarray([2.0**-20, 0.5, 0.53, 0.53126, 1.0, 1023.0, 5000.0], np.float32)
    scores = np.concatenate([[2.0, 1.0], 1 - rises])[None].astype(np.float32)
    counts = np.asarray(bx.bias_histogram(jnp.zeros(9), make_routing(scores, 1)).counts)
    bins = counts.argmax(axis=-1) - counts.shape[-1] // 2
    taken = np.float32(1) - (np.float32(1) - rises)
    octave = np.floor(np.log2(taken[1:5]))
    expected = 16 * (octave + 20) + np.floor(16 * (taken[1:5] / 2**octave - 1)) + 1
    np.testing.assert_array_equal(bins[3:7], expected)
    assert bins[1] == 0 and bins[0] < 0 and bins[7] == bins[8] == 480


def test_a_mesh_gathers_no_token():
    bias, routing = random_bias(1, 8), random_routing(0, 256, 8, 2, mask=np.arange(256) % 5 > 0)
    expected = bx.quantile_bias(bias, routing), bx.bias_histogram(bias, routing)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
        place = lambda leaf: jax.device_put(leaf, rows if leaf.ndim else whole)  # noqa: B023, E731
        arrays = jax.device_put(bias, whole), jax.tree.map(place, routing)
        for function, value in zip((bx.quantile_bias, bx.bias_histogram), expected, strict=True):
            for actual in (function(*arrays), jax.jit(function)(*arrays)):
                for one, other in zip(*map(jax.tree.leaves, (actual, value)), strict=True):
                    np.testing.assert_allclose(one, other, atol=1e-6)
            text = jax.jit(function).lower(*arrays).compile().as_text()
            assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


def test_devices_add_their_histograms():
    bias, routing = random_bias(1, 8), random_routing(0, 256, 8, 2)
    routing = eqx.tree_at(lambda r: r.dropped, routing, jnp.zeros(4, jnp.int32))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec())
    def new_bias(bias, routing):
        routing = eqx.tree_at(lambda r: r.dropped, routing, routing.dropped[0])
        return bx.quantile_bias(bias, jax.lax.psum(bx.bias_histogram(bias, routing), "data"))

    whole = eqx.tree_at(lambda r: r.dropped, routing, jnp.int32(0))
    expected = bx.quantile_bias(bias, bx.bias_histogram(bias, whole))
    np.testing.assert_array_equal(new_bias(bias, routing), expected)


def test_a_model_is_rebalanced_by_any_rule():
    table = bx.hash_tables.md5(20, 8, 2)
    keys = jax.random.split(jax.random.key(0))
    hashed = bx.HashRouter(16, 8, 2, table=table, key=keys[0])
    model = [hashed, bx.TopKRouter(16, 8, 2, key=keys[1])]
    tokens = jax.random.normal(jax.random.key(1), (64, 16))
    routing = model[1](tokens)
    routings = [hashed(tokens, jnp.arange(64) % 20), routing]
    new = bx.rebalance(model, routings, rule=bx.quantile_bias)
    expected = oracle.quantile_bias(of_scores(routing), np.zeros(8), 2)
    np.testing.assert_allclose(new[1].score_correction_bias, expected, atol=1e-6)
    assert eqx.tree_equal(new[0], hashed)
    histogram = bx.bias_histogram(model[1].score_correction_bias, routing)
    binned = bx.rebalance(model, [None, histogram], rule=bx.quantile_bias)
    np.testing.assert_allclose(binned[1].score_correction_bias, expected, atol=0.1)
    mine = bx.rebalance(model, [None, "item"], rule=lambda bias, item: bias + len(item))
    np.testing.assert_array_equal(mine[1].score_correction_bias, np.full(8, 4.0))
    for given, error, message in (
        (jnp.zeros(3), ValueError, r"`rule\(bias, item\)` must have .* \(8,\). Got \(3,\)"),
        (jnp.zeros(8, jnp.bfloat16), TypeError, r"`rule\(bias, item\)` must be float32 or wider"),
    ):
        with pytest.raises(error, match=message):
            bx.rebalance(model, [None, "item"], rule=lambda bias, item: given)  # noqa: B023
    for options in ({}, {"rate": 0.1, "rule": bx.quantile_bias}):
        with pytest.raises(ValueError, match="Either `rate` or `rule` must be given"):
            bx.rebalance(model, routings, **options)


def test_mistakes_are_named(unchecked):
    routing = random_routing(0, 6, 4, 2)
    layers = stacked(routing, routing)
    for bias, given, error, message in (
        (jnp.zeros(5), routing, ValueError, "`routing` must be of 5 experts. Got 4"),
        (jnp.zeros((3, 4)), layers, ValueError, r"over the layers \(3,\) .* Got \(2,\)"),
        (jnp.zeros(4, jnp.bfloat16), routing, TypeError, "`bias` must be float32 or wider"),
        (jnp.zeros(4), jnp.zeros(4, jnp.int32), TypeError, "`routing` must be a Routing.*ArrayI"),
    ):
        for function in (bx.quantile_bias, bx.bias_histogram):
            with pytest.raises(error, match=message):
                inspect.unwrap(function)(bias, given)
    other = bx.bias_histogram(jnp.zeros((2, 4)), layers)
    with pytest.raises(ValueError, match=r"over nothing else. Got \(2,\)"):
        bx.quantile_bias(jnp.zeros((3, 4)), other)
    with pytest.raises(ValueError, match="same number of experts per token"):
        other + bx.bias_histogram(jnp.zeros((2, 4)), stacked(*[random_routing(0, 6, 4, 1)] * 2))

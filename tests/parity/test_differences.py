"""Where transformers 5.23 is wrong or silent: its value beside ours. Every number is measured.

A test that fails because "theirs" changed is good news: a table of `docs/parity.md` loses a row.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import torch
from transformers.activations import ACT2FN
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

import braidax as bx


def make_config(**options):
    sizes = {"hidden": 4, "intermediate": 8, "experts": 4, "per_token": 2, "vocab": 8}
    return ref.make_reference_config(**{**sizes, **options})


def blocks(*, weight=None, table=None, **options):
    """Their block and ours with the same arrays; `weight` replaces the gate's."""
    config = make_config(hash_layers=int(table is not None), **options)
    theirs = ref.make_reference_block(config, table=table)
    if weight is not None:
        theirs.gate.weight.data.copy_(torch.tensor(weight))
    return theirs, bx.from_state_dict(ref.moe_config(config), 0, ref.tensors(theirs))


def logits_as_weight(*logits):
    """A gate that gives these logits to the hidden state (1, 0, 0, 0)."""
    return np.outer(np.array(logits, np.float32), np.eye(4, dtype=np.float32)[0])


ONE = np.eye(4, dtype=np.float32)[:1]


def test_scores_of_very_negative_logits():
    theirs, x = ACT2FN["sqrtsoftplus"], torch.tensor([-120.0, -104.0, -103.5], requires_grad=True)
    scores = theirs(x)
    scores.sum().backward()
    exact = np.exp(0.5 * x.detach().double().numpy())
    # Wrong by 12 % where e^x is a subnormal number, and 0 with a NaN gradient below.
    np.testing.assert_array_equal(scores.detach()[:2], [0, 0])
    assert x.grad[:2].isnan().all()
    assert scores[2].item() / exact[2] == pytest.approx(1.117, abs=1e-3)
    ours, gradient = jax.vmap(jax.value_and_grad(bx.sqrt_softplus))(jnp.asarray(x.detach().numpy()))
    np.testing.assert_allclose(ours, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, exact / 2, rtol=1e-6)


def router_gradients(theirs, ours, cotangent):
    """Gradients of `weights @ cotangent` with respect to gate and hidden state, both sides."""
    hidden = torch.tensor(ONE, requires_grad=True)
    _, weights, _ = theirs.gate(hidden)
    (weights * torch.tensor(cotangent)).sum().backward()

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(inputs):
        router, hidden = inputs
        return (router(hidden).weights * jnp.asarray(cotangent)).sum()

    router, ours_hidden = gradient((ours.routed.router, jnp.asarray(ONE)))
    theirs = theirs.gate.weight.grad.numpy(), hidden.grad.numpy()
    return theirs, (np.asarray(router.gate.weight), np.asarray(ours_hidden))


def test_gradient_of_an_expert_that_was_not_selected():
    theirs, ours = router_gradients(
        *blocks(weight=logits_as_weight(1.0, 0.5, -3.0, -120.0)), np.array([[1.0, 2.0]], np.float32)
    )
    assert np.isnan(theirs[0][3]).all() and np.isnan(theirs[1]).all()
    np.testing.assert_array_equal(ours[0][2:], np.zeros((2, 4)))
    # By hand: d w_i / d s_j = (delta_ij - w_i) / sum, with weights that sum to the scaling 1.5.
    logits = np.array([1.0, 0.5])
    scores = np.sqrt(np.logaddexp(0, logits))
    slopes = 0.5 / (scores * (1 + np.exp(-logits)))
    cotangent = np.array([1.0, 2.0])
    d_scores = 1.5 * (cotangent - cotangent @ scores / scores.sum()) / scores.sum()
    d_logits = d_scores * slopes
    np.testing.assert_allclose(ours[0][:2, 0], d_logits, rtol=1e-5)
    np.testing.assert_allclose(ours[1], [[d_logits @ logits, 0, 0, 0]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(theirs[0][:2], ours[0][:2], rtol=1e-5, atol=1e-7)


def test_gradient_through_the_normalizer():
    """All selected scores tiny: dividing by their sum has a derivative that overflows."""
    theirs, ours = router_gradients(
        *blocks(weight=logits_as_weight(-90.0, -91.0), experts=2),
        np.array([[1.0, 2.0]], np.float32),
    )
    assert np.isinf(theirs[0][1, 0])
    scores = np.exp([-45.0, -45.5])
    total = scores.sum() + 1e-20
    d_scores = 1.5 * (np.array([1.0, 2.0]) / total - (scores @ [1.0, 2.0]) / total**2)
    np.testing.assert_allclose(ours[0][:, 0], d_scores * scores / 2, rtol=1e-5)


def test_softmax_scores():
    config = make_config(score="softmax")
    with pytest.raises(KeyError):
        modeling.DeepseekV4TopKRouter(config)
    router = bx.TopKRouter(4, 4, 2, score_function=jax.nn.softmax, key=jax.random.key(0))
    assert float(router(jnp.asarray(ONE)).scores.sum()) == pytest.approx(1)


def test_norm_topk_prob_false():
    logits = (1.0, 0.5, -3.0, -4.0)
    theirs, ours = blocks(weight=logits_as_weight(*logits), norm_topk_prob=False, scaling=1.0)
    scores = np.sqrt(np.logaddexp(0, logits[:2]))
    assert scores.sum() == pytest.approx(2.1329, abs=1e-4)
    assert theirs.gate(torch.tensor(ONE))[1].sum().item() == pytest.approx(1)
    np.testing.assert_allclose(ours.routed.router(jnp.asarray(ONE)).weights[0], scores, rtol=1e-6)


def test_a_hash_layer_that_was_not_loaded():
    config = make_config(hash_layers=1)
    theirs = ref.make_reference_block(config)
    _, weights, indices = theirs.gate(torch.randn(8, 4), torch.arange(8))
    # Every token to expert 0, twice.
    assert (indices == 0).all()
    np.testing.assert_allclose(weights.detach(), 0.75, rtol=1e-6)
    ours = bx.RoutedMoE.from_config(ref.moe_config(config), 0, key=jax.random.key(0))
    table = np.asarray(ours.router.table)
    assert (table[:, 0] != table[:, 1]).all()
    assert set(table.flat) == {0, 1, 2, 3}


def hash_blocks():
    return blocks(table=bx.hash_tables.md5(8, 4, 2, salt=0))


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
def test_ids_outside_of_the_vocabulary(bad):
    theirs, ours = hash_blocks()
    hidden = np.random.default_rng(0).standard_normal((1, 3, 4), np.float32)
    ids, wrong = np.array([[3, 5, 6]]), np.array([[3, bad, 6]])
    if bad == -1:
        # Silently the last row of the table.
        np.testing.assert_array_equal(
            theirs(torch.tensor(hidden), torch.tensor(wrong)).detach(),
            theirs(torch.tensor(hidden), torch.tensor([[3, 7, 6]])).detach(),
        )
    else:
        with pytest.raises(IndexError):
            theirs(torch.tensor(hidden), torch.tensor(wrong))
    call = eqx.filter_jit(lambda ids: ours(jnp.asarray(hidden), jnp.asarray(ids, jnp.int32))[0])
    output = call(wrong)
    assert jnp.isnan(output[0, 1]).all()
    np.testing.assert_array_equal(output[:, ::2], call(ids)[:, ::2])


def test_one_id_for_three_tokens(unchecked):
    theirs, ours = hash_blocks()
    hidden = np.random.default_rng(0).standard_normal((1, 3, 4), np.float32)
    output = theirs(torch.tensor(hidden), torch.tensor([[3]])).detach()
    # Silently no routed expert for the tokens without an id.
    only_shared = theirs.shared_experts(torch.tensor(hidden)).detach()
    np.testing.assert_array_equal(output[0, 1:], only_shared[0, 1:])
    with pytest.raises(ValueError, match="`input_ids` must have the shape"):
        ours(jnp.asarray(hidden), jnp.asarray([[3]]))


def test_a_selection_bias_that_is_nan():
    theirs, _ = blocks(weight=logits_as_weight(2.0, -3.0, 1.0, 0.0))
    theirs.gate.e_score_correction_bias[1] = torch.nan
    _, weights, indices = theirs.gate(torch.tensor(ONE))
    # The worst expert is selected for every token, with a finite weight.
    assert 1 in indices and weights.isfinite().all()
    config = ref.moe_config(make_config())
    with pytest.raises(ValueError, match="e_score_correction_bias` must be finite"):
        bx.from_state_dict(config, 0, ref.tensors(theirs))


def test_the_balance_loss():
    """Two sequences that each use half of the experts: balanced only when taken together."""
    logits = np.array([[[4.0, 4, -4, -4]] * 3, [[-4.0, -4, 4, 4]] * 3], np.float32)
    theirs = modeling.load_balancing_loss_func((torch.tensor(logits.reshape(6, 4)),), 4, top_k=2)
    # Mixtral's loss of a whole batch, with softmax in place of this router's scores: its value
    # at perfect balance is experts_per_token, here 2.
    assert float(theirs) == pytest.approx(2, abs=1e-5)
    router = bx.TopKRouter(4, 4, 2, key=jax.random.key(0))
    router = eqx.tree_at(lambda router: router.gate.weight, router, jnp.eye(4))
    routing = router(jnp.asarray(logits))
    scores = np.sqrt(np.logaddexp(0, [4.0, -4.0]))
    # arXiv:2412.19437, eq. 17-20: f is 2 for the experts in use, 1 at perfect balance.
    wanted = 2 * scores[0] / scores.sum()
    assert float(bx.sequence_balance_loss(routing)) == pytest.approx(wanted, rel=1e-6)
    assert float(bx.batch_balance_loss(routing)) == pytest.approx(1, rel=1e-6)

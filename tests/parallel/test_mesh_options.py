"""The parts that only some families have, over a mesh: as on one device."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import assert_close
from meshes import EXCHANGES, HIDDEN, INTERMEDIATE, make_mesh, make_tokens, slow_but_one, spread

import braidax as bx

LATENT, IDENTITY = 4, 3


def make_block():
    """Eight experts that compute and three that do not, narrower than the model."""
    keys = jax.random.split(jax.random.key(0), 5)
    routed = bx.RoutedMoE(
        bx.TopKRouter(HIDDEN, 8 + IDENTITY, 3, key=keys[0]),
        bx.Experts(8, LATENT, INTERMEDIATE, key=keys[1]),
        latent=bx.LatentProjection(HIDDEN, LATENT, key=keys[2]),
        num_identity_experts=IDENTITY,
    )
    shared_gate = jax.random.normal(keys[4], (1, HIDDEN))
    shared = bx.FeedForward(HIDDEN, INTERMEDIATE, key=keys[3])
    return bx.RoutedAndSharedMoE(routed, shared, shared_gate=shared_gate)


@eqx.filter_jit
def output_and_gradients(block, hidden_states):
    def loss(block):
        output, routing = block(hidden_states)
        return jnp.square(output).sum(), (output, routing)

    (_, (output, routing)), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(block)
    return output, bx.expert_load(routing), jax.tree.leaves(gradients)


@pytest.mark.parametrize("exchange", slow_but_one(["all_to_all", "gather"]))
def test_as_on_one_device(exchange):
    block, (hidden_states, *_) = make_block(), make_tokens(16)
    wanted = output_and_gradients(block, hidden_states)
    parallel = bx.ExpertParallel(make_mesh(), exchange=EXCHANGES[exchange])
    routed = dataclasses.replace(block.routed, dispatch=parallel)
    block = parallel.shard(dataclasses.replace(block, routed=routed))
    assert len(block.routed.experts.down.sharding.device_set) == 4
    got = output_and_gradients(block, *spread(parallel, hidden_states))
    assert got[1].tolist() == wanted[1].tolist()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(ours, theirs)

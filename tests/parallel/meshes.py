"""A small block, meshes of four devices, and one training step that every test shares."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import slow_but_one as slow_but_one
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import braidax as bx

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, VOCAB = 8, 6, 8, 3, 20
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
EXCHANGES = {
    "gather": bx.exchange.Gather(),
    "all_to_all": bx.exchange.AllToAll(),
    "ragged": bx.exchange.Ragged(),
}
# Its epsilon is above the rounding noise of a gradient, which Adam would otherwise divide by
# itself.
OPTIMIZER = optax.adamw(1e-2, eps=1e-3, mask=bx.decay_mask)


class Result(NamedTuple):
    """Everything that must not depend on the number of devices."""

    loss: jax.Array
    output: jax.Array
    routing: bx.Routing
    load: jax.Array
    gradients: bx.RoutedAndSharedMoE


def make_mesh(kind="auto", shape=(2, 2), names=("data", "expert")):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))


def make_block(router="top_k", num_experts=EXPERTS, *, dtype=jnp.float32, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), 4)
    if router == "hash":
        table = bx.hash_tables.md5(VOCAB, num_experts, SLOTS)
        gate = bx.HashRouter(HIDDEN, num_experts, SLOTS, table=table, dtype=dtype, key=keys[0])
    elif router == "expert_choice":
        gate = bx.ExpertChoiceRouter(HIDDEN, num_experts, SLOTS, dtype=dtype, key=keys[0])
    else:
        gate = bx.TopKRouter(HIDDEN, num_experts, SLOTS, dtype=dtype, key=keys[0])
        bias = 0.2 * jax.random.normal(keys[3], (num_experts,))
        # Nobody is routed to the last expert: it must have a gradient of exactly 0.
        gate = eqx.tree_at(lambda g: g.score_correction_bias, gate, bias.at[-1].set(-99.0))
    sizes, clamped = (HIDDEN, INTERMEDIATE), {"activation": bx.activations.swiglu(0.4)}
    experts = bx.Experts(num_experts, *sizes, **clamped, dtype=dtype, key=keys[1])
    shared = bx.FeedForward(*sizes, **clamped, dtype=dtype, key=keys[2])
    return bx.RoutedAndSharedMoE(bx.RoutedMoE(gate, experts, **options), shared)


def make_tokens(*batch, dtype=jnp.float32):
    """Hidden states, ids, and a target of the same shape."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden_states = 1.5 * jax.random.normal(keys[0], (*batch, HIDDEN), dtype)
    input_ids = jax.random.randint(keys[1], batch, 0, VOCAB, dtype=jnp.int32)
    return hidden_states, input_ids, jax.random.normal(keys[2], (*batch, HIDDEN), dtype)


def spread(parallel, *arrays):
    """Token arrays over the token axes where they divide, else on every device."""
    for array in arrays:
        divides = array.shape and array.shape[0] % parallel.layout.token_shards == 0
        spec = PartitionSpec(parallel.tokens) if divides else PartitionSpec()
        yield jax.device_put(array, NamedSharding(parallel.mesh, spec))


def loss_of(model, hidden_states, input_ids, target, **options):
    output, routing = model(hidden_states, input_ids, **options)
    output = hidden_states + output
    loss = jnp.mean(jnp.square(output - target).astype(jnp.float32))
    loss += 0.01 * bx.router_z_loss(routing) + 0.01 * bx.batch_balance_loss(routing)
    return loss, (output, routing)


@eqx.filter_jit
def step(model, optimizer_state, hidden_states, input_ids, target):
    """One optimizer step and bias update, with the `Result` before it. The loss is differentiated
    with respect to the hidden states as well."""
    spec = bx.trainable(model)
    trained, fixed = eqx.partition(model, spec)

    def loss(trained, hidden_states):
        return loss_of(eqx.combine(trained, fixed), hidden_states, input_ids, target)

    (value, (output, routing)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        trained, hidden_states
    )
    result = Result(value, output, routing, bx.expert_load(routing), gradients)
    updates, optimizer_state = OPTIMIZER.update(gradients[0], optimizer_state, trained)
    model = eqx.combine(eqx.apply_updates(trained, updates), fixed)
    return bx.rebalance(model, routing, 1e-3), optimizer_state, result


def init_optimizer(model, parallel=None):
    """The optimizer state, with the model's placement."""
    state = OPTIMIZER.init(eqx.filter(model, bx.trainable(model)))
    return state if parallel is None else parallel.shard(state)


def train(model, tokens, parallel=None, steps=3):
    """The first step's `Result`, and the losses and parameters after all steps."""
    state, results = init_optimizer(model, parallel), []
    for _ in range(steps):
        model, state, result = step(model, state, *tokens)
        results.append(result)
    losses = [float(result.loss) for result in results]
    return results[0], np.array(losses), eqx.filter(model, eqx.is_array)


def assert_trees_close(actual, desired, tolerance=1e-5):
    """Same leaves: integers exactly, the rest within `tolerance` of the largest entry or of 1."""
    actual, desired = jax.tree.leaves(actual), jax.tree.leaves(desired)
    assert len(actual) == len(desired)
    for one, other in zip(actual, desired, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape and one.dtype == other.dtype
        if np.issubdtype(one.dtype, np.floating) or one.dtype == jnp.bfloat16:
            one, other = one.astype(np.float64), other.astype(np.float64)
            scale = max(1.0, float(np.abs(other).max(initial=0.0)))
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(one, other)

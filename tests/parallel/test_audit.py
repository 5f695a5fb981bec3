"""What the compiler really inserts and holds: read from the compiled programs."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from collectives import collectives, sent
from meshes import make_mesh, slow_but_one

import braidax as bx
from braidax._parallel.exchange import Sizes
from braidax._parallel.plan import bytes_forward, working_bytes
from braidax._parallel.shards import CHUNK

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, TOKENS = 128, 20, 16, 2, 64
EXCHANGES = (bx.exchange.Gather(), bx.exchange.AllToAll(1.5))


def flat(text):
    """`(name, shape)` of every array that a collective moves."""
    return [(name, moved) for name, shapes, _ in collectives(text) for _, moved in shapes]


@functools.cache
def compile_block(exchange, shape, backward, kind="auto"):
    mesh = make_mesh(kind, shape)
    parallel = bx.ExpertParallel(mesh, exchange=exchange)
    keys = jax.random.split(jax.random.key(0))
    router = bx.TopKRouter(HIDDEN, EXPERTS, SLOTS, key=keys[0])
    experts = bx.Experts(EXPERTS, HIDDEN, INTERMEDIATE, key=keys[1])
    block = parallel.shard(bx.RoutedMoE(router, experts))
    spread = jax.NamedSharding(mesh, jax.P(parallel.tokens))
    hidden_states = jax.ShapeDtypeStruct((4, TOKENS, HIDDEN), "float32", sharding=spread)
    arrays, static = eqx.partition(block, eqx.is_inexact_array)

    def output(arrays, hidden_states):
        output, routing = eqx.combine(arrays, static)(hidden_states)
        losses = bx.batch_balance_loss(routing), bx.sequence_balance_loss(routing)
        return output, sum(losses), routing.scores, routing.dropped

    def gradients(arrays, hidden_states, cotangent):
        value, transpose = jax.vjp(lambda *a: output(*a)[:2], arrays, hidden_states)
        return value, transpose((cotangent, jnp.ones(())))

    if not backward:
        return jax.jit(output).lower(arrays, hidden_states).compile()
    return jax.jit(gradients).lower(arrays, hidden_states, hidden_states).compile()


def local_tokens(shape):
    return 4 * TOKENS // math.prod(shape)


def token_traffic(found):
    """Bytes per device of everything but the sums over devices: gradients and the drop count."""
    return sum(sent(*collective) for collective in found if collective[0] != "all-reduce")


@pytest.mark.parametrize(
    "kind, shape",
    [
        pytest.param("auto", (1, 4), marks=pytest.mark.slow),
        pytest.param("auto", (2, 2), marks=pytest.mark.slow),
        ("explicit", (2, 2)),
    ],
)
@pytest.mark.parametrize("exchange", slow_but_one(EXCHANGES), ids=repr)
def test_only_what_was_written(exchange, kind, shape):
    size, tokens = shape[1], local_tokens(shape)
    sizes = Sizes(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, tokens, 4)
    texts = [compile_block(exchange, shape, backward, kind).as_text() for backward in (False, True)]
    forward, both = (list(collectives(text)) for text in texts)
    weights = {
        (EXPERTS // size, 2, INTERMEDIATE, HIDDEN),
        (EXPERTS // size, INTERMEDIATE, HIDDEN),
    }
    # What is summed over devices: counts, shares and losses, small whatever the tokens; backward
    # also the gradients of the router and, over a data axis, of each device's own experts.
    sums = [[moved for name, moved in found if name == "all-reduce"] for found in map(flat, texts)]
    small = [[moved for moved in found if math.prod(moved) > 4 * EXPERTS] for found in sums]
    assert small[0] == []
    assert set(small[1]) == {(EXPERTS, HIDDEN), *(weights if shape[0] > 1 else ())}
    for name, moved in (*flat(texts[0]), *flat(texts[1])):
        # Expert weights never move, one expert's no more than all.
        assert name == "all-reduce" or moved[-2:] not in {weight[-2:] for weight in weights}
        # No scores are gathered, nor logits.
        assert name == "all-reduce" or moved[-1] != EXPERTS
    # No buffer holds a row for every assignment of every token that arrives.
    worst = size * tokens * SLOTS
    for rows, width in re.findall(r"f32\[(\d+),(\d+)\]", "".join(texts)):
        assert int(rows) < worst or int(width) < INTERMEDIATE
    per_token = token_traffic(forward) / tokens
    assert per_token == pytest.approx(bytes_forward(exchange, sizes, size))
    # The transpose moves no ids.
    expected = 2 * per_token - 4 * SLOTS * exchange.rows_sent(sizes, size)
    assert token_traffic(both) / tokens == pytest.approx(expected)
    # The closed formulas, float32 on both ways and without the slots' metadata.
    share = getattr(exchange, "capacity", 1) * min(1, SLOTS / size)
    rows = size - 1 if exchange == bx.exchange.Gather() else (size - 1) * share
    assert per_token == pytest.approx(2 * min(rows, size - 1) * HIDDEN * 4, rel=0.05)


@pytest.mark.parametrize("shape", [pytest.param((1, 4), marks=pytest.mark.slow), (2, 2)])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=repr)
def test_the_planner_knows_what_is_held(exchange, shape):
    """Temporary memory of the compiled forward pass. `Ragged` is emulated here, and holds more than
    on the GPUs of tests/accelerators."""
    sizes = Sizes(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, local_tokens(shape), 4)
    planned = working_bytes(exchange, sizes, shape[1], CHUNK)
    memory = compile_block(exchange, shape, False).memory_analysis()
    assert memory.temp_size_in_bytes == pytest.approx(planned, rel=0.1)
    arguments = 4 * EXPERTS // shape[1] * 3 * HIDDEN * INTERMEDIATE
    arguments += 4 * HIDDEN * (EXPERTS + sizes.tokens)  # the router and the tokens
    assert memory.argument_size_in_bytes == pytest.approx(arguments, rel=1e-3)

"""What the compiler really inserts: read from the compiled programs."""

import math
import re

import equinox as eqx
import jax
import pytest
from meshes import make_mesh

import braidax as bx
from braidax._parallel import traffic

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, TOKENS = 128, 20, 16, 2, 64
NAMES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM = {"f32": 4, "s32": 4, "pred": 1, "bf16": 2}


def collectives(text):
    """`(name, [(dtype, shape)], devices in a group)` of every collective of a program that moves
    anything."""
    pattern = re.compile(rf"= (.*?) ({'|'.join(NAMES)})(?:-start)?\((.*)$", re.MULTILINE)
    for results, name, rest in pattern.findall(text):
        shapes = [
            (dtype, tuple(int(n) for n in shape.split(",") if n))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results)
        ]
        explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
        iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
        group = len(explicit[1].split(",")) if explicit else int(iota[1])
        if group > 1:
            yield name, shapes, group


def sent(name, shapes, group):
    """Bytes that one device sends in a ring: the usual cost of each collective."""
    total = sum(ITEM[dtype] * math.prod(shape) for dtype, shape in shapes)
    factor = {"all-gather": 1 / group, "reduce-scatter": 1, "all-to-all": 1 / group}
    return total * (group - 1) * factor[name]


def compile_block(strategy, shape, backward, capacity=None):
    mesh = make_mesh("auto", shape)
    parallel = bx.ExpertParallel(mesh, strategy=strategy, capacity=capacity)
    keys = jax.random.split(jax.random.key(0))
    router = bx.TopKRouter(HIDDEN, EXPERTS, SLOTS, key=keys[0])
    experts = bx.SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE, key=keys[1])
    block = parallel.shard(bx.RoutedMoE(router, experts))
    spread = jax.NamedSharding(mesh, jax.P(parallel.tokens))
    hidden_states = jax.ShapeDtypeStruct((4, TOKENS, HIDDEN), "float32", sharding=spread)
    arrays, static = eqx.partition(block, eqx.is_inexact_array)

    def output(arrays, hidden_states):
        output, routing = eqx.combine(arrays, static)(hidden_states)
        return output, routing.scores, routing.dropped

    def gradients(arrays, hidden_states, cotangent):
        value, transpose = jax.vjp(lambda *a: output(*a)[0], arrays, hidden_states)
        return value, transpose(cotangent)

    if not backward:
        return jax.jit(output).lower(arrays, hidden_states).compile().as_text()
    return jax.jit(gradients).lower(arrays, hidden_states, hidden_states).compile().as_text()


def local_tokens(shape):
    return 4 * TOKENS // math.prod(shape)


def token_traffic(found):
    """Bytes per device of everything but the sums over devices: gradients and the drop count."""
    return sum(sent(*collective) for collective in found if collective[0] != "all-reduce")


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
@pytest.mark.parametrize("strategy, capacity", [("gather", None), ("all_to_all", 1.5)])
def test_only_what_was_written(strategy, capacity, shape):
    size, tokens = shape[1], local_tokens(shape)
    sizes = traffic.Sizes(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, tokens, 4)
    texts = [compile_block(strategy, shape, backward, capacity) for backward in (False, True)]
    forward, both = (list(collectives(text)) for text in texts)
    weights = {(2 * INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN)}
    for name, shapes, group in (*forward, *both):
        for _, moved in shapes:
            # Expert weights never move: only their gradients are summed, each device's own, where
            # there is a data axis.
            if moved[-2:] in weights:
                assert (name, moved[0], group) == ("all-reduce", EXPERTS // size, shape[0])
                assert shape[0] > 1
            # No scores are gathered.
            assert name == "all-reduce" or moved[-1] != EXPERTS
    assert not any(moved[-2:] in weights for _, shapes, _ in forward for _, moved in shapes)
    assert any(moved[-2:] in weights for _, shapes, _ in both for _, moved in shapes) == (
        shape[0] > 1
    )
    # No buffer holds a row for every assignment of every token that arrives.
    worst = size * tokens * SLOTS
    for rows, width in re.findall(r"f32\[(\d+),(\d+)\]", "".join(texts)):
        assert int(rows) < worst or int(width) < INTERMEDIATE
    per_token = token_traffic(forward) / tokens
    assert per_token == pytest.approx(traffic.bytes_forward(strategy, sizes, size, capacity))
    expected = per_token + traffic.bytes_backward(strategy, sizes, size, capacity)
    assert token_traffic(both) / tokens == pytest.approx(expected)
    # The closed formulas, float32 on both ways and without the slots' metadata.
    rows = size - 1 if strategy == "gather" else (size - 1) * capacity * min(1, SLOTS / size)
    assert per_token == pytest.approx(2 * min(rows, size - 1) * HIDDEN * 4, rel=0.05)

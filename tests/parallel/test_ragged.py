"""The ragged exchange: rows that the transport does not write are never used."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import (
    EXPERTS,
    HIDDEN,
    SLOTS,
    assert_trees_close,
    loss_of,
    make_block,
    make_mesh,
    make_tokens,
)

import braidax as bx
from braidax._parallel import ragged
from braidax._parallel.exchange import Sizes
from braidax._parallel.plan import bytes_forward

pytestmark = pytest.mark.slow

CLEAN = ragged.emulated


def poisoned(operand, output, starts, sizes, targets, received, *, axis_name):
    """The emulation, with NaN in every row that is not written, forward and backward: that is
    what the transport may leave there (MaxText issue 4898)."""
    if not jnp.issubdtype(operand.dtype, jnp.floating):
        return CLEAN(operand, output, starts, sizes, targets, received, axis_name=axis_name)

    def named(array, first, length):
        row = jnp.arange(array.shape[0])[:, None]
        inside = ((row >= first[None]) & (row < (first + length)[None])).any(axis=1)
        return jnp.where(inside[:, None], array, jnp.nan)

    @jax.custom_vjp
    def exchange(operand, output, offsets):
        starts, sizes, targets, received = offsets
        moved = CLEAN(operand, output, starts, sizes, targets, received, axis_name=axis_name)
        first = jnp.cumsum(received) - received
        return named(moved, first, received)

    def forward(operand, output, offsets):
        return exchange(operand, output, offsets), (operand, output, offsets)

    def backward(residuals, cotangent):
        operand, output, offsets = residuals
        _, transpose = jax.vjp(lambda x: CLEAN(x, output, *offsets, axis_name=axis_name), operand)
        return named(*transpose(cotangent), *offsets[:2]), jnp.zeros_like(output), None

    exchange.defvjp(forward, backward)
    return exchange(operand, output, (starts, sizes, targets, received))


def test_unwritten_rows_are_never_read(monkeypatch):
    calls = []
    monkeypatch.setattr(ragged, "emulated", lambda *a, **k: calls.append(1) or poisoned(*a, **k))
    # A size that no other test compiles. Some tokens go to one device alone: rows are to spare.
    hidden_states, input_ids, target = make_tokens(24)
    parallel = bx.ExpertParallel(make_mesh("auto", (1, 4)), exchange=bx.exchange.Ragged())
    call = eqx.filter_jit(eqx.filter_value_and_grad(loss_of, has_aux=True))
    actual = call(parallel.shard(make_block()), hidden_states, input_ids, target)
    assert len(calls) >= 4
    assert_trees_close(actual, call(make_block(), hidden_states, input_ids, target))


def test_accelerators_get_the_native_operation():
    parallel = bx.ExpertParallel(make_mesh(), exchange=bx.exchange.Ragged())
    block = parallel.shard(make_block()).routed
    hidden_states, _, _ = make_tokens(4, 5)
    arrays, static = eqx.partition(block, eqx.is_inexact_array)

    def loss(arrays, hidden_states):
        return jnp.sum(eqx.combine(arrays, static)(hidden_states)[0])

    traced = jax.jit(jax.grad(loss)).trace(arrays, hidden_states)
    count = {}
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        count[platform] = text.count("ragged_all_to_all")
    assert count["cpu"] == 0
    # Tokens, ids and weights out and sums back, and more in the transpose.
    assert count["cuda"] == count["tpu"] > 4


def test_the_planner_knows_the_native_buffers():
    size, tokens = 4, 6
    parallel = bx.ExpertParallel(make_mesh("auto", (1, size)), exchange=bx.exchange.Ragged())
    block = parallel.shard(make_block(dtype=jnp.bfloat16)).routed
    hidden_states, _, _ = make_tokens(size * tokens, dtype=jnp.bfloat16)
    traced = jax.jit(lambda hidden_states: block(hidden_states)[0]).trace(hidden_states)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        calls = re.findall(r"@ragged_all_to_all\(.*?: \((.*?)\) -> ", text)
        buffers = [
            [(int(rows), int(width), item) for rows, width, item in found]
            for found in (re.findall(r"tensor<(\d+)x(\d+)x(\w+)>", call)[:2] for call in calls)
        ]
        sizes = Sizes(HIDDEN, 6, EXPERTS, SLOTS, tokens, 2)
        sent, received = bx.exchange.Ragged().rows_held(sizes, size)
        assert (sent, received) == (tokens * SLOTS, tokens * size)
        there = {(HIDDEN, "bf16"), (SLOTS, "i32"), (SLOTS, "f32")}
        desired = {((sent, *row), (received, *row)) for row in there}
        desired.add(((received, HIDDEN, "f32"), (sent, HIDDEN, "f32")))
        assert {tuple(pair) for pair in buffers} == desired and len(buffers) == 4
        # Bytes of one row there and back, as the planner counts them.
        width = sum(row[1] * {"bf16": 2, "i32": 4, "f32": 4}[row[2]] for row, _ in buffers)
        rows = bx.exchange.Ragged().rows_sent(sizes, size)
        assert bytes_forward(bx.exchange.Ragged(), sizes, size) == pytest.approx(rows * width)


def test_the_planner_knows_the_rows_that_move(monkeypatch):
    """The send sizes of every exchange, and their mean for experts drawn evenly."""
    size, tokens, sent = 4, 256, []

    def counted(operand, output, starts, sizes, *rest, axis_name):
        jax.debug.callback(
            lambda me, sizes, width: sent.append((int(me), sizes.tolist(), width)),
            *(jax.lax.axis_index(axis_name), sizes),
            width=operand.shape[1],
        )
        return CLEAN(operand, output, starts, sizes, *rest, axis_name=axis_name)

    monkeypatch.setattr(ragged, "emulated", counted)
    parallel = bx.ExpertParallel(make_mesh("auto", (1, size)), exchange=bx.exchange.Ragged())
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.permutation(EXPERTS)[:SLOTS] for _ in range(size * tokens)])
    block = make_block().routed
    zeros = jnp.zeros((size * tokens, EXPERTS))
    routing = bx.Routing(
        jnp.asarray(drawn, jnp.int32),
        jnp.ones(drawn.shape),
        *(zeros, zeros, None, jnp.zeros((), jnp.int32)),
    )
    eqx.filter_jit(parallel.shard(block))(make_tokens(size * tokens)[0], routing=routing)
    jax.effects_barrier()
    # By hand: the distinct devices of each token, two experts on each.
    hit = np.zeros((size * tokens, size), int)
    np.put_along_axis(hit, drawn // 2, 1, axis=1)
    table = hit.reshape(size, tokens, size).sum(1)
    there = [entry for entry in sent if entry[1] == table[entry[0]].tolist()]
    back = [entry for entry in sent if entry[1] == table[:, entry[0]].tolist()]
    assert len(sent) == 4 * size and len(there) == 3 * size and len(back) == size
    moved = (table.sum() - np.trace(table)) / (size * tokens)
    sizes = Sizes(HIDDEN, 6, EXPERTS, SLOTS, tokens, 4)
    assert bx.exchange.Ragged().rows_sent(sizes, size) == pytest.approx(moved, rel=0.02)

"""The ragged exchange: rows that the transport does not write are never used."""

import equinox as eqx
import jax
import jax.numpy as jnp
from meshes import assert_trees_close, loss_of, make_block, make_mesh, make_tokens

import braidax as bx
from braidax._parallel import ragged

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
    parallel = bx.ExpertParallel(make_mesh("auto", (1, 4)), strategy="ragged")
    call = eqx.filter_jit(eqx.filter_value_and_grad(loss_of, has_aux=True))
    actual = call(parallel.shard(make_block()), hidden_states, input_ids, target)
    assert len(calls) >= 4
    assert_trees_close(actual, call(make_block(), hidden_states, input_ids, target))


def test_accelerators_get_the_native_operation():
    parallel = bx.ExpertParallel(make_mesh(), strategy="ragged")
    # Not "auto": its kernels are chosen by the platform that traces.
    block = parallel.shard(make_block(backend="ragged")).routed
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

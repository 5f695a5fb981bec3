"""Candidates of JAX: our experts, our router, and what bounds them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from interleaving import Call
from workloads import LIMIT, Arrays, Workload, touched_bytes

import braidax as bx


def compiled(
    function: Callable[..., Any],
    inputs: Any,
    *others: Any,
    cotangent: Any = None,
    flags: Mapping[str, Any] | None = None,
) -> Call:
    """A call of `function(*inputs, *others)`, compiled with `flags` of XLA. With a cotangent it
    returns the gradients of `inputs` too. Every array is an argument of the compiled function."""
    arrays, rest = eqx.partition((inputs, others, cotangent), eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    @partial(jax.jit, compiler_options=flags)
    def run(*leaves):
        inputs, others, cotangent = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
        if cotangent is None:
            return function(*inputs, *others)
        output, vjp = eqx.filter_vjp(lambda *inputs: function(*inputs, *others), *inputs)
        return output, vjp(cotangent)

    return lambda: jax.block_until_ready(run(*leaves))


def parts(workload: Workload, arrays: Arrays) -> tuple[bx.AbstractRouter, bx.AbstractExperts]:
    """The router and the experts that hold the arrays of the workload."""
    cast = partial(jnp.asarray, dtype=workload.dtype)
    key, hidden, experts = jax.random.key(0), workload.hidden, workload.experts
    router = bx.TopKRouter(hidden, experts, workload.experts_per_token, key=key)
    router = eqx.tree_at(lambda router: router.gate.weight, router, cast(arrays.gate))
    # Shapes alone: random numbers of the largest sizes would take longer than the measurement.
    make = partial(bx.Experts, activation=bx.activations.swiglu(LIMIT), key=key)
    stack = eqx.filter_eval_shape(make, experts, hidden, workload.intermediate)
    weights = (cast(arrays.gate_up), cast(arrays.down))
    stack = eqx.tree_at(lambda e: (e.gate_up, e.down), stack, weights)
    return router, stack


def named(names: Sequence[str]) -> dict[str, bx.AbstractGroupedMatmul]:
    """The kernels of the library that have these names, and `Rounded`."""
    kernels = vars(bx.matmul) | {"Rounded": partial(bx.matmul.Blocks, round_operands=True)}
    return {f"braidax {name}": kernels[name]() for name in names}


def layers(
    workload: Workload,
    arrays: Arrays,
    direction: str,
    matmuls: Mapping[str, bx.AbstractGroupedMatmul],
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Call]:
    """Dispatch, experts and combine of the given routing, by every one of `matmuls`. Backward,
    with the gradients of every expert weight, of hidden states and of routing weights.

    Forward, the router as well: gate and selection, which a layer computes before its experts."""
    router, experts = parts(workload, arrays)
    hidden_states = jnp.asarray(arrays.hidden_states, workload.dtype)
    cotangent = None if direction == "forward" else jnp.asarray(arrays.cotangent, workload.dtype)
    routing = jax.eval_shape(router, hidden_states)
    routing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), routing)
    routing = eqx.tree_at(lambda r: r.indices, routing, jnp.asarray(arrays.indices))

    def layer(experts, hidden_states, weights, router, routing, dispatch):
        routing = eqx.tree_at(lambda r: r.weights, routing, weights)
        return bx.RoutedMoE(router, experts, dispatch=dispatch)(hidden_states, routing=routing)[0]

    inputs = (experts, hidden_states, jnp.asarray(arrays.weights))
    calls = {}
    for name, matmul in matmuls.items():
        others = (router, routing, bx.SortedDispatch(matmul))
        calls[name] = compiled(layer, inputs, *others, cotangent=cotangent, flags=flags)
    if direction == "forward":
        calls["routing"] = compiled(lambda router, tokens: router(tokens), (router, hidden_states))
    return calls


def bounds(workload: Workload, arrays: Arrays, direction: str) -> dict[str, Call]:
    """Plain products of equal FLOPs. Forward, also the reading of as many bytes as the weights of
    the experts that the workload touches."""

    def multiply(*pairs):
        return [jnp.matmul(*pair, preferred_element_type=jnp.float32) for pair in pairs]

    random = partial(jax.random.normal, jax.random.key(0), dtype=workload.dtype)
    pairs = [(random((m, k)), random((k, n))) for m, k, n in workload.products(direction)]
    calls = {"product of jax": compiled(multiply, pairs)}
    if direction == "forward":
        numbers = jnp.ones(touched_bytes(workload, arrays) // 4, jnp.float32)
        calls["reading"] = compiled(jnp.sum, (numbers,))
    return calls

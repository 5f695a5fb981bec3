"""What is timed of JAX: our block, and plain matrix products of equal FLOPs as the limit."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from .._backends import check_backend
from .._experts import SwiGLUExperts
from .._moe import RoutedMoE
from .._router import TopKRouter
from .workloads import Arrays, Workload, make_routing

LIMIT = 10.0
DIRECTIONS = ("forward", "forward+backward")
Call = Callable[[], object]


def our_block(workload: Workload, arrays: Arrays, backend: str) -> RoutedMoE:
    """The block that holds the arrays of the workload."""
    key = jax.random.key(0)
    # Small, and replaced: random numbers of the real size would take longer than the run.
    router = TopKRouter(1, workload.experts, workload.experts_per_token, key=key)
    experts = SwiGLUExperts(1, 1, 1, limit=LIMIT, key=key)
    gate = jnp.zeros((workload.experts, workload.hidden), workload.dtype)
    router = eqx.tree_at(lambda router: router.weight, router, gate)
    weights = (jnp.asarray(array, workload.dtype) for array in (arrays.gate_up, arrays.down))
    experts = eqx.tree_at(lambda experts: (experts.gate_up, experts.down), experts, tuple(weights))
    return RoutedMoE(router, experts, backend=check_backend(backend))


def ours(workload: Workload, arrays: Arrays, backend: str, direction: str) -> Call:
    """Dispatch, experts and combine of a given routing; backward with respect to hidden states,
    routing weights and every expert weight."""
    block = our_block(workload, arrays, backend)
    routing = make_routing(arrays, workload.experts)
    hidden_states, cotangent = (
        jnp.asarray(array, workload.dtype) for array in (arrays.hidden_states, arrays.cotangent)
    )

    def forward(experts, hidden_states, weights, routing):
        given = eqx.tree_at(lambda routing: routing.weights, routing, weights)
        replaced = eqx.tree_at(lambda block: block.experts, block, experts)
        return replaced(hidden_states, routing=given)[0]

    def run(experts, hidden_states, weights, routing, cotangent):
        called = partial(forward, routing=routing)
        if direction == "forward":
            return called(experts, hidden_states, weights)
        output, vjp = eqx.filter_vjp(called, experts, hidden_states, weights)
        return output, vjp(cotangent)

    return _compiled(run, block.experts, hidden_states, routing.weights, routing, cotangent)


def _compiled(function: Callable[..., object], *arguments: object) -> Call:
    """A call of the compiled function, of which no array is a constant: XLA would sort the
    assignments while it compiles. It is handed bare arrays: to take modules apart at every
    call is a quarter of the time of decoding one token, and no layer inside of a model pays it."""
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    @jax.jit
    def run(*leaves):
        return function(*eqx.combine(jax.tree.unflatten(structure, leaves), rest))

    return lambda: jax.block_until_ready(run(*leaves))


def gemm_limit(workload: Workload, arrays: Arrays, direction: str) -> Call:
    """Two plain matrix products with the FLOPs of all rows, and their two transposes each for the
    backward pass: no dispatch, no activation, every weight used by every row."""
    key = jax.random.key(0)
    rows = jax.random.normal(key, (workload.rows, workload.hidden), workload.dtype)
    inner = jax.random.normal(key, (workload.rows, 2 * workload.intermediate), workload.dtype)
    gate_up = jnp.asarray(arrays.gate_up[0].T, workload.dtype)
    down = jnp.asarray(arrays.down[0], workload.dtype)
    activations = inner[:, : workload.intermediate]

    def products(rows, activations, gate_up, down):
        multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)
        return multiply(rows, gate_up), multiply(activations, down)

    @jax.jit
    def run(rows, inner, activations, gate_up, down):
        outputs = products(rows, activations, gate_up, down)
        if direction == "forward":
            return outputs
        _, vjp = jax.vjp(products, rows, activations, gate_up, down)
        wide = (inner.astype(jnp.float32), rows.astype(jnp.float32))
        return outputs, vjp(wide)

    return lambda: jax.block_until_ready(run(rows, inner, activations, gate_up, down))


def read_limit(workload: Workload) -> Call:
    """Reading as many bytes as the weights that the workload touches: the limit of decoding."""
    numbers = jnp.ones(max(1, workload.touched_bytes // 4), jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: jax.block_until_ready(total(numbers))

"""Two figures of size S: what routing costs of a layer's forward pass, and compile time.

    python tests/benchmarks/routing_share.py

Gate, selection and the plan of the dispatch are timed beside the whole layer, interleaved. Compile
time is that of forward and backward, from lowered to compiled.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp

import braidax as bx
from braidax._backends import find_backend
from braidax._bench.timing import interleave

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, TOKENS = 512, 256, 64, 6, 4096


def main() -> None:
    """Print both."""
    router = bx.TopKRouter(HIDDEN, EXPERTS, SLOTS, key=jax.random.key(0))
    experts = bx.SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE, key=jax.random.key(1))
    block = bx.RoutedMoE(router, experts, backend="blocks")
    hidden_states = jax.random.normal(jax.random.key(2), (TOKENS, HIDDEN))

    @eqx.filter_jit
    def layer(block, hidden_states):
        return block(hidden_states)[0]

    @eqx.filter_jit
    def routing_and_plan(block, hidden_states):
        routing = block.router(hidden_states)
        plan = find_backend(block.backend).dispatch(routing.indices, None, EXPERTS)
        return routing, plan

    calls = {
        "layer": lambda: jax.block_until_ready(layer(block, hidden_states)),
        "routing": lambda: jax.block_until_ready(routing_and_plan(block, hidden_states)),
    }
    timings = interleave(calls, 15)
    whole, part = timings["layer"].median, timings["routing"].median
    print(f"layer {whole * 1e3:.1f} ms, routing {part * 1e3:.2f} ms: {part / whole:.1%}")

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def step(block, hidden_states):
        return jnp.sum(jnp.sin(block(hidden_states)[0]))

    lowered = step.lower(block, hidden_states)
    start = time.perf_counter()
    lowered.compile()
    print(f"forward and backward compiled in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

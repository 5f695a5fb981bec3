"""What a list of layers costs before its first step: tracing, lowering, and XLA.

    python tests/benchmarks/compile_time.py

Seconds of CPU time of the process, all threads together: the clock of a shared machine says little.
Nothing is read from a compilation cache. A mixture is compared with dense layers of equal FLOPs.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp

import braidax as bx

HIDDEN, INTERMEDIATE, EXPERTS, SLOTS = 64, 64, 16, 2
CASES = {"one token, forward": ((1,), False), "2048 tokens, gradient": ((16, 128), True)}


def make_layer(kind: str, key: jax.Array) -> eqx.Module:
    """A mixture with one shared expert, or a dense network as wide as what a token uses of it."""
    if kind == "dense":
        return bx.FeedForward(HIDDEN, INTERMEDIATE * (SLOTS + 1), key=key)
    sizes = (HIDDEN, INTERMEDIATE, EXPERTS, SLOTS)
    return bx.top_k_moe(*sizes, num_shared_experts=1, key=key)


def loss(layers: list, hidden_states: jax.Array) -> jax.Array:
    """Of residual layers, one after the other."""
    for layer in layers:
        output = layer(hidden_states)
        hidden_states = hidden_states + (output[0] if isinstance(output, tuple) else output)
    return jnp.sum(jnp.sin(hidden_states))


def seconds(kind: str, number: int, tokens: tuple[int, ...], gradient: bool) -> list[float]:
    """Of tracing, lowering and compiling `number` layers."""
    layers = [make_layer(kind, key) for key in jax.random.split(jax.random.key(0), number)]
    arrays, static = eqx.partition(layers, eqx.is_array)

    def call(arrays, hidden_states):
        return loss(eqx.combine(arrays, static), hidden_states)

    jax.clear_caches()
    moments = [time.process_time()]
    traced = jax.jit(jax.grad(call) if gradient else call).trace(
        arrays, jnp.ones((*tokens, HIDDEN))
    )
    moments.append(time.process_time())
    lowered = traced.lower()
    moments.append(time.process_time())
    lowered.compile()
    moments.append(time.process_time())
    return [after - before for before, after in zip(moments, moments[1:], strict=False)]


def main() -> None:
    """Print one line for each case, kind and number of layers."""
    jax.config.update("jax_enable_compilation_cache", False)
    seconds("dense", 1, (4, 16), True)  # what the first program of a process pays
    for name, (tokens, gradient) in CASES.items():
        for kind in ("mixture", "dense"):
            for number in (1, 4, 24):
                parts = seconds(kind, number, tokens, gradient)
                cells = "  ".join(
                    f"{part} {value:5.2f}"
                    for part, value in zip(("trace", "lower", "XLA"), parts, strict=True)
                )
                print(f"{name:22} {number} {kind:8} {cells}  all {sum(parts):5.2f}", flush=True)


if __name__ == "__main__":
    main()

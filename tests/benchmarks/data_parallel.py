"""Rows and time of a layer whose tokens are spread over CPU devices: `data_parallel.py DEVICES`.

The rows are those of the largest `(rows, hidden)` array in the program of one device.
"""

import re
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import braidax as bx

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, SLOTS = 2048, 256, 512, 8, 2


def measure(block, tokens):
    """`(rows, milliseconds)` of the gradient of one device's program, the best of ten runs."""
    arrays, static = eqx.partition(block, eqx.is_inexact_array)

    def loss(arrays, tokens):
        return jnp.mean(jnp.square(eqx.combine(arrays, static)(tokens)[0]))

    program = jax.jit(jax.grad(loss)).lower(arrays, tokens).compile()
    rows = max(int(n) for n in re.findall(rf"f32\[(\d+),{HIDDEN}\]", program.as_text()))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays, tokens))
        times.append(1e3 * (time.perf_counter() - start))
    return rows, min(times)


def main(devices):
    """One line for each way."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    block = bx.top_k_moe(HIDDEN, INTERMEDIATE, EXPERTS, SLOTS, key=jax.random.key(0))
    tokens = jax.random.normal(jax.random.key(1), (TOKENS, HIDDEN))
    tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    parallel = bx.ExpertParallel(mesh, axis=None, tokens=("data",))
    whole = jax.device_put(eqx.filter(block, eqx.is_array), NamedSharding(mesh, PartitionSpec()))
    ways = {"plain block": eqx.combine(whole, block), "axis=None": parallel.shard(block)}
    for name, model in ways.items():
        rows, milliseconds = measure(model, tokens)
        print(f"{devices} devices  {name:11}  {rows:5} rows  {milliseconds:7.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]))

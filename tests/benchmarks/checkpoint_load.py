"""Time and memory of loading one layer of DeepSeek-V4-Flash's size, and of running it.

Run as `python tests/benchmarks/checkpoint_load.py`: writes a file of 3.4 GB to a temporary folder
and measures each way to load it in a process of its own. RESULTS.md keeps a run.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

LAYER = 3


def memory(key):
    """`VmRSS`, now, or `VmHWM`, the most so far, of this process, in GB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(key)


def measure(path, dtype):
    """Load the layer and run it on 1 and on 128 tokens, compiled and warm."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import braidax as bx

    run = eqx.filter_jit(lambda moe, hidden_states: moe(hidden_states)[0])
    jnp.zeros(1).block_until_ready()
    start = time.perf_counter()
    moe = bx.load_moe(path, LAYER, config=bx.MoEConfig.deepseek_v4_flash(), dtype=dtype)
    jax.block_until_ready(eqx.filter(moe, eqx.is_array))
    print(
        f"{dtype:9} loaded in {time.perf_counter() - start:6.2f} s,"
        f" RSS {memory('VmRSS'):5.2f} GB, peak {memory('VmHWM'):5.2f} GB",
        flush=True,
    )
    for tokens in (1, 128):
        hidden_states = jax.random.normal(jax.random.key(0), (tokens, 4096))
        for call in ("first", "warm"):
            start = time.perf_counter()
            run(moe, hidden_states).block_until_ready()
            print(
                f"{dtype:9} {tokens:4} tokens, {call:5} {time.perf_counter() - start:6.2f} s,"
                f" RSS {memory('VmRSS'):5.2f} GB, peak {memory('VmHWM'):5.2f} GB",
                flush=True,
            )


def main():
    import checkpoints

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "layer.safetensors"
        start = time.perf_counter()
        checkpoints.write_flash_layer(path, LAYER)
        print(f"written: {path.stat().st_size / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s")
        # Memory measured in a process that has done nothing else.
        for dtype in ("packed", "bfloat16"):
            subprocess.run([sys.executable, __file__, str(path), dtype], check=True)


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()

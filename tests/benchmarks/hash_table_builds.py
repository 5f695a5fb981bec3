"""Time and memory of every hash-table builder at DeepSeek-V4-Flash's size.

Run as `python tests/benchmarks/hash_table_builds.py`; RESULTS.md keeps a run.
"""

import time
import tracemalloc

import numpy as np

from braidax import hash_tables

SIZES = (129_280, 256, 6)
VOCAB, EXPERTS, SLOTS = SIZES
ZIPF = (1e9 / np.arange(1, VOCAB + 1)).astype(np.int64)

BUILDERS = {
    "md5": lambda: hash_tables.md5(*SIZES),
    "random": lambda: hash_tables.random(*SIZES),
    "round_robin": lambda: hash_tables.round_robin(*SIZES),
    "balanced, Zipf counts": lambda: hash_tables.balanced(ZIPF, EXPERTS, SLOTS),
    "balanced, equal counts": lambda: hash_tables.balanced(np.full(VOCAB, 7), EXPERTS, SLOTS),
    "from_array": lambda: hash_tables.from_array(np.zeros((VOCAB, SLOTS), np.int64), EXPERTS),
}

for name, build in BUILDERS.items():
    start = time.perf_counter()
    build()
    seconds = time.perf_counter() - start
    tracemalloc.start()  # after the timing: tracing slows the loops down
    build()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"{name:24} {seconds:6.2f} s {peak:6.0f} MiB")

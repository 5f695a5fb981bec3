"""This checkout of braidax against another one: the whole layer, routing included.

    git worktree add ../before SOME_COMMIT
    python tests/benchmarks/against_commit.py ../before [--workloads S P1] [--rounds 15] [--cores 2]

Each checkout runs in a worker process with its own `src` first on the path. The workers inherit the
same cores, get the same arrays, and take their samples in turn: `interleaving.py` has the method.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import pathlib
import sys
from multiprocessing.connection import Connection
from typing import Any

from interleaving import Call, cores, interleave, sampler
from workloads import DIRECTIONS, GROUPS, LIMIT, Workload, make_arrays

# What `braidax.keep_memory()` asks for: the other commit may not have the function.
KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_ARENA_MAX": "1",
}
THIS = pathlib.Path(__file__).resolve().parents[2]
LARGEST_DECODED = 64  # tokens: up to here nobody trains, and only the forward pass is measured
CHOSEN = (*GROUPS["layers"][:3], *GROUPS["decode"], *GROUPS["bfloat16"])
WORKLOADS = {workload.name: workload for workload in CHOSEN}


def whole_layer(bx: Any, workload: Workload, direction: str) -> Call:
    """A call of a layer with the dispatch that a user gets. Backward, with the gradients of tokens
    and of every weight."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from jax_candidates import compiled, parts

    arrays = make_arrays(workload)
    hidden_states, cotangent, gate, gate_up, down = (
        jnp.asarray(getattr(arrays, name), workload.dtype)
        for name in ("hidden_states", "cotangent", "gate", "gate_up", "down")
    )
    # The second edition of the library renamed its parts. This program alone knows both names,
    # because comparing commits across that change is what it is for.
    if hasattr(bx, "Experts"):
        router, experts = parts(workload, arrays)
    else:
        key, sizes = jax.random.key(0), (workload.hidden, workload.experts)
        router = bx.TopKRouter(*sizes, workload.experts_per_token, key=key)
        router = eqx.tree_at(lambda router: router.weight, router, gate)
        sizes = (workload.experts, workload.hidden, workload.intermediate)
        experts = bx.SwiGLUExperts(*sizes, limit=LIMIT, key=key)
        weights = (gate_up.reshape(experts.gate_up.shape), down)
        experts = eqx.tree_at(lambda e: (e.gate_up, e.down), experts, weights)
    inputs = (bx.RoutedMoE(router, experts), hidden_states)
    cotangent = None if direction == "forward" else cotangent
    return compiled(lambda block, tokens: block(tokens)[0], inputs, cotangent=cotangent)


def work(connection: Connection, checkout: pathlib.Path) -> None:
    """The worker of one checkout. A pair prepares a workload, and a number asks for a sample."""
    sys.path.insert(0, str(checkout / "src"))
    import jax
    import numpy as np

    import braidax as bx

    if not pathlib.Path(bx.__file__).is_relative_to(checkout):
        raise ImportError(f"braidax of {checkout} was asked for. Got {bx.__file__}.")
    sample = None
    # The pipe ends when nothing is left to ask.
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            if isinstance(request, int):
                connection.send(sample(request))
            else:
                call = whole_layer(bx, *request)
                sample = sampler(call)
                leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(call())]
                connection.send(sum(float(np.abs(leaf).mean()) for leaf in leaves))


def start(checkout: pathlib.Path) -> Connection:
    """The connection to a new worker, which ends together with this process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(theirs, checkout), daemon=True).start()
    theirs.close()
    return ours


def ask(connection: Connection, request: Any) -> float:
    """The answer of a worker to one request."""
    connection.send(request)
    return connection.recv()


def compare(workers: dict[str, Connection], workload: Workload, direction: str, rounds: int) -> str:
    """One line of medians and their ratio.

    **Raises:** `ValueError` if the two do not compute the same numbers.
    """
    sizes = [ask(worker, (workload, direction)) for worker in workers.values()]
    if not math.isclose(*sizes, rel_tol=1e-2):
        raise ValueError(f"{workload.name}, {direction}: results of mean sizes {sizes}.")
    samplers = {
        name: lambda repeats, worker=worker: ask(worker, repeats)
        for name, worker in workers.items()
    }
    timings = interleave(samplers, rounds)
    cells = "  ".join(f"{name} {timing}" for name, timing in timings.items())
    ratio = timings["this"].median / timings["other"].median
    return f"{workload.name:11} {direction:17} {cells}  this / other {ratio:.2f}"


def main() -> None:
    """Print one line a workload and direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cores", type=int, help="pin both workers to the first so many (Linux)")
    given = parser.parse_args()
    if given.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    print(f"this: {THIS}; other: {given.other}; threads of each: {cores()}; median ms", flush=True)
    os.environ.update(KEPT)  # a worker reads them when it starts
    workers = {"this": start(THIS), "other": start(given.other)}
    for workload in map(WORKLOADS.get, given.workloads):
        for direction in given.directions:
            if direction == "forward" or workload.tokens > LARGEST_DECODED:
                print(compare(workers, workload, direction, given.rounds), flush=True)


if __name__ == "__main__":
    main()

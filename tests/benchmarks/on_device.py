"""What a GPU is asked when one is lent: are the kernels right, and how fast is a layer?

    python tests/benchmarks/on_device.py --minutes 10 --json on_device.json
    python tests/benchmarks/on_device.py --small

Every kernel is checked against float64 first, with experts that have no rows. What is wrong or does
not run is reported and not timed. Then the layers of `WORKLOADS` are timed, forward and with their
gradients, beside their peers and a plain product of equal FLOPs: what matters most comes first.
Nothing starts after the time is up, and the JSON file holds what was found until then. `--small`
shows that the program works.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too

import jax
import jax.numpy as jnp
import jax_candidates
import numpy as np
from interleaving import Call, interleave, sampler
from layer_speed import header
from workloads import DIRECTIONS, GROUPS, LIMIT, Arrays, Workload, make_arrays, make_indices

import braidax as bx

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import oracle  # noqa: E402

FEW, SOME, MANY = GROUPS["accelerator"]
WORKLOADS = (SOME, *GROUPS["bfloat16"], MANY, FEW)
SMALL = (Workload("small", 128, 64, 8, 2, 16, "bfloat16"),)
# 40 experts for 24 assignments: many have none.
CHECKED = Workload("checked", 128, 64, 40, 2, 12, "bfloat16")
# Of the largest entry. bfloat16 has 8 bits, and a layer rounds rows, activations and outputs.
TOLERANCE = 2**-6
FUSION = {"xla_gpu_experimental_use_ragged_dot_fusion": True}
PRODUCT = "product of jax"


class NarrowRagged(bx.matmul.Ragged):
    """`ragged_dot` with results in the dtype of its operands: only then XLA's fusion takes it."""

    def ragged_dot_general(self, *operands, **options):
        """As that of JAX."""
        options["preferred_element_type"] = jnp.result_type(*operands[:2])
        return jax.lax.ragged_dot_general(*operands, **options)


def kernels() -> dict[str, tuple[bx.AbstractGroupedMatmul, Mapping[str, Any] | None]]:
    """What is compared, by name, with flags of XLA. The first is ours."""
    found = {"Auto": (bx.matmul.Auto(), None)}
    try:
        found["Tokamax"] = (bx.matmul.Tokamax(), None)
    except ImportError as error:
        print(f"Tokamax: {error}", flush=True)
    if jax.default_backend() == "gpu":
        found["ragged_dot, fusion"] = (NarrowRagged(), FUSION)
        found["Mosaic"] = (bx.matmul.Mosaic(), None)
    return found | {"Blocks": (bx.matmul.Blocks(), None), "ragged_dot": (bx.matmul.Ragged(), None)}


def calls(workload: Workload, arrays: Arrays, direction: str) -> dict[str, Callable[[], Call]]:
    """What makes the call of every candidate: making it may fail, as running it may."""
    made = {}
    for name, (matmul, flags) in kernels().items():
        arguments = (workload, arrays, direction, {name: matmul}, flags)
        made[name] = lambda arguments=arguments, name=name: jax_candidates.layers(*arguments)[name]
    return made


def attempt(name: str, run: Callable[[], Any]) -> tuple[Any, str]:
    """The result of `run`, or `None` with what went wrong: one kernel must not end the program."""
    try:
        return run(), ""
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip():.300}"
        print(f"{name}: {message}", flush=True)
        return None, message


def check() -> list[dict[str, Any]]:
    """For every kernel the largest errors of output and gradients, relative to their largest."""
    arrays = make_arrays(CHECKED)
    rounded = Arrays(
        *(np.asarray(jnp.asarray(array, CHECKED.dtype), np.float64) for array in arrays)
    )
    given = (rounded.hidden_states, arrays.indices, rounded.weights, rounded.gate_up, rounded.down)
    want = oracle.block_and_gradients(*given, LIMIT, rounded.cotangent)
    arrays = arrays._replace(weights=rounded.weights.astype(np.float32))
    results = []
    for name, make in calls(CHECKED, arrays, "forward+backward").items():
        found, error = attempt(name, lambda make=make: make()())
        result = {"kernel": name, "right": False, "error": error}
        if found is not None:
            output, (experts, tokens, weights) = found
            got = (output, tokens, weights, experts.gate_up, experts.down)
            result["errors"] = [
                float(np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max())
                for g, w in zip(got, want, strict=True)
            ]
            result["right"] = max(result["errors"]) < TOLERANCE  # false for NaN
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def on_device(workload: Workload) -> Arrays:
    """The arrays of `workload`, drawn on the device: numpy takes minutes for those of V4-Flash."""
    _, hidden, intermediate, experts, slots, tokens, *_ = workload
    draw = jax.jit(
        lambda key, shape, scale: scale * jax.random.normal(key, shape, workload.dtype),
        static_argnums=(1, 2),
    )
    keys = iter(jax.random.split(jax.random.key(0), 6))
    return Arrays(
        hidden_states=draw(next(keys), (tokens, hidden), 1.0),
        gate=draw(next(keys), (experts, hidden), hidden**-0.5),
        gate_up=draw(next(keys), (experts, 2, intermediate, hidden), hidden**-0.5),
        down=draw(next(keys), (experts, intermediate, hidden), intermediate**-0.5),
        indices=make_indices(workload, np.random.default_rng(0)),
        weights=jax.random.uniform(next(keys), (tokens, slots)),
        cotangent=draw(next(keys), (tokens, hidden), 1.0),
    )


def torch_call(workload: Workload, arrays: Arrays, direction: str) -> Call:
    """The same layer by torch's grouped product, of the same arrays."""
    import torch

    backward = direction != "forward"
    names = ("hidden_states", "gate_up", "down", "weights", "cotangent")
    *leaves, cotangent = (torch.from_dlpack(getattr(arrays, name)) for name in names)
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]
    tokens, gate_up, down, weights = leaves
    indices = torch.from_numpy(np.array(arrays.indices)).long().to(tokens.device).flatten()

    def layer():
        order = indices.argsort(stable=True)
        stops = torch.bincount(indices, minlength=workload.experts).cumsum(0).to(torch.int32)
        token = order // workload.experts_per_token
        up = gate_up.flatten(1, 2).transpose(1, 2)
        before = torch.nn.functional.grouped_mm(tokens[token], up, offs=stops)
        gate, value = before.chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * value.clamp(-LIMIT, LIMIT)
        rows = torch.nn.functional.grouped_mm(inner, down, offs=stops)
        rows = rows * weights.flatten()[order][:, None]
        output = torch.zeros(tokens.shape, device=tokens.device)
        return output.index_add(0, token, rows).to(tokens.dtype)

    def run():
        with torch.set_grad_enabled(backward):
            output = layer()
            if backward:
                torch.autograd.grad(output, leaves, cotangent)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return output

    return run


def candidates(
    workload: Workload, arrays: Arrays, direction: str, names: list[str]
) -> dict[str, Callable[[], Call]]:
    """What makes the call of the kernels `names` and of their peers: what matters most first."""

    def product():
        return jax_candidates.bounds(workload, arrays, direction)[PRODUCT]

    made = calls(workload, arrays, direction)
    kernels = [(name, made[name]) for name in made if name in names]
    torch = partial(torch_call, workload, arrays, direction)
    return dict([*kernels[:1], (PRODUCT, product), ("torch grouped_mm", torch), *kernels[1:]])


def measure(
    workload: Workload, direction: str, names: list[str], rounds: int, end: float
) -> list[dict[str, Any]]:
    """A row for every candidate: seconds, and its rate as a part of that of the plain product."""
    samplers, rows = {}, []
    for name, make in candidates(workload, on_device(workload), direction, names).items():

        def prepared(make=make):
            if time.monotonic() > end:
                raise TimeoutError("the time is up")
            call = make()
            call()
            return sampler(call)

        samplers[name], error = attempt(f"{workload.name}, {direction}, {name}", prepared)
        if error:
            rows.append({"candidate": name, "error": error})
    timings = interleave({name: s for name, s in samplers.items() if s is not None}, rounds)
    limit = timings[PRODUCT].median if PRODUCT in timings else float("nan")
    for name, timing in timings.items():
        row = {"candidate": name, **timing._asdict(), "of the product": limit / timing.median}
        rows.append({**row, "TFLOP/s": workload.flops(direction) / timing.median / 1e12})
    return [{"workload": workload.name, "direction": direction, **row} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in milliseconds."""
    lines = [
        "| workload | direction | candidate | ms (lowest to highest) | TFLOP/s | of the product |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["workload"], row["direction"], row["candidate"]]
        if "error" in row:
            cells += [row["error"].splitlines()[0], "-", "-"]
        else:
            low, high = row["lowest"] * 1e3, row["highest"] * 1e3
            cells += [f"{row['median'] * 1e3:.3f} ({low:.3f} to {high:.3f})"]
            cells += [f"{row['TFLOP/s']:.1f}", f"{row['of the product']:.2f}"]
        lines.append("| " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Check, measure, print and write. Returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny layers, for any machine")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    print(header(), flush=True)
    found: dict[str, Any] = {"machine": header(), "checks": check(), "times": [], "left out": []}
    right = [result["kernel"] for result in found["checks"] if result["right"]]
    for workload in SMALL if given.small else WORKLOADS:
        for direction in DIRECTIONS:
            if time.monotonic() > end:
                found["left out"].append([workload.name, direction])
                continue
            work = partial(measure, workload, direction, right, given.rounds, end)
            rows, error = attempt(f"{workload.name}, {direction}", work)
            if error:
                found["left out"].append([workload.name, direction, error])
                continue
            found["times"] += rows
            print(table(rows), flush=True)
            if given.json:
                given.json.write_text(json.dumps(found, indent=1))
    print(table(found["times"]), f"left out: {found['left out']}", sep="\n", flush=True)
    return found


if __name__ == "__main__":
    main()

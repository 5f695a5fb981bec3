"""What balancing, hashing and sharing are worth: small language models on real text, three seeds.

    python tests/benchmarks/study.py --runs study.jsonl

Every finished run adds a line to the file, and a study that was stopped goes on where it was. At
its end, or with `--table` at once, the script prints the table of docs/study.md. A process computes
with one thread, and there is one process for each core.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from study_variants import REFERENCE, SEEDS, VARIANTS, Variant, settings_of

import braidax as bx
from braidax import training
from braidax.training.devices import Devices
from braidax.training.reports import held_out_batches, held_out_pass
from braidax.training.step import make_schedule


def initial_model(variant: Variant, settings: training.Settings, corpus: training.Corpus) -> Any:
    model = training.initial_state(settings).model
    for index in range(min(variant.edited_layers, settings.layers)):
        key = jax.random.fold_in(jax.random.key(settings.seed), index)
        model = eqx.tree_at(
            lambda model, index=index: model.layers[index].feed_forward,
            model,
            replace_fn=lambda block, key=key: variant.edit(block, settings, corpus, key),
        )
    return model


def make_step(variant: Variant, settings: training.Settings, optimizer: Any) -> Callable:
    """`step(windows, step, model, optimizer_state)`, compiled: the training program's, with the
    variant's loss and update."""
    rate = make_schedule(settings, settings.balance_rate)

    @eqx.filter_jit(donate="all-except-first")
    def step(windows, count, model, optimizer_state):
        trained, fixed = eqx.partition(model, bx.trainable(model))

        def loss_of(trained):
            loss, routings = training.next_byte_loss(eqx.combine(trained, fixed), windows)
            return loss + variant.loss(routings), routings

        gradients, routings = jax.grad(loss_of, has_aux=True)(trained)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, trained)
        model = eqx.combine(eqx.apply_updates(trained, updates), fixed)
        return variant.update(model, routings, rate(count)), optimizer_state

    return step


def train(variant: Variant, settings: training.Settings, corpus: training.Corpus, step: Any):
    model = initial_model(variant, settings, corpus)
    optimizer_state = training.make_optimizer(settings).init(eqx.filter(model, bx.trainable(model)))
    for done in range(settings.steps):
        windows = training.training_windows(
            corpus.training,
            batch=settings.batch,
            length=settings.length,
            seed=settings.seed,
            step=done + 1,
        )
        model, optimizer_state = step(windows, jnp.int32(done), model, optimizer_state)
    return model


def measure(model: Any, settings: training.Settings, corpus: training.Corpus) -> dict[str, Any]:
    """Of the held-out text: bits per byte, and of every routed layer MaxVio and dead experts.

    Batches are those of training: an expert that chooses tokens chooses among as many."""
    windows = held_out_batches(settings, corpus)
    bits, loads, _ = held_out_pass(windows, Devices(None), model)
    layers = [jnp.asarray(layer) for layer in loads]
    return {
        "bits_per_byte": bits,
        "max_violation": [float(bx.max_violation(layer)) for layer in layers],
        "dead_experts": [int(bx.dead_experts(layer)) for layer in layers],
    }


def run(name: str, seeds: list[int], path: pathlib.Path) -> None:
    """The runs of one variant, which share what is compiled."""
    variant, corpus = VARIANTS[name], training.read_corpus()
    settings = settings_of(name, 0)
    step = make_step(variant, settings, training.make_optimizer(settings))
    for seed in seeds:
        begin, settings = time.perf_counter(), settings_of(name, seed)
        model = train(variant, settings, corpus, step)
        result = measure(model, settings, corpus)
        line = {
            "variant": name,
            "seed": seed,
            "settings": dataclasses.asdict(settings),
            "corpus": corpus.sha256,
            "jax": jax.__version__,
            "seconds": round(time.perf_counter() - begin),
            **result,
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_runs(path: pathlib.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """`{variant: {seed: line}}`. A line of other settings than today's is an error."""
    runs: dict[str, dict[int, dict[str, Any]]] = collections.defaultdict(dict)
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        name, seed = found["variant"], found["seed"]
        if found["settings"] != dataclasses.asdict(settings_of(name, seed)):
            raise SystemExit(f"{path}: the run {name!r}, seed {seed}, had other settings.")
        runs[name][seed] = found
    return runs


def spread(values: list[float], form: str) -> str:
    """Mean and, in brackets, the smallest and the largest."""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def row(name: str, runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    seeds = sorted(runs[name])
    lines = [runs[name][seed] for seed in seeds]
    reference = runs[REFERENCE]
    base = [reference[seed]["bits_per_byte"] if seed in reference else math.nan for seed in seeds]
    bits = [line["bits_per_byte"] for line in lines]
    differences = [ours - theirs for ours, theirs in zip(bits, base, strict=True)]
    cells = [name, spread(bits, ".3f"), "-", "-", "-"]
    if name != REFERENCE:
        cells[2] = spread(differences, "+.3f")
    if lines[0]["max_violation"]:
        cells[3] = spread([statistics.fmean(line["max_violation"]) for line in lines], ".2f")
        cells[4] = str(sum(sum(line["dead_experts"]) for line in lines))
    return f"| {' | '.join(cells)} |"


def table(runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    titles = [
        "model",
        "bits per byte, held out",
        "minus the reference, seed by seed",
        "MaxVio, mean of the layers",
        "dead experts, all seeds",
    ]
    head = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*head, *(row(name, runs) for name in VARIANTS if runs[name])])


def missing(names: list[str], path: pathlib.Path) -> dict[str, list[int]]:
    """The seeds that each of these variants has not run."""
    runs = read_runs(path)
    left = {name: sorted({*SEEDS} - {*runs[name]}) for name in names}
    return {name: seeds for name, seeds in left.items() if seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("study.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    left = {} if options.table else missing(options.only, options.runs)
    # Read by the processes, before they import jax.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        begun = {pool.submit(run, name, left[name], options.runs): name for name in left}
        for done in concurrent.futures.as_completed(begun):
            done.result()
            print(f"{begun[done]}: done", flush=True)
    print(table(read_runs(options.runs)))


if __name__ == "__main__":
    main()

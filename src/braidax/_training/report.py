"""The end of a run: the held-out pass, report.json and the picture."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import platform

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .._balance import dead_experts, load_entropy, max_violation
from .corpus import Corpus
from .devices import Devices
from .filters import trainable
from .held_out import HeldOutPass
from .language_model import LanguageModel
from .progress import format_layers, read_history
from .settings import Settings
from .step import State, evaluate


def write_report(
    folder: pathlib.Path, settings: Settings, corpus: Corpus, devices: Devices, state: State
) -> str:
    """Evaluate the model on held-out text, write report.json and return the lines to print.

    The file holds no times: a resumed run writes the same bytes as one that was never stopped.
    A figure that is not finite is null in it.
    """
    model, skipped = state.model, int(state.skipped)
    held_out = HeldOutPass(
        settings,
        corpus,
        lambda windows: devices.on_host(evaluate(model, jnp.asarray(devices.spread(windows)))),
    )
    loads = [np.zeros(settings.experts, np.int64) for _ in settings.layer_names()]
    for batch_loads in held_out:
        loads = [total + np.asarray(load) for total, load in zip(loads, batch_loads, strict=True)]
    bits_per_byte, num_bytes = held_out.bits_per_byte, held_out.num_bytes
    layers = [_layer(name, load) for name, load in zip(settings.layer_names(), loads, strict=True)]
    total, active = _num_parameters(settings, model)
    report = {
        "settings": dataclasses.asdict(settings),
        "versions": _versions(),
        "corpus": corpus.identity(),
        "parameters": {"total": total, "active_per_token": active},
        "skipped_steps": skipped,
        "validation_bits_per_byte": bits_per_byte if math.isfinite(bits_per_byte) else None,
        "validation_bytes": num_bytes,
        "layers": layers,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    violations = [layer["max_violation"] for layer in layers]
    dead = " ".join(str(layer["dead_experts"]) for layer in layers) or "-"
    note = (
        f"skipped: {skipped} of {settings.steps} steps changed nothing, because loss, gradient or"
        " new parameters were not finite\n"
    )
    return (note if skipped else "") + (
        f"parameters: {total:,}, of which {active:,} used for each byte\n"
        f"validation: {bits_per_byte:.4f} bits/byte on {num_bytes:,} held-out bytes"
        f"  MaxVio {format_layers(settings, violations)}  dead experts {dead}"
    )


def draw_balance(folder: pathlib.Path, settings: Settings) -> str:
    """Draw balance.png from metrics.csv and report.json; returns the line to print."""
    if not settings.layer_names():
        return "no balance.png: a dense model has no routing"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no balance.png: matplotlib is missing (pip install "braidax[plot]")'
    from .._inspect.plots import plot_balance, plot_load

    layers = json.loads((folder / "report.json").read_text())["layers"]
    steps, violations = read_history(folder)
    figure = Figure(figsize=(8, 7), layout="constrained")
    # Two figures in one: the legend of one must not squeeze the other.
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    upper, lower = (figure.add_subfigure(grid[row, 0]).subplots() for row in (0, 1))
    names = list(settings.layer_names())
    plot_balance(steps, np.array(violations), ax=upper, layer_names=names)
    plot_load(np.array([layer["load"] for layer in layers]), ax=lower, layer_names=names)
    lower.set_title("Expert load on held-out text")
    figure.savefig(folder / "balance.png", dpi=150)
    return f"picture: {folder / 'balance.png'}"


def _layer(name: str, load: Int[np.ndarray, " experts"]) -> dict:
    return {
        "layer": name,
        "max_violation": float(max_violation(jnp.asarray(load))),
        "load_entropy": float(load_entropy(jnp.asarray(load))),
        "dead_experts": int(dead_experts(jnp.asarray(load))),
        "load": load.tolist(),
    }


def _num_parameters(settings: Settings, model: LanguageModel) -> tuple[int, int]:
    """`(trained parameters, those that one byte uses)`."""
    trained = jax.tree.leaves(eqx.filter(model, trainable(model)))
    total = sum(leaf.size for leaf in trained)
    unused = (settings.experts - settings.experts_per_token) * len(settings.layer_names())
    return total, total - unused * 3 * settings.hidden * settings.intermediate


def _versions() -> dict[str, str]:
    names = ("braidax", "jax", "equinox", "optax", "numpy")
    return {"python": platform.python_version()} | {name: installed_version(name) for name in names}


def installed_version(name: str) -> str:
    """Of a distribution; words where it is used without being installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

"""What a model does with held-out text: report.json, balance.png and `python -m braidax report`."""

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from .. import _inspect
from .._balance import dead_experts, load_entropy, max_violation
from .._filters import trainable
from . import checkpoint
from .corpus import Corpus, held_out_windows
from .devices import Devices
from .metrics import format_layers
from .model import LanguageModel
from .settings import Settings, UserError
from .step import State, evaluate, initial_state

_TOKENS_DRAWN = 256


def held_out_batches(settings: Settings, corpus: Corpus) -> Int[np.ndarray, "batches batch _"]:
    """The held-out windows in whole batches, so that one compiled function serves all of them."""
    windows = held_out_windows(corpus.held_out, count=settings.eval_windows, length=settings.length)
    batch = min(settings.batch, len(windows))
    return windows[: len(windows) // batch * batch].reshape(-1, batch, settings.length + 1)


def held_out_pass(
    windows: Int[np.ndarray, "batches batch _"],
    devices: Devices,
    model: LanguageModel,
    *,
    keep: bool = False,
) -> tuple[float, np.ndarray, list]:
    """Bits per byte, the load of every routed layer, and if they are to be kept, all routings."""
    losses, loads, kept = [], np.zeros((), np.int64), []
    for batch in windows:
        loss, load, routings = evaluate(model, devices.spread(batch))
        loss, load = devices.on_host((loss, load))
        losses.append(float(loss))
        loads = loads + np.array(load, np.int64)
        kept += [routings] if keep else []
    return math.fsum(losses) / len(losses) / math.log(2), loads, kept


def validate(settings: Settings, corpus: Corpus, devices: Devices, state: State) -> dict:
    """The contents of report.json, from a pass over the held-out text.

    They hold no times: a resumed run writes the same bytes as one that was never stopped.
    """
    names, windows = settings.layer_names(), held_out_batches(settings, corpus)
    bits, loads, _ = held_out_pass(windows, devices, state.model)
    total = sum(
        leaf.size for leaf in jax.tree.leaves(eqx.filter(state.model, trainable(state.model)))
    )
    unused = (settings.experts - settings.experts_per_token) * len(names)
    return {
        "settings": dataclasses.asdict(settings),
        "versions": {module.__name__: module.__version__ for module in (jax, eqx, optax, np)},
        "corpus": corpus.identity(),
        "parameters": {
            "total": total,
            "active_per_token": total - unused * 3 * settings.hidden * settings.intermediate,
        },
        "skipped_steps": int(state.skipped),
        "validation_bits_per_byte": bits if math.isfinite(bits) else None,
        "validation_bytes": windows[:, :, 1:].size,
        "layers": [
            {
                "layer": name,
                "max_violation": float(max_violation(load)),
                "load_entropy": float(load_entropy(load)),
                "dead_experts": int(dead_experts(load)),
                "load": load.tolist(),
            }
            for name, load in zip(names, map(jnp.asarray, loads), strict=True)
        ],
    }


def write_report(folder: pathlib.Path, settings: Settings, report: dict, rows: list) -> None:
    """Write report.json, draw balance.png from it and the rows of metrics.csv, and print both."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    layers, skipped, parameters = report["layers"], report["skipped_steps"], report["parameters"]
    if skipped:
        print(f"skipped: {skipped} of {settings.steps} steps changed nothing: not finite")
    violations = format_layers(settings, [layer["max_violation"] for layer in layers])
    dead = " ".join(str(layer["dead_experts"]) for layer in layers) or "-"
    print(
        f"parameters: {parameters['total']:,}, of which {parameters['active_per_token']:,} used"
        f" for each byte\nvalidation: {report['validation_bits_per_byte'] or math.nan:.4f}"
        f" bits/byte on {report['validation_bytes']:,} held-out bytes"
        f"  MaxVio {violations}  dead experts {dead}"
    )
    if settings.dense:
        return print("no balance.png: a dense model has no routing")
    try:
        _draw_balance(folder, [layer["load"] for layer in layers], settings.layer_names(), rows)
    except ImportError as error:
        return print(f"no balance.png: {error}")
    print(f"picture: {folder / 'balance.png'}")


def _draw_balance(folder: pathlib.Path, loads: list, names: tuple[str, ...], rows: list) -> None:
    from matplotlib.figure import Figure

    figure, table = Figure(figsize=(8, 7), layout="constrained"), np.array(rows)
    # Two figures in one: the legend of one must not squeeze the other.
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    upper, lower = (part.subplots() for part in parts)
    _inspect.plot_balance(table[:, 0], table[:, -len(names) :], ax=upper, layer_names=names)
    _inspect.plot_load(np.array(loads), ax=lower, layer_names=names)
    lower.set_title("Expert load on held-out text")
    figure.savefig(folder / "balance.png", dpi=150)


def report_run(path: pathlib.Path, out: pathlib.Path | None = None) -> None:
    """Print a report on the run in the folder `path`, or whose checkpoint `path` is.

    Writes it as report.html and draws pictures of the last layer if matplotlib is installed. They
    go to `out`, by default the folder of the run. Raises `UserError`.
    """
    folder = path.parent if path.name == checkpoint.FILE_NAME else path
    header, state = checkpoint.load(folder, initial_state)
    settings, corpus = header.settings, checkpoint.read_same_corpus(header)
    if settings.dense:
        raise UserError(f"{folder} holds a dense model, which has no routing to report on")
    windows = held_out_batches(settings, corpus)
    bits, _, routings = held_out_pass(windows, Devices(None), state.model, keep=True)
    ids = windows[:, :, :-1]
    report = _inspect.report(routings, model=state.model, input_ids=ids, decode=byte_text)
    title = (
        f"{folder}: step {header.step:,} of {settings.steps:,}, {bits:.4f} bits/byte on"
        f" {ids.size:,} held-out bytes of {corpus.source}"
    )
    print(f"{title}\n\n{report}\n")
    page = f'<meta charset="utf-8"><h1>{html.escape(title)}</h1>{report._repr_html_()}'
    out = folder if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page, encoding="utf-8")
        for name, ax in _pictures(report.load, [layers[-1] for layers in routings], ids):
            ax.figure.savefig(out / name, dpi=150)
    except ImportError as error:
        print(f"no pictures: {error}")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    print(f"written to {out}")


def byte_text(token_id: int) -> str:
    """A byte as the character it is in ASCII, else in hexadecimal: alone it is none in UTF-8."""
    return chr(token_id) if token_id < 128 else f"0x{token_id:02x}"


def _pictures(load: np.ndarray, last_layer: list, ids: np.ndarray) -> Iterator[tuple[str, Any]]:
    """`(file name, axes)` of all layers' load, and of the last layer's first tokens and pairs."""
    yield "load.png", _inspect.plot_load(load)
    shown = ids[0, 0, :_TOKENS_DRAWN]
    first = jax.tree.map(lambda a: a[0, : len(shown)] if a.ndim else a, last_layer[0])
    pictures = {"token_experts.png": _inspect.plot_token_experts(first, shown, decode=byte_text)}
    if first.indices.shape[-1] > 1:
        pictures["coactivation.png"] = _inspect.plot_coactivation(last_layer)
    for name, ax in pictures.items():
        ax.set_title(f"{ax.get_title()}, layer {len(load) - 1}")
        yield name, ax

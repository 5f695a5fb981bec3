"""What a run says while it works: rows of metrics.csv and lines on the terminal."""

import csv
import math
import pathlib
import time
from collections.abc import Callable, Iterable

from .checkpoint import Header
from .settings import Settings

_COLUMNS = ("step", "loss", "bits_per_byte", "skipped_steps")


class Metrics:
    """Records some steps. A loss is in nats per byte; MaxVio is that of one step's windows.

    The rows hold no times and are a part of the checkpoint, so that a resumed run repeats none.
    """

    def __init__(self, folder: pathlib.Path, header: Header, say: Callable[[str], None]):
        self._path, self._settings, self._say = folder / "metrics.csv", header.settings, say
        self._step, self._time, self.rows = header.step, time.perf_counter(), [*header.rows]

    def begin(self) -> None:
        """Write the names of the columns and the rows of the checkpoint."""
        layers = range(len(self._settings.layer_names()))
        names = [*_COLUMNS, *(f"max_violation_layer_{layer}" for layer in layers)]
        self._write("w", [names, *self.rows])

    def record(self, step: int, loss: float, skipped: int, violations: list[float]) -> None:
        """Add a row and say a line."""
        bits, now, steps = loss / math.log(2), time.perf_counter(), self._settings.steps
        self.rows.append([step, loss, bits, skipped, *violations])
        self._write("a", self.rows[-1:])
        tokens = (step - self._step) * self._settings.batch * self._settings.length
        self._say(
            f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.4f}  bits/byte {bits:.4f}"
            f"  tokens/s {tokens / (now - self._time):>7,.0f}"
            f"  MaxVio {format_layers(self._settings, violations)}"
            + (f"  skipped {skipped}" if skipped else "")
        )
        self._step, self._time = step, now

    def _write(self, mode: str, rows: list[list]) -> None:
        with open(self._path, mode, newline="") as file:
            csv.writer(file).writerows(rows)


def format_layers(settings: Settings, values: Iterable[float]) -> str:
    """One number per routed layer, hash layers marked; `-` for a dense model."""
    marks = ("(hash)" if "hash" in name else "" for name in settings.layer_names())
    return " ".join(f"{v:.2f}{mark}" for v, mark in zip(values, marks, strict=True)) or "-"


def with_progress_bar(steps: range) -> tuple[Iterable[int], Callable[[str], None]]:
    """`steps`, under a bar if tqdm is installed and somebody is watching, and how to print."""
    try:
        from tqdm import tqdm
    except ImportError:
        return steps, print
    counts = {"initial": steps.start - 1, "total": steps.stop - 1, "unit": "step"}
    return tqdm(steps, **counts, leave=False, disable=None), tqdm.write

"""What a run says while it works: a line on the terminal and a row in metrics.csv."""

import csv
import math
import os
import pathlib
import sys
import time

from .settings import Settings
from .step import StepMetrics

FILE_NAME = "metrics.csv"
_COLUMNS = ("step", "loss", "bits_per_byte", "tokens_per_second", "skipped_steps")


class Progress:
    """A context manager that records steps. Units: nats per byte, bits per byte, bytes per second.

    MaxVio on a line is of that step's windows alone, so it is noisier than the final report's.
    """

    def __init__(self, settings: Settings, folder: pathlib.Path, first_step: int):
        self._settings, self._path = settings, folder / FILE_NAME
        self._last_step, self._bar = first_step, None
        layers = range(len(settings.layer_names()))
        columns = [*_COLUMNS, *(f"max_violation_layer_{layer}" for layer in layers)]
        _rewrite(self._path, columns, _rows_until(self._path, first_step, len(columns)))

    def __enter__(self) -> "Progress":
        self._bar = _new_bar(self._settings.steps, self._last_step)
        self._last_time = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def is_due(self, step: int) -> bool:
        """Whether `step` gets a line: the first, the last and every `log_every`-th."""
        return step in (1, self._settings.steps) or step % self._settings.log_every == 0

    def record(self, step: int, metrics: StepMetrics) -> None:
        """Print and write `metrics`, waiting for the step to end."""
        loss, violations = float(metrics.loss), [float(v) for v in metrics.max_violation]
        skipped = int(metrics.skipped)
        now = time.perf_counter()
        tokens = (step - self._last_step) * self._settings.batch * self._settings.length
        speed = tokens / max(now - self._last_time, 1e-9)
        with open(self._path, "a", newline="") as file:
            bits = loss / math.log(2)
            csv.writer(file).writerow([step, loss, bits, round(speed), skipped, *violations])
        note = f"  skipped {skipped}" if skipped else ""
        self.say(self._line(step, loss, speed, violations) + note)
        if self._bar is not None:
            self._bar.update(step - self._last_step)
        self._last_step, self._last_time = step, now

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def _line(self, step: int, loss: float, speed: float, violations: list[float]) -> str:
        width = len(str(self._settings.steps))
        line = (
            f"step {step:>{width}}/{self._settings.steps}  loss {loss:.4f}"
            f"  bits/byte {loss / math.log(2):.4f}  tokens/s {speed:>7,.0f}"
        )
        return line + ("  MaxVio " + format_layers(self._settings, violations))


def format_layers(settings: Settings, values: list[float]) -> str:
    """One number per routed layer, hash layers marked; `-` for a dense model."""
    names = settings.layer_names()
    marked = (
        f"{value:.2f}" + ("(hash)" if "hash" in name else "")
        for name, value in zip(names, values, strict=True)
    )
    return " ".join(marked) or "-"


def read_history(folder: pathlib.Path) -> tuple[list[int], list[list[float]]]:
    """`(steps, MaxVio of each step and layer)` of all rows of metrics.csv."""
    with open(folder / FILE_NAME, newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [int(row[0]) for row in rows], [[float(v) for v in row[len(_COLUMNS) :]] for row in rows]


def _rows_until(path: pathlib.Path, step: int, num_columns: int) -> list[list[str]]:
    """Rows up to and including `step`: what came after the checkpoint is going to be repeated.

    A row with too few columns was cut off by a kill: its first number need not be a step.
    """
    if step == 0 or not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        whole = [row for row in csv.reader(file) if len(row) == num_columns and row[0].isdecimal()]
    return [row for row in whole if int(row[0]) <= step]


def _rewrite(path: pathlib.Path, columns: list[str], rows: list[list[str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    os.replace(temporary, path)


def _new_bar(total: int, initial: int):
    """A tqdm bar when somebody is watching and tqdm is installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=initial, unit="step", leave=False)

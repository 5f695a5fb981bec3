"""The training program: start or resume a run, stop it cleanly, report at its end."""

import contextlib
import os
import pathlib
import shlex
import signal
import time
from collections.abc import Generator
from typing import Any

from . import checkpoint
from .checkpoint import Header
from .corpus import Corpus, read_corpus, training_windows
from .devices import Devices, find_devices
from .metrics import Metrics, with_progress_bar
from .reports import validate, write_report
from .settings import Settings, UserError
from .step import State, initial_state, make_step


def train(
    settings: Settings,
    folder: pathlib.Path,
    *,
    expert_parallel: int | None = None,
    distributed: bool = False,
) -> int:
    """Train from the beginning and write checkpoint, metrics, report and picture to `folder`.

    The experts are spread over `expert_parallel` devices, and the batch over the rest of them.
    `distributed` is whether this is one of several processes. Returns the exit code of the
    command: 0, or 128 + number if SIGINT or SIGTERM stopped the run. Raises `UserError`.
    """
    corpus = read_corpus(settings.text, length=settings.length)
    # Before the processes meet: each of them looks, and none is left waiting.
    if os.path.lexists(folder / checkpoint.FILE_NAME):
        raise UserError(
            f"--out {folder} already holds a run: continue it with --resume or name another folder"
        )
    devices = find_devices(settings, expert_parallel, distributed)
    header = Header(settings, 0, corpus.sha256)
    return _run(folder, header, corpus, devices, initial_state(settings))


def resume(
    folder: pathlib.Path, *, expert_parallel: int | None = None, distributed: bool = False
) -> int:
    """Continue the run in `folder` exactly where its checkpoint stands.

    Arguments and result are those of `train`. Raises `UserError`, also if the text has changed.
    """
    header, state = checkpoint.load(folder, initial_state)
    corpus = checkpoint.read_same_corpus(header)
    devices = find_devices(header.settings, expert_parallel, distributed)
    devices.write(print, f"resuming {folder} after step {header.step}")
    return _run(folder, header, corpus, devices, state)


def _run(
    folder: pathlib.Path, header: Header, corpus: Corpus, devices: Devices, state: State
) -> int:
    settings, begin = header.settings, time.perf_counter()
    command = f"python -m braidax train --resume {shlex.quote(str(folder))}"
    steps, say = with_progress_bar(range(header.step + 1, settings.steps + 1))
    metrics, step = Metrics(folder, header, say), make_step(settings)
    devices.write(print, corpus.describe())
    try:
        if header.step == 0:  # A run that is killed while it compiles can be resumed.
            devices.write(checkpoint.save, folder, header, state)
        devices.write(metrics.begin)
        state = devices.place(state)
        with _stop_signals() as signals:
            for done in steps:
                windows = training_windows(
                    corpus.training,
                    batch=settings.batch,
                    length=settings.length,
                    seed=settings.seed,
                    step=done,
                )
                state, loss, violations = step(devices.spread(windows), state)
                if done in (1, settings.steps) or done % settings.log_every == 0:
                    loss, skipped, violations = devices.on_host((loss, state.skipped, violations))
                    record = (done, float(loss), int(skipped), violations.tolist())
                    devices.write(metrics.record, *record)
                stop = devices.largest(signals[0] if signals else 0)
                if stop or done == settings.steps or done % settings.checkpoint_every == 0:
                    header = Header(settings, done, corpus.sha256, metrics.rows)
                    devices.write(checkpoint.save, folder, header, devices.on_host(state))
                if stop:
                    devices.write(say, f"stopped after step {done}; continue with: {command}")
                    return 128 + stop
        report = validate(settings, corpus, devices, state)
        devices.write(write_report, folder, settings, report, metrics.rows)
    except OSError as error:
        whole = f"; its last checkpoint is whole: once the folder takes writes, run {command}"
        hint = whole if (folder / checkpoint.FILE_NAME).is_file() else ""
        raise UserError(f"cannot write to {folder}: {error.strerror}{hint}") from error
    seconds = time.perf_counter() - begin
    devices.write(print, f"{seconds:.0f} s; checkpoint, metrics and report in {folder}")
    return 0


@contextlib.contextmanager
def _stop_signals() -> Generator[list[int], None, None]:
    """A list to which SIGINT or SIGTERM adds its number; a second one stops the process at once."""
    caught: list[int] = []
    with contextlib.ExitStack() as before:

        def stop(number: int, frame: Any) -> None:
            caught.append(number)
            before.close()

        for number in (signal.SIGINT, signal.SIGTERM):
            before.callback(signal.signal, number, signal.signal(number, stop))
        yield caught

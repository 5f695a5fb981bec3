"""The training program: start or resume a run, stop it cleanly, report at its end."""

import os
import pathlib
import shlex
import time

import numpy as np
import optax
from jaxtyping import Int

from . import checkpoint
from .checkpoint import CheckpointError, Header
from .corpus import Corpus, check_length, read_corpus
from .devices import Devices, find_devices
from .interrupt import StopRequest
from .memory import check_memory, memory_errors_named
from .progress import Progress
from .report import draw_balance, write_report
from .settings import Settings
from .step import State, initial_state, make_optimizer, make_step
from .windows import training_windows


def start(
    settings: Settings,
    folder: pathlib.Path,
    *,
    expert_parallel: int | None = None,
    distributed: bool = False,
) -> int:
    """Train from the beginning and return the exit code.

    Raises `UserError`, most often one of its kinds `CorpusError` and `CheckpointError`.
    """
    if not distributed:  # What one of several machines holds is not known here.
        check_memory(settings)
    corpus = read_corpus(settings.text)
    check_length(corpus, settings.length)
    # Before the processes meet: each of them looks, and none is left waiting.
    if os.path.lexists(folder / checkpoint.FILE_NAME):
        raise CheckpointError(
            f"--out {folder} already holds a run: continue it with --resume or name another folder"
        )
    devices = find_devices(settings, expert_parallel, distributed)
    with devices.only_one_writes(folder) as folder:
        return _start(folder, settings, corpus, devices)


def _start(folder: pathlib.Path, settings: Settings, corpus: Corpus, devices: Devices) -> int:
    optimizer = make_optimizer(settings)
    with memory_errors_named():
        state = initial_state(settings, optimizer)
    # Saved before the first step too: a run killed while it compiles can be resumed.
    try:
        with devices.failing_together():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder, Header(settings, 0, corpus.sha256), state)
    except OSError as error:
        raise CheckpointError(f"cannot write to --out {folder}: {error.strerror}") from error
    return _train(folder, settings, corpus, optimizer, devices, state, first_step=0)


def resume(
    folder: pathlib.Path, *, expert_parallel: int | None = None, distributed: bool = False
) -> int:
    """Continue the run in `folder` from its checkpoint, exactly, and return the exit code.

    Raises `CorpusError` or `CheckpointError`, the latter also when the text has changed.
    """
    header = checkpoint.read_header(folder)
    if not distributed:
        check_memory(header.settings)
    corpus = checkpoint.read_same_corpus(header)
    devices = find_devices(header.settings, expert_parallel, distributed)
    optimizer = make_optimizer(header.settings)
    with memory_errors_named():
        like = initial_state(header.settings, optimizer)
    state = checkpoint.load_state(folder, like)
    with devices.only_one_writes(folder) as folder:
        print(f"resuming {folder} after step {header.step}", flush=True)
        return _train(
            folder, header.settings, corpus, optimizer, devices, state, first_step=header.step
        )


def _train(
    folder: pathlib.Path,
    settings: Settings,
    corpus: Corpus,
    optimizer: optax.GradientTransformation,
    devices: Devices,
    state: State,
    *,
    first_step: int,
) -> int:
    saved_step = first_step
    begin = time.perf_counter()
    print(corpus.describe(), flush=True)
    step, state = make_step(settings, optimizer), devices.place(state)
    try:
        with devices.failing_together():
            progress = Progress(settings, folder, first_step)
        with progress, StopRequest() as request:
            for done in range(first_step + 1, settings.steps + 1):
                with memory_errors_named():
                    windows = devices.spread(_windows(corpus, settings, done))
                    state, metrics = step(windows, state)
                if progress.is_due(done):
                    metrics = devices.on_host(metrics)
                    with devices.failing_together():
                        progress.record(done, metrics)
                stop = devices.agreed(request.signal_number)
                if stop or done == settings.steps or done % settings.checkpoint_every == 0:
                    header = Header(settings, done, corpus.sha256)
                    whole = devices.on_host(state)
                    with devices.failing_together():
                        checkpoint.save(folder, header, whole)
                    saved_step = done
                if stop:
                    progress.say(f"stopped after step {done}; continue with: {_command(folder)}")
                    return 128 + stop
        with devices.failing_together():
            print(write_report(folder, settings, corpus, devices, state), flush=True)
            print(draw_balance(folder, settings))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder}: {error.strerror}; its checkpoint of step {saved_step} is"
            f" whole: once the folder takes writes, continue with: {_command(folder)}"
        ) from error
    print(f"{time.perf_counter() - begin:.0f} s; checkpoint, metrics and report in {folder}")
    return 0


def _windows(corpus: Corpus, settings: Settings, step: int) -> Int[np.ndarray, "batch _"]:
    return training_windows(
        corpus.training,
        batch=settings.batch,
        length=settings.length,
        seed=settings.seed,
        step=step,
    )


def _command(folder: pathlib.Path) -> str:
    return f"python -m braidax train --resume {shlex.quote(str(folder))}"

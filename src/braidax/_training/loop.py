"""The training program: start or resume a run, stop it cleanly, report at its end."""

import pathlib
import shlex
import time

import optax

from . import checkpoint
from .checkpoint import CheckpointError, Header
from .corpus import Corpus, check_length, read_corpus
from .interrupt import StopRequest
from .progress import Progress
from .report import draw_balance, write_report
from .settings import Settings
from .step import State, initial_state, make_optimizer, make_step
from .windows import training_windows


def start(settings: Settings, folder: pathlib.Path) -> int:
    """Train from the beginning and return the exit code.

    Raises `CorpusError` or `CheckpointError`, both `UserError`s.
    """
    corpus = read_corpus(settings.text)
    check_length(corpus, settings.length)
    if (folder / checkpoint.FILE_NAME).exists():
        raise CheckpointError(
            f"--out {folder} already holds a run: continue it with --resume or name another folder"
        )
    optimizer = make_optimizer(settings)
    state = initial_state(settings, optimizer)
    # Saved before the first step too: a run killed while it compiles can be resumed.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(folder, Header(settings, 0, corpus.sha256), state)
    except OSError as error:
        raise CheckpointError(f"cannot write to --out {folder}: {error.strerror}") from error
    return _train(folder, settings, corpus, optimizer, state, first_step=0)


def resume(folder: pathlib.Path) -> int:
    """Continue the run in `folder` from its checkpoint, exactly, and return the exit code.

    Raises `CorpusError` or `CheckpointError`, the latter also when the text has changed.
    """
    header = checkpoint.read_header(folder)
    corpus = read_corpus(header.settings.text)
    check_length(corpus, header.settings.length)
    if corpus.sha256 != header.corpus_sha256:
        raise CheckpointError(
            f"{corpus.source} has changed: sha256 {corpus.sha256}, the checkpoint was trained on"
            f" {header.corpus_sha256}"
        )
    optimizer = make_optimizer(header.settings)
    state = checkpoint.load_state(folder, initial_state(header.settings, optimizer))
    print(f"resuming {folder} after step {header.step}", flush=True)
    return _train(folder, header.settings, corpus, optimizer, state, first_step=header.step)


def _train(
    folder: pathlib.Path,
    settings: Settings,
    corpus: Corpus,
    optimizer: optax.GradientTransformation,
    state: State,
    *,
    first_step: int,
) -> int:
    begin = time.perf_counter()
    print(corpus.describe(), flush=True)
    step = make_step(settings, optimizer)
    with Progress(settings, folder, first_step) as progress, StopRequest() as request:
        for done in range(first_step + 1, settings.steps + 1):
            windows = training_windows(
                corpus.training,
                batch=settings.batch,
                length=settings.length,
                seed=settings.seed,
                step=done,
            )
            state, metrics = step(windows, state)
            if progress.is_due(done):
                progress.record(done, metrics)
            stop = request.signal_number
            if stop or done == settings.steps or done % settings.checkpoint_every == 0:
                checkpoint.save(folder, Header(settings, done, corpus.sha256), state)
            if stop:
                command = f"python -m braidax train --resume {shlex.quote(str(folder))}"
                progress.say(f"stopped after step {done}; continue with: {command}")
                return 128 + stop
    print(write_report(folder, settings, corpus, state.model), flush=True)
    print(draw_balance(folder, settings))
    print(f"{time.perf_counter() - begin:.0f} s; checkpoint, metrics and report in {folder}")
    return 0

"""Settings, text and compiled steps that the tests of training share."""

import dataclasses
import functools

from braidax.training import Settings, loop, make_step

SIZES = {"hidden": 16, "layers": 2, "heads": 2, "experts": 4, "intermediate": 8}
SIZES |= {"batch": 4, "length": 16, "eval_windows": 8}
TINY = Settings(steps=300, learning_rate=0.01, log_every=10, checkpoint_every=20, **SIZES)
SENTENCE = b"routers choose, experts compute, sums return.\n\n\n"
_NOT_COMPILED = {"text": None, "log_every": 1, "checkpoint_every": 1, "eval_windows": 1}


@functools.cache
def _compiled(settings):
    return make_step(settings)


def compiled_step(settings):
    """`make_step(settings)`, compiled once for all texts."""
    return _compiled(dataclasses.replace(settings, **_NOT_COMPILED))


def share_compiled_steps(monkeypatch):
    """Let `train` and `resume` use `compiled_step`."""
    monkeypatch.setattr(loop, "make_step", compiled_step)

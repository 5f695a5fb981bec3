"""Options that ask for more memory than there is: one line instead of a crash."""

import contextlib
import os
from collections.abc import Generator

import jax

from .settings import VOCAB_SIZE, Settings, UserError

_HINT = "lower --batch, --length, --hidden, --layers, --experts or --intermediate"


def least_bytes(settings: Settings) -> int:
    """A lower bound of the bytes in use during a step, all of them float32.

    Weights, gradients and AdamW's two moments; logits and their gradients.
    """
    hidden = settings.hidden
    if settings.dense:
        feed_forward = 3 * hidden * settings.dense_width()
    else:
        blocks = settings.experts + settings.shared_experts
        feed_forward = 3 * hidden * settings.intermediate * blocks + settings.experts * hidden
    per_layer = 4 * hidden * hidden + feed_forward
    parameters = settings.layers * per_layer + 2 * VOCAB_SIZE * hidden
    return 4 * (4 * parameters + 2 * settings.batch * settings.length * VOCAB_SIZE)


def check_memory(settings: Settings) -> None:
    """Raise `UserError` where the run cannot fit: the system would slow down long before it ends.

    Systems that do not tell how much memory they have are not asked.
    """
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    needed = least_bytes(settings)
    if needed > available > 0:
        gib = 2**30
        raise UserError(
            f"this run needs at least {needed / gib:,.0f} GiB of memory, the machine has"
            f" {available / gib:,.0f}: {_HINT}"
        )


@contextlib.contextmanager
def memory_errors_named() -> Generator[None, None, None]:
    """A model or batch too big for the device is a mistake in the options too."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the model or the batch does not fit in memory: {_HINT}") from error

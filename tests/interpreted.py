"""Kernels for a GPU, run on a CPU: jax interprets Pallas Mosaic GPU, memories and threads included.

The interpreter is stricter than a GPU. Memory that nobody wrote holds NaN, a read out of bounds
raises an error, and races are found.
"""

import contextlib
import importlib

import pytest
from jax.experimental.pallas import mosaic_gpu

# Public from jax 0.12 on.
PUBLIC = hasattr(mosaic_gpu, "force_gpu_interpret_mode")
INTERPRET = "jax._src.pallas.mosaic_gpu.interpret"
PARAMETERS = mosaic_gpu if PUBLIC else importlib.import_module(f"{INTERPRET}.params")
CALLBACKS = importlib.import_module(f"{INTERPRET}.gpu_callbacks")


@contextlib.contextmanager
def interpreted():
    """Kernels that are traced inside are interpreted, and must be free of races. Their results have
    to be read inside, too."""
    parameters = PARAMETERS.InterpretGPUParams(detect_races=True)
    try:
        with transposing(), PARAMETERS.force_gpu_interpret_mode(parameters):
            yield
        assert not CALLBACKS.get_races().races_found
    finally:
        # After an exception no other call of the process would work without it.
        CALLBACKS.reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def transposing():
    """Before 0.12 the interpreter has no transposed operands of the tensor cores: here they are."""
    if PUBLIC:
        yield
        return
    utils, memory = CALLBACKS.interpret_utils, CALLBACKS.memory.GPUSharedMemory
    to_range, content = utils.to_range, memory.get_buffer_content

    class Transposed(tuple):
        """A range of a buffer that is read transposed."""

    def to_range_or_transposed(transforms):
        if transforms and hasattr(transforms[-1], "permutation"):
            return Transposed(to_range(transforms[:-1]))
        return to_range(transforms)

    def content_or_transposed(self, key, range_, *arguments, **options):
        array, *rest = content(self, key, tuple(range_), *arguments, **options)
        return array.T if isinstance(range_, Transposed) else array, *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "to_range", to_range_or_transposed)
        patch.setattr(memory, "get_buffer_content", content_or_transposed)
        yield

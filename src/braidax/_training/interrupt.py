"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
from types import FrameType


class StopRequest:
    """A context manager: `signal_number` is None until one of the two signals arrives.

    The first signal only leaves a note and restores the previous handlers, so that a second one
    stops the process at once.
    """

    signal_number: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_number = signal_number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

"""Ctrl-C and SIGTERM ask the loop to stop at the next step; a second Ctrl-C stops at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None


def received() -> int | None:
    """The signal that asked to stop, if one did."""
    return _received


@contextmanager
def graceful_stop(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yields the question "was a stop asked for?"; handlers are restored afterwards."""

    def ask(number: int, frame: FrameType | None) -> None:
        global _received
        if _received is not None:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is whole")
        _received = number
        say("Stopping after this step and writing a checkpoint (again: stop at once).")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: _received is not None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Ctrl-C and SIGTERM. While nothing is lost by it they stop a command at once; during training they ask the loop to stop at the next step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_forget.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def interruptible() -> Iterator[None]:
    """A signal raises `Interrupted` wherever the command is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("interrupted", signal=number)

    with _handled_by(stop):
        yield


class StopRequest:
    """Whether a stop was asked for, and by which signal; a process whose supervisor has died counts as terminated."""

    def __init__(self, say: Callable[[str], None], supervisor: int | None) -> None:
        self.signal: int | None = None
        self._say = say
        self._supervisor = supervisor

    def __call__(self) -> int | None:
        if self.signal is None and self._supervisor is not None and os.getppid() != self._supervisor:
            self.signal = signal.SIGTERM
        return self.signal

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted("stopped at once; the last checkpoint is whole", signal=number)
        self.signal = number
        self._say("Stopping after this step and writing a checkpoint (again: stop at once).")


@contextmanager
def graceful_stop(say: Callable[[str], None], *, supervisor: int | None = None) -> Iterator[StopRequest]:
    """The first signal, or the end of the supervising parent process, asks for a stop; a second signal stops at once."""
    request = StopRequest(say, supervisor)
    with _handled_by(request.handle):
        yield request


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)

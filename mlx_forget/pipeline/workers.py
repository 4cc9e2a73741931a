"""Work shared out to processes, with the answers in the order of the questions, in a bounded memory.

Workers are children of our own that read and write frames of bytes. Unlike a multiprocessing pool they fork no process that may hold
threads (PyTorch, MLX), need no guard in the caller's main module, exchange no pickles, and end when the parent does, however it ends:
their input is closed.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import IO, final

from mlx_forget.errors import RunFailed, UserError

# Questions that wait or are worked on, per worker: one more than is needed to keep it busy.
_IN_FLIGHT = 2
# How an answer begins, and how the sentence of a UserError does.
_ANSWERED, _REFUSED = b"+", b"-"


def ordered_map(questions: Iterable[bytes], entry: str, *, num_workers: int, setup: bytes = b"") -> Iterator[bytes]:
    """The answer to each question, in their order.

    Args:
        questions: read as the answers are taken, at most two per worker ahead.
        entry: `module:function` that each worker calls with `setup`; it returns the function from question to answer.
        num_workers: at least 1.

    Raises:
        RunFailed: a worker died.
        UserError: what the function raised as one.
    """
    workers = [_Worker(entry, setup) for _ in range(num_workers)]
    try:
        pending: deque[_Worker] = deque()
        free = deque(workers * _IN_FLIGHT)
        for question in questions:
            if not free:
                yield _take(pending, free)
            worker = free.popleft()
            worker.ask(question)
            pending.append(worker)
        while pending:
            yield _take(pending, free)
    finally:
        for worker in workers:
            worker.close()


def _take(pending: "deque[_Worker]", free: "deque[_Worker]") -> bytes:
    worker = pending.popleft()
    answer = worker.answer()
    free.append(worker)
    return answer


@final
class _Worker:
    def __init__(self, entry: str, setup: bytes) -> None:
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}
        command = "from mlx_forget.pipeline.workers import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        # A thread writes: with a full pipe, whoever writes waits for the worker, which may wait for its answer to be read.
        self._questions: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()
        self.ask(entry.encode())
        self.ask(setup)

    def ask(self, question: bytes) -> None:
        self._questions.put(question)

    def answer(self) -> bytes:
        assert self._process.stdout is not None
        frame = read_frame(self._process.stdout)
        if frame is None:
            raise RunFailed(
                "A worker process died; was there too little memory? The same command goes on from the last whole shard."
            )
        if frame[:1] == _REFUSED:
            raise UserError(frame[1:].decode())
        return frame[1:]

    def close(self) -> None:
        self._process.kill()
        self._questions.put(None)
        self._thread.join()
        self._process.communicate()

    def _feed(self) -> None:
        assert self._process.stdin is not None
        try:
            while (question := self._questions.get()) is not None:
                write_frame(self._process.stdin, question)
        except OSError:
            # The parent sees the missing answer.
            pass


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Eight bytes of length, then the content."""
    stream.write(len(content).to_bytes(8, "little"))
    stream.write(content)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """What `write_frame` wrote; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    content = stream.read(size)
    return content if len(content) == size else None


def serve() -> None:
    """The life of a worker: answer until the input ends. Ctrl-C is the parent's business."""
    from importlib import import_module

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    # What a library prints must not get between the frames.
    sys.stdout = sys.stderr
    entry, setup = read_frame(questions), read_frame(questions)
    if entry is None or setup is None:
        return
    module, _, name = entry.decode().partition(":")
    work: Callable[[bytes], bytes] = getattr(import_module(module), name)(setup)
    while (question := read_frame(questions)) is not None:
        try:
            answer = _ANSWERED + work(question)
        except UserError as error:
            answer = _REFUSED + str(error).encode()
        write_frame(answers, answer)

"""Source files read by several processes at a time, with the same result for every number of them.

The workers are children of our own that talk pickle over their pipes. Unlike a multiprocessing pool they fork
no process that may hold threads (PyTorch, MLX) and need no guard in the caller's main module, and they end
when the parent does, however it ends: their input is closed.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

from mlx_forget.errors import RunFailed
from mlx_forget.pipeline.passages import Harvest, SourceFile, read_file

_MAX_WORKERS = 8
_BATCH_BYTES = 400_000
# Below this, starting children costs more than they save.
_MIN_BYTES_FOR_WORKERS = 6_000_000


def harvest(
    files: Sequence[SourceFile],
    *,
    code_share: float,
    num_workers: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Harvest]:
    """The harvest of every file, in their order.

    Args:
        files: what to read.
        code_share: the share of Python files whose code is kept.
        num_workers: None is one per core, at most 8; 0 (and None for little work) reads in this process.
        progress: called with the share of bytes done, from one thread at a time.

    Raises:
        RunFailed: a worker died.
    """
    total = max(sum(file.num_bytes for file in files), 1)
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, _MAX_WORKERS) if total >= _MIN_BYTES_FOR_WORKERS else 0
    results: list[Harvest] = [Harvest()] * len(files)
    todo: SimpleQueue[list[int]] = SimpleQueue()
    done: SimpleQueue[tuple[list[int], list[Harvest]] | None] = SimpleQueue()
    batches = _batches(files)
    for batch in batches:
        todo.put(batch)

    def work_here() -> None:
        while not todo.empty():
            batch = todo.get()
            done.put((batch, [read_file(files[i], code_share=code_share) for i in batch]))
            collect()

    def feed(worker: "subprocess.Popen[bytes]") -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            while True:
                batch = todo.get_nowait()
                pickle.dump(([files[i] for i in batch], code_share), worker.stdin)
                worker.stdin.flush()
                done.put((batch, pickle.load(worker.stdout)))
        except Empty:
            pass
        except (EOFError, OSError, pickle.UnpicklingError):
            # The parent sees the missing batches.
            done.put(None)

    num_bytes_done = 0

    def collect() -> None:
        nonlocal num_bytes_done
        answer = done.get()
        if answer is None:
            raise RunFailed("A process that reads source files died; was there too little memory?")
        for i, found in zip(*answer, strict=True):
            results[i] = found
            num_bytes_done += files[i].num_bytes
        if progress:
            progress(num_bytes_done / total)

    if num_workers == 0:
        work_here()
        return results
    workers = [_start_worker() for _ in range(min(num_workers, len(batches)))]
    try:
        with ThreadPoolExecutor(max(len(workers), 1)) as pool:
            try:
                for worker in workers:
                    pool.submit(feed, worker)
                for _ in batches:
                    collect()
            finally:
                # Before the pool waits for its threads, which wait for the workers.
                for worker in workers:
                    worker.kill()
    finally:
        for worker in workers:
            worker.communicate()
    return results


def _batches(files: Sequence[SourceFile]) -> list[list[int]]:
    """Files in batches of some 400 KB, the largest files first so that none is left for the end."""
    batches: list[list[int]] = []
    size = _BATCH_BYTES
    for i in sorted(range(len(files)), key=lambda i: -files[i].num_bytes):
        if size >= _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += files[i].num_bytes
    return batches


def _start_worker() -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from mlx_forget.pipeline.harvest import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def serve() -> None:
    """The life of a worker: answer batches until the input ends. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = sys.stdout.buffer
    while True:
        try:
            files, code_share = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump([read_file(file, code_share=code_share) for file in files], answers)
        answers.flush()

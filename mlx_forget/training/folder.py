"""The folder of a run: made, held by one run at a time, and gone again where nothing was begun in it."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlx_forget.distributed import Group
from mlx_forget.durable_files import is_at, make_folder, remove_empty
from mlx_forget.errors import UserError

_LOCK = ".lock"


@contextmanager
def only_group(group: Group, folder: Path, *, wait: bool) -> Iterator[None]:
    """Make a run folder and hold it for the processes of a group: rank 0 has the lock, and the others know that it has.

    A folder that holds nothing else afterwards is removed: the run was refused before it began.
    """
    with ExitStack() as held:
        with group.rank_zero_first():
            if group.rank == 0:
                held.enter_context(_only_process(folder, wait=wait))
        yield


def is_held(folder: Path) -> bool:
    """Whether a process is training in a run folder."""
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _only_process(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a run folder for this process; the lock goes with the process, however it ends."""
    path = folder / _LOCK
    made: list[Path] = []
    while True:
        made += make_folder(folder)
        try:
            file = path.open("w")
        except FileNotFoundError:
            # Another process has just removed the folder again.
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(f"Another process is training in {folder}: wait for it, or choose another --output.") from None
            if not is_at(path, file):
                continue
            try:
                yield
            finally:
                _remove_unused(folder, made)
            return


def _remove_unused(folder: Path, made: list[Path]) -> None:
    """Remove the lock of a run that left nothing behind, and the folders that were made for it."""
    # A folder that is no longer there, or that others have come to use, is nobody's worry.
    with suppress(OSError):
        if all(entry.name == _LOCK for entry in folder.iterdir()):
            (folder / _LOCK).unlink()
            remove_empty(made)

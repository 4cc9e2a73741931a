"""Faults at named points of a process: every opening for writing, rename, removal, folder and fsync below one folder.

The points are what Python's audit events and `os.fsync` say, so no code under test knows of them. At a point the process is

    kill    killed; what it has written so far stays
    cut     killed as by a power cut: every file that was written and not synced since is torn in half
    full    told that the disk is full, at this point and at every later one that would take space
"""

import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Audit events that change a folder, and the place of the path among their arguments.
_CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 1}
_TAKES_SPACE = ("open", "os.mkdir", "os.rename", "os.link", "fsync")


class Faults:
    """Counts the points below a folder, and fails at one of them.

    Args:
        folder: what is watched.
        at: the point to fail at, from 1; None counts only.
        kind: how.
    """

    def __init__(self, folder: Path, *, at: int | None = None, kind: str = "kill") -> None:
        self.folder = str(folder)
        self.at, self.kind = at, kind
        self.points: list[str] = []
        self._busy = False
        self._synced: dict[int, int] = {}
        self._before = {path.stat().st_ino: path.stat().st_mtime_ns for path in _files(folder)}
        self._fsync = os.fsync

    def install(self) -> None:
        """From now on, for the life of this process."""
        sys.addaudithook(self._hear)

        def fsync(file: int) -> None:
            path = os.readlink(f"/proc/self/fd/{file}")
            self._reach("fsync", path)
            self._fsync(file)
            if path.startswith(self.folder) and os.path.isfile(path):
                found = os.stat(path)
                self._synced[found.st_ino] = found.st_mtime_ns

        os.fsync = fsync

    def _hear(self, event: str, arguments: tuple) -> None:
        if self._busy:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            self._reach(event, arguments[0])
        elif event in _CHANGES:
            self._reach(event, arguments[_CHANGES[event]])

    def _reach(self, event: str, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or self._busy:
            return
        name = os.fspath(path)
        name = os.path.abspath(name.decode() if isinstance(name, bytes) else name)
        if not name.startswith(self.folder):
            return
        self.points.append(f"{event} {os.path.relpath(name, self.folder)}")
        if self.at is None or len(self.points) < self.at:
            return
        if self.kind == "full":
            if event in _TAKES_SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        elif len(self.points) == self.at:
            if self.kind == "cut":
                self._tear()
            os.kill(os.getpid(), signal.SIGKILL)

    def _tear(self) -> None:
        """What a power cut may leave of files that were not synced."""
        self._busy = True
        for path in _files(Path(self.folder)):
            found = path.stat()
            whole = self._synced.get(found.st_ino) == found.st_mtime_ns or self._before.get(found.st_ino) == found.st_mtime_ns
            if not whole:
                os.truncate(path, found.st_size // 2)


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return []

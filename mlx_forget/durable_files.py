"""Files that are whole or absent, on the disk when they are said to be, and that show it when a bit of them has changed."""

import errno
import fcntl
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlx_forget.errors import UserError

SEAL = "checksum"


def make_folder(folder: Path) -> list[Path]:
    """Make a folder that is to be written to, before the work starts; returns what had to be made, outermost first.

    Raises:
        UserError: it cannot be written.
    """
    made = [place for place in (*reversed(folder.parents), folder) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write to {folder}: no permission.")
    return made


def remove_empty(made: list[Path]) -> None:
    """Remove folders that were made, innermost first, as far as nobody has come to use them."""
    with suppress(OSError):
        for place in reversed(made):
            place.rmdir()


@contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Make a folder for what is written in the context; left with an error and nothing written, it is gone again.

    Raises:
        UserError: it cannot be written.
    """
    made = make_folder(folder)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, aside first: a reader sees all of the old one or all of the new one, even after a power cut.

    What fails half-way leaves the old one, and nothing beside it. For files that one process writes.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock file for this process, waiting for another; the lock goes with the process.

    It is a file that is written to: what network file systems lock between machines.

    Raises:
        OSError: it cannot be made or locked.
    """
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_at(path: Path, file: IO[Any]) -> bool:
    """Whether an open file is still the one at a path: who held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it cannot be read, or is no ordinary file (which might never end).
        ValueError: it is no JSON, none that is an object, nested too deeply to be read, or with text that cannot be written again.
    """
    content = read_bytes(path)
    try:
        found = json.loads(content.decode("utf-8"))
        if b"\\u" in content:
            # Halves of a character can be escaped, but neither printed nor tokenised.
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON, or nested too deeply: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise ValueError("it is not one JSON object")
    return found


def read_bytes(path: Path) -> bytes:
    """All of a file.

    Raises:
        OSError: it cannot be read, or is no ordinary file (which might never end).
    """
    with _ordinary(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """The checksum of a file.

    Raises:
        OSError: it cannot be read, or is no ordinary file (which might never end).
    """
    with _ordinary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ordinary(path: Path) -> io.BufferedReader:
    # Opening a pipe that nobody writes to would wait for ever.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
    return file


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as one more key."""
    return {**content, SEAL: _checksum(content)}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is what was sealed; one that never was counts as whole, but not one whose seal has lost its name."""
    if SEAL not in content:
        return not any(len(key) == len(SEAL) and sum(map(str.__ne__, key, SEAL)) == 1 for key in map(str, content))
    return bool(content[SEAL] == _checksum({key: value for key, value in content.items() if key != SEAL}))


def _checksum(content: Mapping[str, Any]) -> str:
    # As it will be read: tuples are lists then, and all keys strings.
    read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

"""Arrays in NumPy's .npy form, read with care: no pickle, and a header that asks for more than there is gets nothing."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt


def map_array(path: Path) -> npt.NDArray[Any]:
    """The array of a file, memory-mapped.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or is not whole.
    """
    with _one_error():
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found


def array_of(content: bytes) -> npt.NDArray[Any]:
    """The array of a file's bytes, read-only, which it shares.

    Raises:
        ValueError: they are no such file, or not all of it.
    """
    with _one_error():
        stream = io.BytesIO(content)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read_header(stream)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
            raise ValueError("its header does not match its content")
        return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if by_column else "C")


@contextmanager
def _one_error() -> Iterator[None]:
    """Whatever NumPy says to a header that is none, as one kind of error."""
    try:
        yield
    except (EOFError, SyntaxError, TokenError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no array of NumPy ({type(error).__name__})") from None

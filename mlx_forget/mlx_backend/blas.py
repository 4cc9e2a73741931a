"""What MLX's CPU build on Linux lacks: a fast BLAS, and an allocator that keeps its pages.

The wheel links the reference BLAS (4 GFLOP/s measured where a tuned one does 60). Symbols resolve in load order, so a tuned library that is
loaded globally before `mlx.core` is the one that MLX calls. PyTorch's CPU library carries one; it is loaded as a plain library, without
importing torch. A library is asked for one thread, because MLX is given threads as streams instead: a threaded product of
small matrices waits at barriers (measured on two busy cores: 2,000 ms for attention that one thread does in 15).

glibc returns every large buffer to the system and clears its pages anew at the next operation; kept pages made elementwise operators
six times as fast.
"""

import ctypes
import ctypes.util
import glob
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_THREAD_VARIABLES = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_PRODUCT = "sgemm_"
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MAX_INT = 2**31 - 1


def prepare() -> str:
    """Load a tuned BLAS before MLX and keep freed pages; returns the sentence that announces what was done, empty off Linux.

    Once per process, and of no effect where `mlx.core` is loaded already: the sentence says so.
    """
    if sys.platform != "linux":
        return ""
    if "mlx.core" in sys.modules:
        return (
            "MLX was imported before mlx_forget, so its products run on the reference BLAS, about ten times slower: "
            "import mlx_forget.mlx_backend first."
        )
    _keep_pages()
    for path in _candidates():
        if _load(path):
            return f"MLX's products on the CPU use the BLAS of {path}."
    return (
        "No tuned BLAS is found, so MLX's products run on the reference BLAS, about ten times slower: "
        "install PyTorch or the system's OpenBLAS (libopenblas0)."
    )


def _candidates() -> Iterator[str]:
    """Libraries that may carry a tuned BLAS under the standard names, best first."""
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        folder = Path(torch.origin).parent
        yield from (str(path) for path in (folder / "lib" / "libtorch_cpu.so",) if path.is_file())
        yield from sorted(glob.glob(str(folder.parent / "torch.libs" / "libopenblas*.so*")))
    openblas = ctypes.util.find_library("openblas")
    if openblas is not None:
        yield openblas
    for package in ("scipy", "numpy"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield from sorted(glob.glob(str(Path(spec.origin).parent.parent / f"{package}.libs" / "*openblas*.so*")))


def _load(path: str) -> bool:
    """Load a library globally if it exports the standard product, with one thread unless the user chose a number."""
    chosen = any(name in os.environ for name in _THREAD_VARIABLES)
    asked = () if chosen else _THREAD_VARIABLES[:2]
    os.environ.update(dict.fromkeys(asked, "1"))
    try:
        if not hasattr(ctypes.CDLL(path), _PRODUCT):
            return False
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        # OpenBLAS reads its variable when it is loaded, MKL at the first call: later child processes must not see either.
        if hasattr(library, "mkl_get_max_threads"):
            library.mkl_get_max_threads()
    except OSError:
        return False
    finally:
        for name in asked:
            del os.environ[name]
    return True


def _keep_pages() -> None:
    """Tell glibc to keep freed memory, in one arena; other C libraries are left alone."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MAX_INT)):
            library.mallopt(option, value)

"""The MLX backend: Apple silicon first, and any Linux CPU.

Importing it loads a tuned BLAS on Linux (see `blas.py`), then MLX.

Raises:
    UserError: MLX is not installed, has no backend library, or is too old.
"""

import importlib.util
from importlib.metadata import version

from mlx_forget.errors import UserError
from mlx_forget.mlx_backend import blas

# 0.29.0 and 0.29.1 compile no step that leaves a term out, 0.29.2 crashes in one; those between were not tried whole.
OLDEST_MLX = (0, 32)

if importlib.util.find_spec("mlx") is None:
    raise UserError("Backend 'mlx' needs MLX, which is not installed: pip install 'mlx-forget[mlx]'.")

BLAS_NOTE = blas.prepare()

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise UserError(f"MLX is installed without a library to run on ({error}): on Linux, pip install 'mlx[cpu]'.") from None

if tuple(int(part) for part in version("mlx").split(".")[:3] if part.isdigit()) < OLDEST_MLX:
    oldest = ".".join(map(str, OLDEST_MLX))
    raise UserError(f"MLX {version('mlx')} is too old, this needs {oldest} or newer: pip install -U 'mlx[cpu]' (on a Mac: mlx).")

"""Let the CPU build compile its fused loops before anything trains, one process at a time.

MLX writes each loop as a library into a temporary folder that all processes share, and takes a library that is there as whole. Two
processes that meet a new loop together (ranks of a run, two runs of a sweep) could load half a file; behind a lock they cannot. The first
trainer on a machine waits for the compiler here, about ten seconds; later ones some milliseconds.
"""

import errno
import fcntl
import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, initial_weights
from mlx_forget.mlx_backend import architectures, optimizer
from mlx_forget.mlx_backend.operators import operators
from mlx_forget.trainer import OptimSpec

# Small, with more than one of everything, so that its loops are those of every model.
_SPEC = ModelSpec(num_layers=1, width=32, num_heads=2, vocab_size=64, context_length=80)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """What MLX says of a compiler that failed, in pages, in one sentence.

    Raises:
        OSError: the temporary folder is full.
        UserError: another reason, and the way out.
    """
    try:
        yield
    except RuntimeError as error:
        if "Failed to compile" not in str(error):
            raise
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir()) from None
        said = str(error).rpartition("the output is:")[2].strip().splitlines()
        reason = next((line for line in said if "error" in line), said[-1])
        raise UserError(f"MLX's C++ compiler failed ({reason}): give --no-compile to go without it.") from None


@functools.cache
@compiler_errors()
def compile_loops() -> None:
    """Take one step of a tiny model; once per process, and nothing is left of it but the compiled loops."""
    # One of each user, and never through a link that another user has put there.
    path = Path(tempfile.gettempdir()) / f"mlx-forget-compile-{os.getuid()}.lock"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ops = operators(dtype=mx.float32, on_cpu=True, fused=True)
        weights = {name: mx.array(value) for name, value in initial_weights(_SPEC, 0)}
        tokens = mx.zeros((2, _SPEC.context_length), mx.int32)
        share = mx.ones(tokens.shape)
        _, gradients = architectures.gradients(weights, _SPEC, tokens, tokens, share, chunk=64, operators=ops)
        optim = OptimSpec()
        hyper = optimizer.hyperparameters(optim)
        scalars, _, _ = optimizer.step_scalars(mx.array(0.0), gradients, mx.array(1e-3), hyper)
        moments = optimizer.initial_moments(optim, weights)
        mx.eval(mx.compile(optimizer.update_of(optim))(weights, moments, gradients, scalars))

"""What the adapters of a training step drop: the same inputs on every backend, in whole batches and in parts, and after a resume.

Whether feature j of token t of a row enters the adapter of a module is a hash of (seed, step, rank, row), the module, t and j, in 32-bit
arithmetic that wraps. The host draws a key for each row and module (`row_keys`); a backend computes, with `mixed` as below,

    h = mixed(key + t * TOKEN) ^ mixed(j * FEATURE)
    h = (h * FIRST) ^ (h * FIRST >> 15)
    kept where (h * SECOND) >> 8 < share * 2^24
"""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Odd, and below 2^31 where a signed number of 32 bits must hold them.
TOKEN, FEATURE = 0x1E3779B1, 0x05EBCA6B
FIRST, SECOND = 0x7FEB352D, 0x2C1B3C6D
# `mixed(x)`: x ^= x >> 16; x *= FIRST; x ^= x >> 15; x *= SECOND; x ^= x >> 16.
SHIFTS = (16, 15, 16)


def row_keys(seed: int, step: int, rank: int, *, num_rows: int, modules: Sequence[str]) -> npt.NDArray[np.uint32]:
    """The keys uint32[modules, rows] of a rank's rows of a step."""
    rows = np.random.SeedSequence([seed, step, rank]).generate_state(num_rows, np.uint32)
    return np.array([rows ^ np.uint32(zlib.crc32(module.encode())) for module in modules], np.uint32).reshape(-1, num_rows)

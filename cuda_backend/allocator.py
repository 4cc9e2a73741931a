"""Keeping freed memory on a CPU: a training step asks for the same large buffers again and again."""

import ctypes
import os
import sys

# Numbers of mallopt(3) in glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for this process; returns whether it does now.

    By default every buffer above 32 MiB is mapped when asked for and unmapped when freed, so that a step faults in each page of its
    activations anew: about a tenth of a step at 10M parameters. Settings of the allocator in the environment, another allocator and
    other systems are left alone.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_TOP_PAD, 1 << 26)]
    return accepted == [1, 1, 1]

"""Freed memory stays with a training process on Linux, and a user's own allocator settings stand."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

PAGES = (64 << 20) // resource.getpagesize()
FAULTS = """
import resource, sys
import torch
from cuda_backend.allocator import keep_freed_memory
kept = keep_freed_memory()
for _ in range(10):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


ROOT = Path(__file__).resolve().parents[2]


def faults(**settings: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of five buffers of 64 MiB after ten others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT, env=clean | settings
    )
    kept, count = map(int, done.stdout.split())
    return bool(kept), count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_buffers_are_not_faulted_in_again() -> None:
    kept, count = faults()
    assert kept
    assert count < PAGES
    kept, count_without = faults(MALLOC_TRIM_THRESHOLD_="134217728")
    assert not kept
    assert count_without >= 5 * PAGES

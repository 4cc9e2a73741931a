"""Memory does not grow with the text, nor with the passes over it: measured in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Path(__file__).parent / "samples" / "store-v1" / "tokenizer.model"
GIGABYTE = 10**9

PASSES = """
import resource, sys
from pathlib import Path
import numpy as np
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.store import StoreWriter
writer = StoreWriter(Path(sys.argv[1]), Path(sys.argv[2]), "hash", 300, 1, 2, "test", tokens_per_shard=1 << 17)
rng = np.random.default_rng(0)
for _ in range(1000):
    writer.add("train", rng.integers(3, 300, 999), 999)
subset = RowSubset.of_tokens(writer.close().split("train"), 128, None)
mixture = Mixture(subset.num_rows, subset.num_rows, parse_share("10%"), 0, pretrain_epochs=100)
stream = BatchStream(subset, subset, mixture, 32, 1 << 30)
per_pass = subset.num_rows // 32
for number in range(10):
    for step in range(number * per_pass, (number + 1) * per_pass):
        stream.batch(step)
    print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
"""


def resident(pid):
    """Bytes of a process and its children; those they share are counted once for each."""
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    for number in (str(pid), *children):
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            continue
    return total


def test_memory_is_flat_over_ten_passes(tmp_path):
    command = [sys.executable, "-c", PASSES, str(tmp_path / "store"), str(TOKENIZER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = [int(line) for line in done.stdout.split()]
    assert len(after) == 10
    assert after[9] - after[1] < 4e6


@pytest.mark.full
def test_a_gigabyte_of_text_is_tokenised_in_less_than_a_gigabyte_of_memory(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array([f"{word}{i}" for i in range(200) for word in ("note", "number", "about", "and", "the")])
    size = 0
    with (tmp_path / "big.txt").open("w", encoding="utf-8") as file:
        while size < GIGABYTE:
            size += file.write("\n".join(" ".join(line) for line in words[rng.integers(0, len(words), (20_000, 12))]) + "\n")
    command = [sys.executable, "-m", "mlx_forget", "prepare", "big.txt", "-o", "store", "--tokenizer", str(TOKENIZER)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    assert 50e6 < peak < GIGABYTE
    print(f"{size / 1e6:.0f} MB of text: peak {peak / 1e6:.0f} MB over all processes")

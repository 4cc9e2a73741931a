"""Sweeps of the NumPy bigram in real processes: an installed distribution, as far as Python can see, offers it as a backend."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A run of a third of a second.
CONFIG = {
    "backend": "bigram",
    "model": "0.16m",
    "vocab_size": 512,
    "target_tokens": 20_000,
    "max_seq_length": 32,
    "iters": 12,
    "batch_size": 4,
    "eval_rows": 4,
    "steps_per_eval": 6,
    "steps_per_report": 1,
    "base": {"iters": 12, "batch_size": 4, "steps_per_eval": 6},
}

# What may differ between two runs of one id: times, memory, versions, and by whom and how they were trained.
_INCIDENTAL = {
    "checksum",
    "wall_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "versions",
    "num_resumes",
    "ended_at",
    "stack_size",
}
_MACHINE_KEYS = {"num_threads", "backend", "precision"}


def install(folder):
    """A folder for PYTHONPATH with which child processes know the backend `bigram`; returns their PYTHONPATH."""
    info = Path(folder) / "bigram-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bigram\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[mlx_forget.backends]\nbigram = tests.fakes:BigramTrainer\n")
    return os.pathsep.join([str(folder), str(ROOT)])


def records(folder):
    """Every record below a sweep's folder, by run id, without what may differ."""
    found = {}
    for path in sorted(Path(folder).glob("*/record.json")):
        record = json.loads(path.read_text())
        record["config"] = {key: value for key, value in record["config"].items() if key not in _MACHINE_KEYS}
        assert record["run_id"] not in found
        found[record["run_id"]] = {key: value for key, value in record.items() if key not in _INCIDENTAL}
    return found

"""Run folders as a large study leaves them, without the training: losses from the forgetting law, histories with a U-curve."""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np

from mlx_forget.config import TrainConfig
from mlx_forget.history import HistoryWriter
from mlx_forget.laws.forms import get_law

LAW = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 600.0}
FINETUNING = {"A": 30.0, "alpha": 0.12, "beta": 0.07, "E": 0.6}
SHARES = ("0", "0.1%", "0.5%", "1%", "5%")
NUM_STEPS = 600
# Histories are read of few runs; more would only fill the disk.
MOST_HISTORIES = 400


def write_records(folder: Path, count: int, *, num_sizes: int = 20, num_tokens: int | None = None, histories: bool = True) -> None:
    """Write run folders with complete records.

    Args:
        count: runs.
        num_sizes: base models, each of its own size.
        num_tokens: distinct values of D; None makes D continuous.
    """
    generator = np.random.default_rng(0)
    every_size = np.exp(np.linspace(np.log(1e6), np.log(1e9), num_sizes)).round()
    sizes = every_size[generator.integers(0, num_sizes, count)]
    tokens = np.exp(generator.uniform(np.log(3e5), np.log(3e7), count)).round()
    if num_tokens is not None:
        tokens = np.geomspace(3e5, 3e7, num_tokens).round()[generator.integers(0, num_tokens, count)]
    number = generator.integers(0, len(SHARES), count)
    shares = np.array([float(text[:-1]) / 100 if text.endswith("%") else float(text) for text in SHARES])[number]
    columns = {"N": sizes, "D": tokens, "p": shares, "L0": 8 - 0.25 * np.log(sizes)}
    noise = np.exp(0.004 * generator.standard_normal((2, count)))
    forgotten = get_law("bethune-forgetting").predict(LAW, columns) * noise[0]
    learnt = get_law("bethune-finetuning").predict(FINETUNING, columns) * noise[1]
    for i in range(count):
        run = folder / f"{i:012x}-cuda"
        run.mkdir(parents=True)
        record = make_record(
            run_id=f"{i:012x}",
            n=int(sizes[i]),
            d=tokens[i],
            p=SHARES[number[i]],
            share=float(shares[i]),
            start=float(columns["L0"][i]),
            forgotten=float(forgotten[i]),
            learnt=float(learnt[i]),
        )
        (run / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        # As if they had ended a while ago: younger records are read anew each time.
        os.utime(run / "record.json", (time.time() - 60, time.time() - 60))
        if histories and i < MOST_HISTORIES:
            write_history(run / "history.arrows", record)


def make_record(
    *, run_id: str, n: int, d: float, p: str, share: float, start: float, forgotten: float, learnt: float, method: str = "injection"
) -> dict:
    """A record with every key that a real one has."""
    seen = 1_228_800.0
    config = TrainConfig(
        model="0.65m",
        p=p,
        target_tokens=int(d),
        method=method,
        iters=NUM_STEPS,
        steps_per_eval=30,
        precision="fp32",
        base={"iters": 2500},
    )
    return {
        "schema_version": 1,
        "run_id": run_id,
        "science_version": 1,
        "status": "finished",
        "reason": f"all {NUM_STEPS} steps done",
        "backend": "cuda",
        "device": "cpu (1 threads)",
        "world_size": 1,
        "precision": "fp32",
        "method": {"name": method},
        "config": dataclasses.asdict(config),
        "versions": {"mlx-forget": "0.1.0", "numpy": "2.4.6", "pyarrow": "26.0.1", "torch": "2.13.0"},
        "seed": 0,
        "init": f"base{n:08x}",
        "num_params": n,
        "num_non_embedding_params": n // 2,
        "num_steps": NUM_STEPS,
        "learning_rate": 6e-4,
        "wall_seconds": 316.5,
        "tokens_per_second": 3882.3,
        "peak_memory_bytes": 522432512,
        "num_resumes": 0,
        "num_skipped": 0,
        "p": {"asked": p, "rows": share, "tokens": share},
        "data": {
            "code": {
                "fingerprint": "4e85" * 16,
                "role": "target",
                "unique_tokens": d,
                "tokens_seen": seen * (1 - share),
                "same_as_published": True,
            },
            "prose": {
                "fingerprint": "8f90" * 16,
                "role": "pretrain",
                "unique_tokens": 8467072,
                "tokens_seen": seen * share,
                "same_as_published": True,
            },
        },
        "losses": {
            "start": {"step": 0, "target_train": learnt + 1.3, "target_val": learnt + 1.0, "pretrain_val": start},
            "best": {"step": NUM_STEPS // 2, "target_train": learnt - 0.3, "target_val": learnt, "pretrain_val": forgotten},
            "end": {
                "step": NUM_STEPS,
                "target_train": learnt - 0.6,
                "target_val": learnt + 0.1,
                "pretrain_val": 1.5 * forgotten - 0.5 * start,
            },
        },
        "forgetting_nats": forgotten - start,
        "progress_lost": {"loss_fraction": 0.2, "token_equivalent": 0.8},
        "pretrain_curve": None,
        "ended_at": "2026-01-01T00:00:00Z",
        "stack_size": 1,
    }


def write_history(path: Path, record: dict, *, num_windows: int = 128) -> None:
    """A history that passes through the record's three losses, with noise that is the same in every row."""
    start, best, end = (record["losses"][name] for name in ("start", "best", "end"))
    generator = np.random.default_rng(7)
    windows = {name: generator.normal(0, 0.3, num_windows) for name in ("target_val", "pretrain_val")}
    steps = (0, NUM_STEPS // 2, NUM_STEPS)
    with HistoryWriter(path) as history:
        for step in range(0, NUM_STEPS + 1, NUM_STEPS // 20):
            at = {k: float(np.interp(step, steps, [row[k] for row in (start, best, end)])) for k in ("target_train", *windows)}
            history.append(
                {
                    "step": step,
                    "tokens": step * 2048,
                    "pretrain_tokens": 0,
                    "learning_rate": 6e-4,
                    "batch_loss": at["target_train"],
                    **{f"{name}_loss": value for name, value in at.items()},
                    **{f"{name}_windows": (at[name] + noise - noise.mean()).tolist() for name, noise in windows.items()},
                    "grad_norm": 1.0,
                    "num_skipped": 0,
                    "tokens_per_second": 3882.3,
                    "wall_seconds": step / 2,
                }
            )

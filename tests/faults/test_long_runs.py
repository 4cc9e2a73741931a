"""What only time shows: memory that grows with the steps, files that stay open, a clock that is set while a run is on its way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_forget.records import read_record
from tests.faults.scenarios import SCENARIOS, TOKENIZER, copy_world, result_of, run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")

# Bytes of the process every tenth of the steps, after a step and its evaluation.
_STEPS = """
import sys, resource
from pathlib import Path
import numpy as np
from mlx_forget.ladder import ModelSpec
from mlx_forget.backends import load_backend
from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec
model = ModelSpec(num_layers=1, width=16, num_heads=2, vocab_size=64, context_length=16)
trainer, zeros = load_backend(sys.argv[1])(TrainerSpec(model=model, runtime=RuntimeSpec(device=None))), np.zeros(4, np.uint8)
steps, rng = int(sys.argv[2]), np.random.default_rng(0)
for step in range(1, steps + 1):
    tokens = rng.integers(0, 64, (4, 17)).astype(np.int32)
    result = trainer.train_step(Batch(tokens, np.ones((4, 16), np.uint8), None, zeros, zeros), 1e-3)
    if step % 20 == 0:
        float(result.read().grad_norm), trainer.token_losses(tokens)
    if step % (steps // 10) == 0:
        print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
"""

# Runs of a sweep in this process, and the files that are open after each tenth of them.
_RUNS = """
import os, sys
from pathlib import Path
from mlx_forget import backends
from mlx_forget.cli import main
backends.BACKENDS["fake"] = backends.Backend("tests.fakes:BigramTrainer", "numpy", "nothing to install")
from mlx_forget.training import run
from mlx_forget.sweeps import stacking
drive, most, count = run.drive, 0, 0
def counted(*arguments, **words):
    global most, count
    done = drive(*arguments, **words)
    count += 1
    most = max(most, len(os.listdir("/proc/self/fd")))
    if count % (int(sys.argv[1]) // 10) == 0:
        print(most, flush=True)
        most = 0
    return done
run.drive = counted
try:
    main(sys.argv[2:])
except SystemExit as stop:
    sys.exit(stop.code)
"""


def printed(code, *arguments, folder=None, **environment):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split() if line.isdigit()]


@pytest.mark.full
@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_memory_is_flat_over_two_thousand_steps(backend, tried):
    pytest.importorskip({"cuda": "torch", "mlx": "mlx.core"}[backend])
    after = printed(_STEPS, backend, 2000)
    assert len(after) == 10
    # The first fifth fills caches; 2 MB over 1,600 steps would be a leak of a kilobyte each.
    assert max(after[2:]) - after[1] < 2e6, after
    tried[f"steps of {backend} with memory flat (grown by {max(after[2:]) - after[1]:,} bytes)"] += 2000


def recipe(folder, runs):
    """Runs that differ by their seed, of two steps each."""
    (folder / "many.yaml").write_text(
        f"config: {{backend: fake, model: 1x16, tokenizer: {TOKENIZER}, target: stores/notes, pretrain: stores/other, init: base,\n"
        "  max_seq_length: 16, batch_size: 2, iters: 2, steps_per_eval: 2, eval_rows: 2}\n"
        f"grid: {{seed: [{', '.join(map(str, range(runs)))}]}}\n"
    )
    return ["sweep", "many.yaml", "--output", "many", "--engine", "in-process", "--threads", "1"]


def files_stay_bounded(world, tmp_path, tried, runs):
    folder = copy_world(world, tmp_path / "w")
    environment = {"FORGET_HOME": f"{folder}/home", "FORGET_SCALE": "smoke"}
    opened = printed(_RUNS, runs, *recipe(folder, runs), folder=folder, **environment)
    assert len(list((folder / "many").glob("*/record.json"))) == runs
    assert len(opened) == 10
    assert max(opened[1:]) <= opened[0] + 2, opened
    tried[f"runs of a sweep in one process with at most {max(opened)} files open"] += runs


def test_files_that_are_open_are_as_many_after_twenty_runs(world, tmp_path, tried):
    files_stay_bounded(world, tmp_path, tried, 20)


@pytest.mark.full
def test_files_that_are_open_are_as_many_after_a_thousand_runs(world, tmp_path, tried):
    files_stay_bounded(world, tmp_path, tried, 1000)


# Every question for the time of day is answered by another year; clocks that count are left alone, as the system leaves them.
_CLOCK = """
import random, sys, time
chance, now, now_ns = random.Random(0), time.time, time.time_ns
time.time = lambda: now() + chance.uniform(-3e8, 3e8)
time.time_ns = lambda: now_ns() + chance.randrange(-3 * 10**17, 3 * 10**17)
from mlx_forget import backends
from mlx_forget.cli import main
backends.BACKENDS["fake"] = backends.Backend("tests.fakes:BigramTrainer", "numpy", "nothing to install")
try:
    main(sys.argv[1:])
except SystemExit as stop:
    sys.exit(stop.code)
"""


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_clock_that_jumps_changes_nothing(world, straight, tmp_path, tried, name):
    wanted, _, _ = straight(name)
    folder = copy_world(world, tmp_path / "w")
    # What is there already seems to be of another year too, before and after.
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (4e9, 4e9) if number % 2 else (1e8, 1e8))
    more = ["--stop-minutes", "5"] if name == "train" else []
    environment = {"FORGET_HOME": f"{folder}/home", "FORGET_SCALE": "smoke"}
    printed(_CLOCK, *SCENARIOS[name], *more, folder=folder, **environment)
    result = result_of(folder)
    assert {key for key in wanted if result.get(key) != wanted[key]} == set()
    for path in (folder / "made").rglob("record.json"):
        assert 0 <= read_record(path.parent)["wall_seconds"] < 300
        os.utime(path, (4e9, 4e9))
    listed = run(folder, ["runs", "list", "made"])
    assert listed.code == 0, listed.said
    tried[f"clocks that jumped during a {name}, nothing changed"] += 1

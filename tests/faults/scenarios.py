"""What the fault suites do to the tool: commands over a small folder of text and stores, each in a child process of its own.

Children are forked from a process that has imported everything, so that one takes a fraction of a second. Models are the NumPy bigram.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget.history import read_history
from tests.faults.injection import Faults

TOKENIZER = Path(__file__).resolve().parents[1] / "pipeline" / "samples" / "store-v1" / "tokenizer.model"
SAMPLES = Path(__file__).resolve().parents[1] / "samples"
# A study is a program of its own.
TOY = "toy"
_TRAIN = ["--backend", "fake", "--tokenizer", str(TOKENIZER), "--model", "1x16", "--max-seq-length", "16", "--batch-size", "8"]
_STEPS = ["--iters", "12", "--steps-per-eval", "4", "--save-every", "4", "--eval-rows", "16", "--p", "25%"]
_DATA = ["--target", "stores/notes", "--pretrain", "stores/other"]
_RECIPE = f"""
config: {{backend: fake, model: 1x16, tokenizer: {TOKENIZER}, target: stores/notes, pretrain: stores/other, max_seq_length: 16,
  init: base, batch_size: 8, iters: 8, steps_per_eval: 4, eval_rows: 16}}
grid: {{p: ["0", "25%"]}}
"""

_STAGES = (
    _RECIPE.partition("grid:")[0]
    + """
stages:
- {target: stores/notes}
- {target: stores/other, iters: 4}
"""
)
_TOY = ["--steps", "4", "--batch-size", "4", "--num-train", "16", "--num-valid", "4", "--shape", "1x16", "--warmup-steps", "1"]

SCENARIOS: dict[str, list[str]] = {
    "prepare": ["prepare", "notes.txt", "-o", "made", "--tokenizer", str(TOKENIZER), "--workers", "0"],
    "train": ["train", *_TRAIN, *_STEPS, *_DATA, "--init", "base", "--output", "made"],
    "replay": ["replay", "base", "--backend", "fake", "--num-tokens", "2K", "--length", "16", "-o", "made"],
    "sweep": ["sweep", "recipe.yaml", "--output", "made", "--engine", "in-process", "--threads", "1"],
    "stages": ["sweep", "stages.yaml", "--output", "made", "--engine", "in-process", "--threads", "1"],
    "log-probs": [
        "replay",
        "base",
        "--backend",
        "fake",
        "--num-tokens",
        "2K",
        "--length",
        "16",
        "--log-probs",
        "top-3",
        "-o",
        "made",
    ],
    "toy": [TOY, "--backend", "fake", "--tasks", "sort,reversal", *_TOY, "-o", "made"],
    "fuse": ["fuse", str(SAMPLES / "lora-v1"), "--base", str(SAMPLES / "run-v1"), "-o", "made"],
    "audit": ["audit", "base", "tuned", "--backend", "fake", "--data", "notes=stores/notes", "--max-tokens", "400", "-o", "made"],
    "export": ["runs", "export", ".", "-o", "made/runs.parquet"],
    "prune": ["runs", "prune", "tuned", "--best-too", "--yes"],
    "compare": ["runs", "compare", "base", "tuned", "--plot", "made/compared.png"],
    "report": ["report", "tuned", "-o", "made/report.html"],
    "fit": ["fit", "runs.csv", "--law", "bethune-forgetting", "--bootstrap", "20", "-o", "made/fit.json"],
    "probe": ["advise", "--probe", "made/probe.jsonl", "--d", "1e6"],
}
# A kill at one point of each of these is in the short form; the others are killed in the long form alone.
OFTEN = ("prepare", "train", "replay", "sweep")


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code (minus the signal that killed it), what it said, and the points that it passed."""

    code: int
    said: str
    points: tuple[str, ...]


def make_world(folder: Path) -> None:
    """The folder that every scenario starts from: text, two stores, a base model, a recipe."""
    folder.mkdir(parents=True)
    for name, words in (("notes", "A note about the number"), ("other", "What is said of it is this, for")):
        (folder / f"{name}.txt").write_text("".join(f"{i}. {words} {i}, and about {i * i}.\n" for i in range(400)))
        made = run(folder, ["prepare", f"{name}.txt", "-o", f"stores/{name}", "--tokenizer", str(TOKENIZER), "--workers", "0"])
        assert made.code == 0, made.said
    base = [*_TRAIN, "--iters", "4", "--eval-rows", "16", "--target", "stores/other", "--init", "scratch", "--output", "base"]
    made = run(folder, ["train", *base])
    assert made.code == 0, made.said
    made = run(folder, ["train", *_TRAIN, *_STEPS, *_DATA, "--init", "base", "--output", "tuned"])
    assert made.code == 0, made.said
    (folder / "recipe.yaml").write_text(_RECIPE)
    (folder / "stages.yaml").write_text(_STAGES)
    rows = [(n, d, p) for n in (1e8, 3e8, 1e9) for d in (1e6, 3e6) for p in (0, 0.01)]
    losses = [3 + 20 * d**0.3 / ((1 + 300 * p) * n) ** 0.42 for n, d, p in rows]
    lines = [f"{n},{d},{p},3,{loss!r}" for (n, d, p), loss in zip(rows, losses, strict=True)]
    (folder / "runs.csv").write_text("\n".join(["N,D,p,L0,loss", *lines]) + "\n")


def copy_world(world: Path, folder: Path) -> Path:
    """A fresh copy, as files of its own."""
    shutil.copytree(world, folder)
    return folder


@contextlib.contextmanager
def copy_to_break(world: Path, folder: Path) -> Iterator[Path]:
    """A fresh copy that is removed when all that was tried on it went well: there are thousands of them."""
    yield copy_world(world, folder)
    shutil.rmtree(folder)


def run(
    folder: Path, arguments: list[str], *, at: int | None = None, kind: str = "kill", kill_after: float | None = None
) -> Outcome:
    """A command in `folder`, with a fault at a point, or killed after some seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(str(folder), arguments, at, kind, sending))
    process.start()
    sending.close()
    if kill_after is not None:
        threading.Timer(kill_after, process.kill).start()
    return _outcome(process, receiving)


def signalled(folder: Path, arguments: list[str], number: int, when: Callable[[], bool]) -> Outcome:
    """A command that gets a signal as soon as something is so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(str(folder), arguments, None, "kill", sending))
    process.start()
    sending.close()
    while process.is_alive() and not when():
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, number)
    return _outcome(process, receiving)


def _outcome(process: Any, receiving: Any) -> Outcome:
    said, points = "", ()
    # A child that was killed has said nothing.
    with contextlib.suppress(EOFError):
        said, points = receiving.recv()
    process.join()
    return Outcome(process.exitcode or 0, said, tuple(points))


def _child(folder: str, arguments: list[str], at: int | None, kind: str, sending: object) -> None:
    import io

    from mlx_forget import backends
    from mlx_forget.cli import main
    from mlx_forget.pipeline.store import writing
    from mlx_forget.replay import log_probs
    from mlx_forget.studies import toy_continual

    os.chdir(folder)
    os.environ |= {"FORGET_HOME": f"{folder}/home", "FORGET_SCALE": "smoke"}
    backends.BACKENDS["fake"] = backends.Backend("tests.fakes:BigramTrainer", "numpy", "nothing to install")
    # Several shards of a little text.
    writing.TOKENS_PER_SHARD = 2000
    log_probs._MAX_ROWS_PER_SHARD = 50
    writing.StoreWriter.__init__.__defaults__ = tuple(
        2000 if value == 1 << 26 else value for value in writing.StoreWriter.__init__.__defaults__
    )
    faults = Faults(Path(folder), at=at, kind=kind)
    faults.install()
    sys.stdout = io.StringIO()
    sys.stderr = said = io.StringIO()
    code: object = 1
    try:
        if arguments[0] == TOY:
            toy_continual.main(arguments[1:])
            code = 0
        else:
            main(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        said.write(traceback.format_exc())
    sending.send((said.getvalue(), faults.points))
    sending.close()
    os._exit(int(code))


_SCIENCE = ["step", "tokens", "pretrain_tokens", "batch_loss", "target_train_loss", "target_val_windows", "pretrain_val_windows"]


def result_of(folder: Path) -> dict[str, object]:
    """What a scenario made, as values that must be the same however often it was interrupted."""
    import json

    from safetensors.numpy import load_file

    from mlx_forget.pipeline.store import open_store

    made: dict[str, object] = {}
    for path in sorted((folder / "made").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "manifest.json":
            made[name] = open_store(path.parent).fingerprint
        elif path.name == "record.json":
            made[name] = json.loads(path.read_text())["losses"]
        elif path.name == "history.arrows":
            made[name] = read_history(path).select(_SCIENCE).to_pylist()
        elif path.suffix == ".safetensors":
            made[name] = {key: value.tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".npy":
            made[name] = path.read_bytes()
        # What a run says of its progress is for people who watch: it is not synced, and read with care.
        elif (
            path.name != "progress.json"
            and path.suffix in (".json", ".jsonl", ".parquet", ".png", ".html", ".npz")
            and "checkpoints" not in name
        ):
            made[name] = _content(path)
    made["checkpoints"] = sorted(str(path.relative_to(folder)) for path in folder.glob("*/checkpoints/*"))
    made["strangers"] = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if ".part" in path.name or ".trash" in path.name
    )
    return made


def _content(path: Path) -> object:
    """What a file says but for times and the folder that it was made in."""
    import json

    import numpy as np

    from mlx_forget.table_files import read_rows

    if path.suffix == ".parquet":
        return read_rows(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {key: arrays[key].tobytes() for key in arrays}
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key not in VARIES}
    # That it is whole: pages and pictures name times.
    return path.suffix, path.read_bytes()[-8:]


# Keys of JSON files that differ between two runs of one command.
VARIES = ("checksum", "wall_seconds", "seconds_left", "tokens_per_second")


def shuffled(points: int, num: int, seed: str) -> list[int]:
    """Some of the points, from 1, in order; all of them where there are no more."""
    chosen = list(range(1, points + 1))
    return sorted(random.Random(seed).sample(chosen, min(num, points)))


KILLED = -signal.SIGKILL

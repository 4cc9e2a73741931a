"""Run folders as training leaves them."""

import hashlib
import json

import pytest

from tests.benchmarks.synthetic_records import make_record, write_history


def write_checkpoint(folder, run_id):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    files = {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    (folder / "state.json").write_text(json.dumps({"schema_version": 1, "run_id": run_id, "files": files}))


@pytest.fixture
def make_run():
    """Write a whole run; keys of the record can be replaced."""

    def make(root, run_id, *, n=10_000_000, d=1e6, p="0", forgotten=3.5, learnt=3.0, method="injection", seed=0, **changes):
        folder = root / f"{run_id}-cuda"
        folder.mkdir(parents=True)
        share = float(p[:-1]) / 100 if p.endswith("%") else float(p)
        numbers = {"n": n, "d": d, "p": p, "share": share, "start": 3.0, "forgotten": forgotten, "learnt": learnt}
        record = make_record(run_id=run_id, method=method, **numbers) | {"seed": seed} | changes
        record["config"] |= {"seed": seed}
        (folder / "record.json").write_text(json.dumps(record, indent=1))
        (folder / "config.yaml").write_text("model: 0.65m\n")
        if record["losses"]["best"]["pretrain_val"] is not None:
            write_history(folder / "history.arrows", record, num_windows=16)
        for name in ("last", "best"):
            write_checkpoint(folder / "checkpoints" / name, run_id)
        return folder

    return make

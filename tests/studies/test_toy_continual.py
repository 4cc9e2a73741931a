"""The toy of continual learning: its tasks, its measure, and that replay does what it is for."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlx_forget.backends import available_backends
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.studies import toy_continual
from mlx_forget.studies.toy_continual import FILE, PLAIN, REPLAYED, ToySpec, main, read_outcome, run_toy
from mlx_forget.studies.toy_tasks import LENGTH, TASKS, bos_of, exact_match, examples
from mlx_forget.trainer import RuntimeSpec

NETWORKS = available_backends()
needs_a_network = pytest.mark.skipif(not NETWORKS, reason="the toy trains a network")


def number(digits):
    return int("".join(str(d - 9) for d in digits))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    rows = examples(task, 200, 3)
    assert rows.shape == (200, LENGTH)
    assert (rows[:, 0] == bos_of(task)).all()
    for row in rows.tolist():
        a, answer = number(row[1:4]), number(row[9:13])
        if task in ("add", "modadd"):
            total = a + number(row[5:8])
            assert answer == (total if task == "add" else total % 1000)
        else:
            digits = f"{a:03d}"
            assert f"{answer:04d}" == "0" + (digits[::-1] if task == "reversal" else "".join(sorted(digits)))
            assert row[5:8] == [7, 7, 7]
        assert (row[4], row[8], row[13]) == (5, 6, 8)
    assert not np.array_equal(rows, examples(task, 200, 4))


class Oracle:
    """Answers right but for some rows."""

    def __init__(self, rows, wrong):
        self.answers = rows[:, 9:].copy()
        self.answers[:wrong, -1] = 0

    def sample(self, prompts, u, *, temperature):
        assert prompts.shape[1] == 9
        assert u.shape == (len(prompts), 5)
        return self.answers


def test_exact_match_counts_whole_answers_with_their_end():
    rows = examples("add", 40, 0)
    assert exact_match(Oracle(rows, 0), rows) == 1
    assert exact_match(Oracle(rows, 10), rows) == 0.75


SMALL = {
    "tasks": ("reversal", "sort"),
    "shape": "2x32",
    "batch_size": 8,
    "steps": 6,
    "warmup_steps": 2,
    "num_train": 64,
    "num_valid": 32,
}


def run_small(folder, backend=NETWORKS[0] if NETWORKS else "", *, interrupted=lambda: None, **keys):
    return run_toy(ToySpec(**SMALL | keys), folder, backend=backend, runtime=RuntimeSpec(num_threads=1), interrupted=interrupted)


@needs_a_network
def test_both_arms_share_the_first_task_and_are_read_at_the_same_steps(tmp_path):
    outcome = run_small(tmp_path)
    assert [row["step"] for row in outcome.arms[PLAIN]] == [row["step"] for row in outcome.arms[REPLAYED]] == list(range(1, 13))
    assert outcome.arms[PLAIN][:6] == outcome.arms[REPLAYED][:6]
    assert list(outcome.after(PLAIN, 1)) == ["reversal", "sort"]
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "weights are gone when all is learnt"
    # As a run leaves it that is killed after its last reading.
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / ".1.part.safetensors").write_bytes(b"")
    again = run_small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert again.as_json() == read_outcome(tmp_path).as_json() == outcome.as_json()


@needs_a_network
def test_all_four_tasks_are_learnt_and_every_earlier_one_is_replayed_in_equal_parts(tmp_path, monkeypatch):
    sampled, replayed = [], toy_continual._replayed

    def seen(trainer, earlier, *rest):
        rows = replayed(trainer, earlier, *rest)
        sampled.append((earlier, rows[:, 0].tolist()))
        return rows

    monkeypatch.setattr(toy_continual, "_replayed", seen)
    outcome = run_small(tmp_path, tasks=TASKS, steps=4, batch_size=12)
    assert list(outcome.after(PLAIN, 3)) == list(outcome.after(REPLAYED, 3)) == list(TASKS)
    assert [earlier for earlier, _ in sampled] == [TASKS[:1], TASKS[:2], TASKS[:3]]
    for earlier, first in sampled:
        assert {bos: first.count(bos) for bos in set(first)} == {bos_of(task): 48 // len(earlier) for task in earlier}


@needs_a_network
@pytest.mark.parametrize("backend", NETWORKS)
def test_an_interrupted_toy_ends_as_if_it_had_not_been(backend, tmp_path):
    keys = {"tasks": ("sort", "reversal", "add"), "steps": 7, "learning_rate": 3e-2, "num_valid": 256}
    straight = run_small(tmp_path / "straight", backend, **keys)
    assert any(share for row in straight.arms[REPLAYED] for share in row["exact_match"].values()), "scores that could differ"

    class After:
        """A stop after some steps."""

        def __init__(self, steps):
            self.left = steps

        def __call__(self):
            self.left -= 1
            return 15 if self.left < 0 else None

    num_stops = 0
    while True:
        try:
            resumed = run_small(tmp_path / "broken", backend, interrupted=After(7), **keys)
            break
        except Interrupted:
            num_stops += 1
    assert num_stops > 2
    assert resumed.arms == straight.arms


@needs_a_network
def test_a_killed_toy_goes_on_and_ends_with_the_same_readings(tmp_path):
    keys = {**SMALL, "steps": 60, "num_valid": 64}
    options = [f"--{key.replace('_', '-')}={','.join(value) if key == 'tasks' else value}" for key, value in keys.items()]
    command = [
        sys.executable,
        "-m",
        "mlx_forget.studies.toy_continual",
        *options,
        "--backend",
        NETWORKS[0],
        "--num-threads",
        "1",
        "--json",
    ]
    killed = subprocess.Popen([*command, "-o", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/[01]-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert killed.poll() is None, "killed while it learns"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = len(read_outcome(tmp_path / "killed").arms[PLAIN])
    assert 1 <= before < 20
    finished = [
        subprocess.run([*command, "-o", name], cwd=tmp_path, capture_output=True, check=True) for name in ("killed", "whole")
    ]
    resumed, whole = (json.loads(one.stdout) for one in finished)
    assert resumed["arms"] == whole["arms"]


@needs_a_network
@pytest.mark.full
def test_replay_keeps_the_first_task_where_plain_training_loses_it(tmp_path):
    outcome = run_small(tmp_path, shape="2x64", batch_size=64, steps=300, learning_rate=3e-3, warmup_steps=20, num_train=4096,
                        num_valid=256)  # fmt: skip
    assert outcome.after(PLAIN, 0)["reversal"] > 0.95
    assert outcome.after(PLAIN, 1)["reversal"] < 0.5
    assert outcome.after(REPLAYED, 1)["reversal"] > 0.95
    assert outcome.after(REPLAYED, 1)["sort"] > 0.7


@needs_a_network
def test_the_command_prints_one_json_object_and_its_folder_becomes_a_figure(capfd, tmp_path, run_forget):
    options = [f"--{key.replace('_', '-')}={','.join(value) if key == 'tasks' else value}" for key, value in SMALL.items()]
    main([*options, "--backend", NETWORKS[0], "--num-threads", "1", "--json", "--output", str(tmp_path / "toy")])
    answer = json.loads(capfd.readouterr().out)
    assert set(answer["arms"]) == {PLAIN, REPLAYED}
    assert answer["finished"] is True
    assert answer["spec"]["batch_size"] == 8
    assert answer["command"].startswith("python -m mlx_forget.studies.toy_continual --tasks reversal,sort --steps 6 --batch-size 8")
    code, out, err = run_forget("plot", tmp_path / "toy", "-o", tmp_path / "f", "--json")
    assert code == 0, err
    assert json.loads(out)["arms"] == answer["arms"]
    assert (tmp_path / "f" / "toy.png").stat().st_size > 8_000
    with (tmp_path / "f" / "toy.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 12 * 2
    code, out, _ = run_forget("plot", tmp_path / "toy", "-o", tmp_path / "f")
    assert "with self-generated replay  sort" in out
    code, _, err = run_forget("plot", tmp_path, "--kind", "toy")
    assert code == 2
    assert "holds no toy.json" in err


def test_a_folder_of_another_experiment_or_a_damaged_one_is_refused(tmp_path):
    spec = ToySpec(**SMALL)
    (tmp_path / FILE).write_text(json.dumps({"schema_version": 1, "spec": {**SMALL, "seed": 7}, "backend": "x", "device": "",
                                             "arms": {PLAIN: [], REPLAYED: []}}))  # fmt: skip
    with pytest.raises(UserError, match=r"holds another experiment .*--seed 7"):
        run_toy(spec, tmp_path, backend="x", runtime=RuntimeSpec())
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match="is damaged: remove"):
        read_outcome(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "add"], "at least two tasks"),
        (["--tasks", "add,sortt"], "Did you mean 'sort'"),
        (["--steps", "0"], "steps must be positive"),
        (["--output", "/dev/null/toy"], "Cannot write to /dev/null/toy"),
    ],
)
def test_wrong_requests_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

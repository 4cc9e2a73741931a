"""The toy of continual learning: its tasks, its measure, and that replay does what it is for."""

import json

import numpy as np
import pytest

from mlx_forget import toy_continual
from mlx_forget.toy_continual import LENGTH, TASKS, ToySpec, exact_match, examples, main, run_toy
from mlx_forget.trainer import RuntimeSpec, available_backends

NETWORKS = available_backends()
needs_a_network = pytest.mark.skipif(not NETWORKS, reason="the toy trains a network")


def number(digits):
    return int("".join(str(d - 9) for d in digits))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    rows = examples(task, 200, 3)
    assert rows.shape == (200, LENGTH)
    assert (rows[:, 0] == toy_continual.bos_of(task)).all()
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


@needs_a_network
def test_both_arms_learn_the_first_task_alike_and_replay_only_later():
    plain, replayed = (
        run_toy(ToySpec(**SMALL), replay=r, backend=NETWORKS[0], runtime=RuntimeSpec(num_threads=1)) for r in (False, True)
    )
    assert [list(row) for row in plain] == [["reversal", "sort"]] * 2
    assert plain[0] == replayed[0]


@needs_a_network
@pytest.mark.full
def test_replay_keeps_the_first_task_where_plain_training_loses_it():
    spec = ToySpec(**{**SMALL, "shape": "2x64", "batch_size": 64, "steps": 300, "learning_rate": 3e-3, "warmup_steps": 20,
                      "num_train": 4096, "num_valid": 256})  # fmt: skip
    plain, replayed = (run_toy(spec, replay=r, backend=NETWORKS[0], runtime=RuntimeSpec(num_threads=1)) for r in (False, True))
    assert plain[0]["reversal"] > 0.95
    assert plain[1]["reversal"] < 0.5
    assert replayed[1]["reversal"] > 0.95
    assert replayed[1]["sort"] > 0.7


@needs_a_network
def test_the_command_prints_both_arms_as_one_json_object(capsys):
    options = [f"--{key.replace('_', '-')}={','.join(value) if key == 'tasks' else value}" for key, value in SMALL.items()]
    main([*options, "--backend", NETWORKS[0], "--num-threads", "1", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["exact_match"]) == {"without replay", "with self-generated replay"}
    assert answer["spec"]["batch_size"] == 8


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "add"], "at least two tasks"),
        (["--tasks", "add,sortt"], "Did you mean 'sort'"),
        (["--steps", "0"], "steps must be positive"),
    ],
)
def test_wrong_requests_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

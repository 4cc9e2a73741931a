"""The loop over the NumPy fake: stop rules, histories, resume, divergence."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_forget import checkpoint
from mlx_forget.evaluate import Windows, progress_lost
from mlx_forget.history import read_history
from mlx_forget.ladder import model_spec
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.schedule import Schedule
from mlx_forget.trainer import TrainerSpec
from mlx_forget.training.loop import Cadence, RunState, drive
from mlx_forget.training.stop_rules import StopRules
from mlx_forget.training.watch import NoObserver
from tests.fakes import BigramTrainer
from tests.pipeline.test_store import make_store

TOKENIZER = Path(__file__).parents[1] / "pipeline" / "samples" / "store-v1" / "tokenizer.model"
SPEC = model_spec("1x16", vocab_size=40, context_length=8)


@pytest.fixture(scope="module")
def subsets(tmp_path_factory):
    """Two first-order Markov sources over 40 tokens, as row subsets of 8 tokens: target, pretraining, and their validation."""
    rng, made = np.random.default_rng(0), {}
    for name, shift in (("target", 7), ("pretrain", 11)):
        for split, size in (("train", 4000), ("validation", 1500)):
            tokens = np.empty(size, int)
            tokens[0] = 3
            for i in range(1, size):
                tokens[i] = 3 + (tokens[i - 1] - 3 + shift) % 37 if rng.random() < 0.8 else rng.integers(3, 40)
            folder = tmp_path_factory.mktemp(name) / "store"
            made[name, split] = make_store(folder, tokens.reshape(-1, 50), vocab_size=40, split=split).split(split)
    return {key: RowSubset.of_tokens(split, 8, None) for key, split in made.items()}


def make_run(subsets, folder, *, num_steps=40, p="10%", stop=None, save=10, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    target, pretrain = subsets["target", "train"], subsets["pretrain", "train"]
    mixture = Mixture(target.num_rows, pretrain.num_rows, parse_share(p), seed)
    return RunState(
        folder=folder,
        model=SPEC,
        tokenizer=folder / "tokenizer.model",
        schedule=Schedule(peak=1e-2, num_steps=num_steps, decay="constant"),
        stream=BatchStream(target, pretrain, mixture, batch_size=4, num_steps=num_steps),
        target_train=Windows.of("train", target, 16),
        target_val=Windows.of("target", subsets["target", "validation"], 16),
        pretrain_val=Windows.of("pretrain", subsets["pretrain", "validation"], 16),
        cadence=Cadence(report=5, evaluate=10, save=save),
        stop=stop or StopRules(num_steps=num_steps),
        observer=NoObserver(),
        identity={"run_id": "test"},
    )


def make_trainer():
    return BigramTrainer(TrainerSpec(model=SPEC))


def pretrained(subsets):
    """A trainer that has learnt the pretraining source, so that it has something to forget."""
    trainer, source = make_trainer(), subsets["pretrain", "train"]
    stream = BatchStream(source, None, Mixture(source.num_rows, 0, parse_share(0), 0), batch_size=8, num_steps=80)
    for step in range(80):
        trainer.train_step(stream.batch(step), 1e-2)
    return trainer


SCIENCE = ["step", "tokens", "pretrain_tokens", "learning_rate", "batch_loss", "target_train_loss", "target_val_loss",
           "pretrain_val_loss", "target_val_windows", "pretrain_val_windows", "grad_norm", "num_skipped"]  # fmt: skip


def science_of(folder):
    return read_history(folder / "history.arrows").select(SCIENCE).to_pylist()


def test_a_run_learns_evaluates_at_both_ends_and_keeps_its_best(subsets, tmp_path):
    run = make_run(subsets, tmp_path, num_steps=45)
    drive(make_trainer(), [run])
    rows = science_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 45]
    assert run.status == "finished"
    assert rows[-1]["target_val_loss"] < rows[0]["target_val_loss"] - 0.5
    assert rows[0]["batch_loss"] is None
    best = min(rows, key=lambda row: row["target_val_loss"])
    assert run.best["step"] == best["step"]
    assert checkpoint.open_checkpoint(tmp_path / "checkpoints" / "best").state["step"] == best["step"]
    assert checkpoint.open_checkpoint(tmp_path / "checkpoints" / "last").state["step"] == 45


def test_history_rows_are_the_means_of_their_windows_and_count_served_tokens(subsets, tmp_path):
    run = make_run(subsets, tmp_path, num_steps=20, p="25%")
    drive(make_trainer(), [run])
    for row in science_of(tmp_path):
        assert row["target_val_loss"] == pytest.approx(np.mean(row["target_val_windows"]))
        assert row["tokens"] == row["step"] * 4 * 8
        assert abs(row["pretrain_tokens"] - row["tokens"] / 4) < 8


class Interrupt:
    """True from the n-th question on."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("after", [1, 9, 10, 17, 30])
def test_an_interrupted_run_ends_with_the_numbers_of_an_uninterrupted_one(subsets, tmp_path, after):
    straight = make_run(subsets, tmp_path / "straight")
    drive(make_trainer(), [straight])
    run = make_run(subsets, tmp_path / "broken")
    drive(make_trainer(), [run], interrupted=Interrupt(after))
    assert run.status == "interrupted"
    found, problem = checkpoint.latest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert problem is None
    assert found.state["step"] == after + 1
    again, trainer = make_run(subsets, tmp_path / "broken"), make_trainer()
    trainer.load(found.weights)
    trainer.load_state(found.training_state)
    again.resume(json.loads(json.dumps(found.state)))
    drive(trainer, [again])
    assert again.status == "finished"
    assert again.best == straight.best
    assert science_of(tmp_path / "broken") == science_of(tmp_path / "straight")


def test_history_beyond_the_checkpoint_is_dropped_on_resume(subsets, tmp_path):
    run = make_run(subsets, tmp_path, save=30)
    drive(make_trainer(), [run], interrupted=Interrupt(38))
    checkpoint._remove(tmp_path / "checkpoints" / "last")
    found, _ = checkpoint.latest_checkpoint(tmp_path / "checkpoints")
    assert found.state["step"] == 30
    again, trainer = make_run(subsets, tmp_path, save=30), make_trainer()
    trainer.load(found.weights)
    trainer.load_state(found.training_state)
    again.resume(found.state)
    drive(trainer, [again])
    assert [row["step"] for row in science_of(tmp_path)] == [0, 10, 20, 30, 40]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_is_used(subsets, tmp_path):
    run = make_run(subsets, tmp_path)
    drive(make_trainer(), [run])
    with (tmp_path / "checkpoints" / "last" / "model.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    found, problem = checkpoint.latest_checkpoint(tmp_path / "checkpoints")
    assert found.folder.name == "previous"
    assert "last/model.safetensors" in problem


@pytest.mark.parametrize(
    "rule, limit, reason",
    [
        ("target_loss", 3.0, "reached 3"),
        ("max_forgetting", 1e-6, "over the limit"),
        ("patience", 1, "no better"),
    ],
)
def test_stop_rules_end_a_run_at_an_evaluation(subsets, tmp_path, rule, limit, reason):
    stop = StopRules(num_steps=400, **{rule: limit})
    run = make_run(subsets, tmp_path, num_steps=400, stop=stop)
    drive(pretrained(subsets), [run])
    assert run.status == "stopped"
    assert run.step % 10 == 0
    assert run.step < 400
    assert reason in run.reason
    assert run.stopped_by == rule

    # Killed before its record stood, it has ended all the same.
    found, _ = checkpoint.latest_checkpoint(tmp_path / "checkpoints")
    again, trainer = make_run(subsets, tmp_path, num_steps=400, stop=stop), make_trainer()
    trainer.load(found.weights)
    trainer.load_state(found.training_state)
    again.resume(json.loads(json.dumps(found.state)))
    drive(trainer, [again])
    assert (again.step, again.status, again.reason, again.stopped_by) == (run.step, "stopped", run.reason, rule)


def test_best_stays_under_the_forgetting_limit(subsets, tmp_path):
    free = make_run(subsets, tmp_path / "free", p="0", num_steps=60)
    drive(pretrained(subsets), [free])
    rows = science_of(tmp_path / "free")
    rises = [row["pretrain_val_loss"] - rows[0]["pretrain_val_loss"] for row in rows]
    assert rises == sorted(rises), "this data must forget, or the test shows nothing"
    limit = (rises[2] + rises[3]) / 2
    run = make_run(subsets, tmp_path / "held", p="0", num_steps=60, stop=StopRules(num_steps=60, max_forgetting=limit))
    drive(pretrained(subsets), [run])
    assert run.status == "stopped"
    assert run.best["step"] == 20


@pytest.mark.parametrize("allowed, status", [(0, "diverged"), (1, "finished")])
def test_a_non_finite_update_is_divergence_unless_allowed(subsets, tmp_path, allowed, status):
    trainer = make_trainer()
    trainer.spoil_step = 13
    run = make_run(subsets, tmp_path, stop=StopRules(num_steps=40, max_skipped=allowed))
    drive(trainer, [run])
    assert run.status == status
    assert run.num_skipped == 1
    assert all(np.isfinite(row["target_val_loss"]) for row in science_of(tmp_path))
    found, _ = checkpoint.latest_checkpoint(tmp_path / "checkpoints")
    assert found.state["num_skipped"] == allowed
    # The steps after the last good checkpoint took time as well.
    assert run.elapsed_seconds > found.state["elapsed_seconds"] or status == "finished"


def stacked_runs(subsets, folder):
    """Three runs that differ in share, length, rate and seed, and the same three once more to be trained one by one."""
    options = [{"p": "10%", "num_steps": 40}, {"p": "0", "num_steps": 25, "seed": 3}, {"p": "30%", "num_steps": 40, "seed": 5}]
    runs = [make_run(subsets, folder / str(k), **values) for k, values in enumerate(options)]
    for run, peak in zip(runs, (1e-2, 5e-3, 2e-2), strict=True):
        run.schedule = dataclasses.replace(run.schedule, peak=peak)
    return runs


def make_stack(count=3):
    return BigramTrainer.stack(TrainerSpec(model=SPEC), [0] * count)


def test_runs_of_a_stack_end_as_if_each_had_been_alone(subsets, tmp_path):
    together, alone = stacked_runs(subsets, tmp_path / "together"), stacked_runs(subsets, tmp_path / "alone")
    ended = []
    drive(make_stack(), together, ended=lambda run: ended.append((together.index(run), run.status)))
    for run in alone:
        drive(make_trainer(), [run])
    assert ended == [(1, "finished"), (0, "finished"), (2, "finished")]
    for left, right in zip(together, alone, strict=True):
        assert science_of(left.folder) == science_of(right.folder)
        assert (left.best, left.last, left.step) == (right.best, right.last, right.step)


def test_a_run_of_a_stack_that_diverges_stops_alone(subsets, tmp_path):
    together, alone = stacked_runs(subsets, tmp_path / "together"), stacked_runs(subsets, tmp_path / "alone")
    stack = make_stack()
    stack.members[2].spoil_step = 13
    drive(stack, together)
    assert [run.status for run in together] == ["finished", "finished", "diverged"]
    assert together[2].step == 15
    for left, right in zip(together[:2], alone[:2], strict=True):
        drive(make_trainer(), [right])
        assert science_of(left.folder) == science_of(right.folder)


def test_an_interrupted_stack_goes_on_each_run_from_its_own_step(subsets, tmp_path):
    straight = stacked_runs(subsets, tmp_path / "straight")
    drive(make_stack(), straight)
    broken = stacked_runs(subsets, tmp_path / "broken")
    drive(make_stack(), broken, interrupted=Interrupt(40))
    assert {run.status for run in broken} == {"interrupted"}
    assert len({run.step for run in broken}) == 2, "the runs must be at different steps, or the test shows less"
    again, stack = stacked_runs(subsets, tmp_path / "broken"), make_stack()
    for run, member in zip(again, stack.members, strict=True):
        found, _ = checkpoint.latest_checkpoint(run.folder / "checkpoints")
        member.load(found.weights)
        member.load_state(found.training_state)
        run.resume(json.loads(json.dumps(found.state)))
    drive(stack, again)
    for left, right in zip(again, straight, strict=True):
        assert science_of(left.folder) == science_of(right.folder)


def test_schedules_are_pure_functions_of_the_step():
    cosine = Schedule(peak=1.0, num_steps=1000, decay="cosine")
    assert [round(cosine(step), 6) for step in (0, 4, 5)] == [0.2, 1.0, 1.0]
    assert cosine(999) == pytest.approx(0.01, abs=1e-4)
    assert cosine(900) == pytest.approx(0.034, abs=0.001)
    constant = dataclasses.replace(cosine, decay="constant")
    assert constant(999) == 1.0


def test_progress_lost_inverts_the_pretraining_curve():
    curve = [(0, 8.0), (100, 6.0), (1000, 5.0), (10_000, 4.0)]
    lost = progress_lost(curve, 4.0, 5.0)
    assert lost.loss_fraction == pytest.approx(0.25)
    assert lost.token_equivalent == pytest.approx(0.9)
    assert progress_lost(curve, 4.0, 5.5).token_equivalent == pytest.approx(1 - 316.2278 / 10_000)
    assert progress_lost(curve, 4.0, 3.9).token_equivalent == 0
    assert progress_lost(curve, 4.0, 9.0).token_equivalent == 1
    assert progress_lost([], 4.0, 5.0).token_equivalent is None

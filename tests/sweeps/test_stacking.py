"""Which runs are trained as one, how many, and that each ends as it would alone."""

import dataclasses
import json

import pytest

from mlx_forget.config import TrainConfig, scale_defaults
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import Interrupted, OutOfMemory, RunFailed, UserError
from mlx_forget.sweeps.stacking import execute_stack, group_runs, most_members
from mlx_forget.trainer import Capabilities
from mlx_forget.training.plan import plan_run
from mlx_forget.training.run import execute
from mlx_forget.training.watch import Watch
from tests.fakes import BigramStack, BigramTrainer, add_fake_backend


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """Makes the plan of a run of the NumPy bigram; a name is its folder."""
    add_fake_backend(monkeypatch)

    def make(name, **values):
        config = from_layers(TrainConfig, scale_defaults(), {"backend": "fake", "p": "5%", **values})
        return plan_run(config, folder=tmp_path / name)

    return make


def losses(folder):
    return json.loads((folder / "record.json").read_text())["losses"]


def test_runs_that_differ_in_data_share_seed_rate_and_length_are_put_together(plan):
    plans = [
        plan("a"),
        plan("b", p="0"),
        plan("c", seed=4),
        plan("d", learning_rate=1e-3),
        plan("e", target="math"),
        plan("f", iters=9),
    ]
    groups, said = group_runs(plans, 8)
    assert groups == [[5, 0, 1, 2, 3, 4]], "runs of one length stand together"
    assert said == ["Up to 8 runs of one shape are trained as one."]
    assert sorted(len(group) for group in group_runs(plans, 4)[0]) == [3, 3]
    assert group_runs(plans, "off")[0] == [[0], [1], [2], [3], [4], [5]]


def test_what_cannot_stack_falls_back_and_it_is_said(plan, monkeypatch):
    plans = [plan("a"), plan("b", seed=2), plan("c", batch_size=4), plan("d", weight_decay=0.0), plan("e", method="anchored-adamw")]
    groups, said = group_runs(plans, 8)
    assert groups == [[0, 1], [2], [3], [4]]
    assert "Trained one by one: method 'anchored-adamw' does not stack." in said
    assert any(plans[2].run_id in sentence and "only one of its shape" in sentence for sentence in said)
    assert group_runs([plan("f"), plan("g", rows="documents")], 8)[0] == [[0], [1]]
    fresh = {"init": "scratch", "pretrain": "none", "p": "0", "model": "qknorm-2x32"}
    assert "optimizer 'adafactor' does not stack" in group_runs([plan("h", optimizer="adafactor")], 8)[1][0]
    assert "architecture 'qknorm' does not stack" in group_runs([plan("i", **fresh)], 8)[1][0]
    monkeypatch.setattr(BigramTrainer, "describe", classmethod(lambda cls: Capabilities(("fp32",), (0, 1))))
    groups, said = group_runs(plans[:2], 8)
    assert groups == [[0], [1]]
    assert said == ["Trained one by one: backend 'fake' does not stack."]


def test_auto_stacks_small_models_on_an_accelerator_only(plan, monkeypatch):
    small, large = plan("a"), plan("b", init="scratch", pretrain="none", p="0", model="8x512")
    assert most_members(small, "auto")[0] == 1
    assert "on a CPU" in most_members(small, "auto")[1]
    gpu = dataclasses.replace(BigramTrainer.describe(), accelerator=True)
    monkeypatch.setattr(BigramTrainer, "describe", classmethod(lambda cls: gpu))
    assert most_members(small, "auto")[0] == 32
    assert most_members(plan("c", device="cpu"), "auto")[0] == 1
    assert most_members(large, "auto")[0] == 1
    assert "fills a device by itself" in most_members(large, "auto")[1]


def test_too_little_memory_means_fewer_at_a_time_and_it_is_said(plan):
    limited = plan("a", memory_limit_gb=0.3)
    whole, sentence = most_members(limited, 32)
    assert 1 < whole < 32
    assert f"Instead of 32, only {whole} runs are trained as one" in sentence
    assert most_members(limited, 32, num_processes=2)[0] == whole // 2
    assert most_members(plan("b", memory_limit_gb=0.001), 8)[0] == 1


def test_a_stack_writes_the_records_that_its_runs_would_have_written_alone(plan, tmp_path):
    options = [{}, {"p": "0", "seed": 3}, {"learning_rate": 1e-3, "iters": 13}]
    plans = [plan(f"together{k}", **values) for k, values in enumerate(options)]
    said = []
    records = execute_stack(plans, watch=Watch(say=said.append))
    assert "3 runs are trained as one." in said
    assert [record["run_id"] for record in records] == [one.run_id for one in plans]
    assert {record["stack_size"] for record in records} == {3}
    for k, values in enumerate(options):
        alone = execute(plan(f"alone{k}", **values))
        assert alone["losses"] == records[k]["losses"]
        assert losses(tmp_path / f"together{k}") == records[k]["losses"]
    said.clear()
    assert [record["losses"] for record in execute_stack(plans, watch=Watch(say=said.append))] == [r["losses"] for r in records]
    assert sum("done already" in sentence for sentence in said) == 3


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_run_that_diverges_ends_alone_with_its_record(plan, tmp_path):
    plans = [plan("good"), plan("bad", learning_rate=1e307)]
    with pytest.raises(RunFailed, match=r"1 of 2 runs diverged.*bad"):
        execute_stack(plans)
    assert json.loads((tmp_path / "bad" / "record.json").read_text())["status"] == "diverged"
    assert losses(tmp_path / "good") == execute(plan("alone"))["losses"]


def test_a_stack_that_turns_out_too_large_is_split_and_it_is_said(plan, monkeypatch):
    plans = [plan("a"), plan("b", seed=2), plan("c", seed=3)]
    train_step = BigramStack.train_step

    def limited(self, batches, rates, active):
        if sum(active) > 2 and self.members[0].num_steps == 7:
            raise OutOfMemory("A step needs 9 GB.")
        return train_step(self, batches, rates, active)

    monkeypatch.setattr(BigramStack, "train_step", limited)
    said = []
    records = execute_stack(plans, watch=Watch(say=said.append))
    assert "A step needs 9 GB. Training 2 runs as one instead of 3." in said
    assert [record["stack_size"] for record in records] == [2, 2, 1]
    assert records[1]["losses"] == execute(plan("alone", seed=2))["losses"]


def test_an_interrupted_stack_resumes_every_run(plan, tmp_path):
    plans = [plan("a", steps_per_report=1), plan("b", seed=3, steps_per_report=1)]
    questions = iter(range(100))
    with pytest.raises(Interrupted, match="at step"):
        execute_stack(plans, watch=Watch(interrupted=lambda: 15 if next(questions) > 20 else None))
    assert not (tmp_path / "a" / "record.json").exists()
    said = []
    execute_stack(plans, watch=Watch(say=said.append))
    assert sum("Resuming at step" in sentence for sentence in said) == 2
    assert losses(tmp_path / "b") == execute(plan("alone", seed=3, steps_per_report=1))["losses"]


def test_a_stack_refuses_a_folder_of_another_run(plan):
    execute(plan("a"))
    with pytest.raises(UserError, match="holds another run"):
        execute_stack([plan("a", seed=9), plan("b")])

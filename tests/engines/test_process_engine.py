"""Local processes: how many runs side by side, and which GPUs and threads each gets."""

import dataclasses
import typing
from pathlib import Path

import pytest

from mlx_forget.engines import Demand, Task
from mlx_forget.engines.processes import ProcessEngine, num_workers
from mlx_forget.errors import UserError
from mlx_forget.sweeps.grid import Resources
from mlx_forget.training.watch import Watch


class Started:
    """Stands for a child; remembers what it was told."""

    seen: typing.ClassVar[list] = []

    def __init__(self, task, variables=None):
        self.seen.append((task.title, variables))
        self.code = None

    def poll(self):
        return self.code


def pool(monkeypatch, *, gpus, workers=None, per_run=None):
    monkeypatch.setattr("mlx_forget.engines.processes.Child", Started)
    Started.seen = []
    demand = Demand(
        Path("s"),
        workers,
        Resources(gpus=per_run),
        uses_gpu=True,
        gpus=tuple(map(str, range(gpus))),
        gpu_variable="CUDA_VISIBLE_DEVICES",
    )
    return ProcessEngine(demand, Watch())


def fill(engine, count=9):
    given = engine.resources(Resources(), num_tasks=count)
    for number in range(count):
        task = Task(f"t{number}", (Path(f"r{number}"),), Path("log"), given)
        if engine.accepts(task):
            engine.start(task)
    return [variables["CUDA_VISIBLE_DEVICES"] for _, variables in Started.seen]


def test_each_run_has_a_gpu_to_itself_and_gives_it_back(monkeypatch):
    engine = pool(monkeypatch, gpus=3)
    assert fill(engine) == ["0", "1", "2"]
    next(child for task, (child, _) in engine._running.items() if task.title == "t1").code = 0
    assert [task.title for task, _ in engine.ended()] == ["t1"]
    assert fill(engine, 1)[3:] == ["1"]


def test_a_run_on_two_gpus_has_both(monkeypatch):
    assert fill(pool(monkeypatch, gpus=5, per_run=2)) == ["0,1", "2,3"]


def test_more_workers_than_gpus_share_them_evenly(monkeypatch):
    assert sorted(fill(pool(monkeypatch, gpus=2, workers=4))) == ["0", "0", "1", "1"]


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    with pytest.raises(UserError, match="asks for 4 GPUs, and this machine has 2"):
        fill(pool(monkeypatch, gpus=2, per_run=4))


def test_the_one_accelerator_of_a_machine_needs_no_confining(monkeypatch):
    engine = pool(monkeypatch, gpus=0)
    assert engine.resources(Resources(gpus=1), num_tasks=3).gpus == 0
    with pytest.raises(UserError, match="asks for 4 GPUs, and this machine has 0"):
        engine.resources(Resources(gpus=4), num_tasks=3)
    without = ProcessEngine(Demand(Path("s")), Watch())
    with pytest.raises(UserError, match="give --gpus 0"):
        without.resources(Resources(gpus=1), num_tasks=3)


def test_as_many_runs_side_by_side_as_have_their_gpus():
    demand = Demand(Path("s"), uses_gpu=True, gpus=tuple("01234567"))
    assert [num_workers(demand, Resources(gpus=gpus)) for gpus in (None, 0.5, 1, 4, 8)] == [8, 16, 8, 2, 1]
    assert num_workers(dataclasses.replace(demand, resources=Resources(gpus=2)), Resources(gpus=8)) == 4


def test_a_single_base_gets_every_thread(monkeypatch):
    monkeypatch.setattr("mlx_forget.engines.processes.num_cores", lambda: 8)
    engine = ProcessEngine(Demand(Path("s"), workers=4), Watch())
    assert engine.resources(Resources(), num_tasks=1).threads == 8
    assert engine.resources(Resources(), num_tasks=30).threads == 2
    assert engine.resources(Resources(threads=3), num_tasks=1).threads == 3

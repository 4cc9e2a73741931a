"""Which run starts when, and what becomes of one that fails, dies, or is trained by someone else: with an engine that follows a script."""

import fcntl
import json
import os
import shutil
import socket
import subprocess

import pytest

from mlx_forget.engines import Engine, Exit
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.records import REQUESTED, read_record, write_record
from mlx_forget.runs.missing import PLANNED, missing_lines, missing_runs, note_planned, planned
from mlx_forget.sweeps import dispatch
from mlx_forget.sweeps.dispatch import FAILURE, execute_sweep, unfinished_strangers
from mlx_forget.sweeps.grid import Recipe, Resources
from mlx_forget.sweeps.sweep import plan_sweep, stack_sweep
from mlx_forget.training.watch import Watch
from tests.bigrams import CONFIG
from tests.fakes import add_fake_backend


class ScriptedEngine(Engine):
    """Ends every task at once, as the script says; a task that is not in it is done."""

    def __init__(self, script=(), places=2):
        self.script = {title: list(exits) for title, exits in dict(script).items()}
        self.places = places
        self.started, self.running, self.stopped, self.closed = [], [], False, False

    def resources(self, asked, *, num_tasks):
        return asked.over(Resources(threads=1, gpus=0.0))

    def accepts(self, task):
        return len(self.running) < self.places

    def start(self, task):
        self.started.append(task.title)
        self.running.append(task)

    def ended(self):
        found, self.running = self.running, []
        return [(task, self._end(task)) for task in found]

    def _end(self, task):
        ending = self.script[task.title].pop(0) if self.script.get(task.title) else "finished"
        if isinstance(ending, Exit):
            return ending
        for folder in task.folders:
            run_id = folder.name.split("-")[0]
            write_record(folder, {"schema_version": 1, "run_id": run_id, "status": ending, "reason": "the script says so"})
        return Exit(1 if ending == "diverged" else 0)

    def stop(self):
        self.stopped = True

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    add_fake_backend(monkeypatch, "bigram")
    monkeypatch.setattr(dispatch, "_SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(dispatch, "_SECONDS_BETWEEN_PROBES", 0)
    monkeypatch.setattr("mlx_forget.training.plan.forget_home", lambda: tmp_path / "home")


@pytest.fixture
def plan(tmp_path):
    def make(grid, **config):
        return plan_sweep(Recipe("r", CONFIG | config, grid), tmp_path / "sweep")

    return make


def states(jobs):
    return {job.title: job.state for job in jobs}


def test_every_base_is_trained_once_and_before_its_runs(plan):
    engine = ScriptedEngine()
    jobs = execute_sweep(plan({"base.seed": [0, 1], "p": ["0", "5%"]}), engine)
    assert set(states(jobs).values()) == {"done"}
    assert sorted(engine.started[:2]) == ["base 0.16m, seed 0", "base 0.16m, seed 1"]
    assert len(engine.started) == 2 + 4
    assert engine.closed


def test_what_runs_of_a_sweep_read_is_opened_once(plan, monkeypatch, tmp_path):
    from mlx_forget.pipeline import opened

    seen = []
    for name in ("open_store", "load_vocabulary"):
        real = getattr(opened, name)
        monkeypatch.setattr(opened, name, lambda path, real=real: seen.append(path) or real(path))
    sweep = plan({"p": ["0", "5%"], "base.seed": [0, 1], "seed": [0, 1]})
    stores = {id(store) for job in sweep.jobs for store in (*job.plan.stores.values(), *job.plan.base.stores.values())}
    assert len(sweep.jobs) == 8
    assert len(stores) == 2
    assert len(seen) == len(set(seen)) == 3, "two stores and a tokenizer"


def test_runs_of_one_base_do_not_wait_for_another(plan):
    engine = ScriptedEngine({"base 0.16m, seed 1": [Exit(None), Exit(None)]}, places=1)
    execute_sweep(plan({"base.seed": [0, 1]}), engine)
    assert engine.started.index("base.seed = 0") < len(engine.started) - 2


def test_what_is_done_is_not_trained_again(plan):
    execute_sweep(plan({"p": ["0"]}), ScriptedEngine())
    engine = ScriptedEngine()
    jobs = execute_sweep(plan({"p": ["0", "5%"]}), engine)
    assert engine.started == ["p = 5%"]
    assert set(states(jobs).values()) == {"done"}


def test_a_failed_run_is_listed_left_alone_and_trained_again_on_request(plan):
    grid = {"p": ["0", "5%"]}
    engine = ScriptedEngine({"p = 0": [Exit(2, "no such thing")]})
    jobs = execute_sweep(plan(grid), engine)
    assert states(jobs) == {"base 0.16m, seed 0": "done", "p = 0": "failed", "p = 5%": "done"}
    failed = next(job for job in jobs if job.state == "failed")
    assert json.loads((failed.plan.folder / FAILURE).read_text())["reason"] == "no such thing"
    again = ScriptedEngine()
    jobs = execute_sweep(plan(grid), again)
    assert again.started == []
    assert [job.reason for job in jobs if job.state == "failed"] == ["no such thing"]
    jobs = execute_sweep(plan(grid), again, retry_failed=True)
    assert again.started == ["p = 0"]
    assert not (failed.plan.folder / FAILURE).exists()
    assert set(states(jobs).values()) == {"done"}


def test_a_diverged_run_has_failed_and_its_record_is_set_aside_for_a_retry(plan):
    jobs = execute_sweep(plan({"p": ["0"]}), ScriptedEngine({"p = 0": ["diverged"]}))
    assert jobs[-1].state == "failed"
    assert jobs[-1].reason == "diverged: the script says so"
    engine = ScriptedEngine()
    assert execute_sweep(plan({"p": ["0"]}), engine)[-1].state == "failed"
    assert engine.started == []
    assert execute_sweep(plan({"p": ["0"]}), engine, retry_failed=True)[-1].state == "done"
    assert (jobs[-1].plan.folder / "diverged-record.json").exists()


def test_runs_of_a_base_that_failed_are_blocked_and_the_others_go_on(plan):
    jobs = execute_sweep(plan({"base.seed": [0, 1]}), ScriptedEngine({"base 0.16m, seed 0": [Exit(1, "broken")]}))
    assert states(jobs) == {
        "base 0.16m, seed 0": "failed",
        "base 0.16m, seed 1": "done",
        "base.seed = 0": "blocked",
        "base.seed = 1": "done",
    }


def test_a_run_whose_worker_died_is_taken_up_again_and_not_for_ever(plan):
    said = []
    jobs = execute_sweep(
        plan({"p": ["0", "5%"]}),
        engine := ScriptedEngine({"p = 0": [Exit(None, "its worker died"), Exit(137)], "p = 5%": [Exit(137)] * 9}),
        watch=Watch(say=said.append),
    )
    assert states(jobs) == {"base 0.16m, seed 0": "done", "p = 0": "done", "p = 5%": "failed"}
    assert engine.started.count("p = 0") == 3
    assert engine.started.count("p = 5%") == 4
    assert "p = 0: its worker died. It is taken up again." in said
    assert "p = 5%: it was ended from without (SIGKILL). It is taken up again." in said


def test_a_run_that_gets_further_each_time_may_lose_any_number_of_workers(plan):
    class Creeping(ScriptedEngine):
        def _end(self, task):
            count = self.started.count(task.title)
            (task.folders[0] / "progress.json").write_text(json.dumps({"step": count}))
            return super()._end(task)

    sweep = plan({"p": ["0"]})
    engine = Creeping({"p = 0": [Exit(137)] * 9})
    # Progress is read while a task runs: here, between its start and its end.
    start = engine.start

    def begin(task):
        start(task)
        sweep.jobs[0].progress = {"step": len(engine.started)}

    engine.start = begin
    assert execute_sweep(sweep, engine)[-1].state == "done"


def test_runs_of_a_stack_are_one_task_and_end_each_for_itself(plan):
    sweep = stack_sweep(plan({"seed": [0, 1, 2, 3]}), 4, num_processes=1)
    engine = ScriptedEngine({"seed = 0 and 3 more": [Exit(None)]})
    jobs = execute_sweep(sweep, engine)
    assert engine.started == ["base 0.16m, seed 0", "seed = 0 and 3 more", "seed = 0 and 3 more"]
    assert set(states(jobs).values()) == {"done"}


def test_what_recipes_give_different_resources_is_not_stacked(plan):
    recipe = Recipe("r", CONFIG, {"seed": [0, 1]}, zips=[{"p": ["0", "5%"], "resources.threads": [1, 2]}])
    sweep = stack_sweep(plan_sweep(recipe, plan({}).folder), 8, num_processes=1)
    assert sorted(len(stack) for stack in sweep.stacks) == [2, 2]


def test_a_run_that_another_sweep_is_training_is_left_to_it(plan):
    sweep = plan({"p": ["0", "5%"]})
    folder = sweep.jobs[0].plan.folder
    folder.mkdir(parents=True)
    seen = []
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def finish(jobs):
            if sweep.jobs[0].state == "elsewhere":
                seen.append("elsewhere")
            if seen == ["elsewhere"] * 3:
                run_id = sweep.jobs[0].plan.run_id
                write_record(folder, {"schema_version": 1, "run_id": run_id, "status": "finished", "reason": "there"})
                fcntl.flock(lock, fcntl.LOCK_UN)

        engine = ScriptedEngine()
        jobs = execute_sweep(sweep, engine, on_change=finish)
    assert "p = 0" not in engine.started
    assert set(states(jobs).values()) == {"done"}


def test_a_stop_is_passed_on_once_and_nothing_new_starts(plan):
    engine = ScriptedEngine({"p = 0": [Exit(143)]}, places=1)
    sweep = plan({"p": ["0", "5%"]})
    with pytest.raises(Interrupted) as stop:
        execute_sweep(sweep, engine, watch=Watch(interrupted=lambda: 15 if "p = 0" in engine.started else None))
    assert stop.value.signal == 15
    assert engine.stopped
    assert engine.closed
    assert "p = 5%" not in engine.started
    assert not (sweep.jobs[0].plan.folder / FAILURE).exists()


def test_a_damaged_record_is_named_and_holds_nothing_up(plan):
    sweep = plan({"p": ["0", "5%"]})
    folder = sweep.jobs[0].plan.folder
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"schema_ver')
    jobs = execute_sweep(sweep, ScriptedEngine())
    assert states(jobs)["p = 5%"] == "done"
    assert "record.json is damaged" in next(job.reason for job in jobs if job.state == "failed")
    jobs = execute_sweep(plan({"p": ["0", "5%"]}), ScriptedEngine(), retry_failed=True)
    assert set(states(jobs).values()) == {"done"}
    assert read_record(folder) is not None


def test_unfinished_folders_of_no_run_of_the_sweep_are_named(plan):
    sweep = plan({"p": ["0"]})
    for name, content in (("half", "config.yaml"), ("whole", "record.json"), ("own", None), (".sweep-x", "config.yaml")):
        folder = sweep.folder / name if content else sweep.jobs[0].plan.folder
        folder.mkdir(parents=True)
        (folder / (content or "config.yaml")).write_text("{}")
    assert [path.name for path in unfinished_strangers(sweep)] == ["half"]


def test_what_a_sweep_planned_and_did_not_end_is_known_by_its_title(plan):
    """To whoever reads the folder later, also where a run was not begun; another sweep into the folder adds to it."""
    sweep = plan({"p": ["0", "1%", "5%"]})
    execute_sweep(sweep, ScriptedEngine({"p = 1%": [Exit(1, "out of luck")], "p = 5%": [Exit(2, "no room")]}))
    folder, (done, failed, stopped) = sweep.folder, sweep.jobs
    found = {one.title: one.state for one in missing_runs(folder)}
    assert found == {failed.title: "failed: out of luck", stopped.title: "failed: no room"}
    (stopped.plan.folder / FAILURE).unlink()
    assert {one.title: one.state for one in missing_runs(folder)}[stopped.title] == "begun, without an evaluation yet"
    shutil.rmtree(stopped.plan.folder)
    assert {one.title: one.state for one in missing_runs(folder)}[stopped.title] == "not begun"
    lines = missing_lines(missing_runs(folder))
    assert lines[0].startswith("2 runs have not ended and are not in this figure")
    assert lines[1] == "  p = 1%: failed: out of luck"
    note_planned(folder, {"other": "another"})
    assert list(planned(folder)) == [job.plan.folder.name for job in (done, failed, stopped)] + ["other"]
    # What no sweep noted down is told by its folder, and a note that cannot be read is none.
    (folder / PLANNED).write_text("{")
    assert [one.title for one in missing_runs(folder)] == [failed.plan.folder.name]
    assert missing_lines([]) == []


def test_the_configuration_that_is_asked_for_is_whole(plan):
    sweep = plan({"p": ["0"]})
    execute_sweep(sweep, ScriptedEngine())
    text = (sweep.jobs[0].plan.folder / REQUESTED).read_text()
    assert "num_threads: 1" in text
    assert not list(sweep.jobs[0].plan.folder.glob(".*.part"))


def test_what_a_killed_sweep_left_half_written_is_removed_and_that_of_a_living_one_is_not(plan):
    sweep = plan({"p": ["0"]})
    folder = sweep.jobs[0].plan.folder
    folder.mkdir(parents=True)
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (REQUESTED, FAILURE):
        for number in (gone.pid, os.getppid()):
            (folder / f".{name}.{socket.gethostname()}.{number}.part").write_text("half of")
        (folder / f".{name}.elsewhere.{gone.pid}.part").write_text("of another machine")
    execute_sweep(sweep, ScriptedEngine())
    assert sweep.jobs[0].state == "done"
    left = {
        f".{name}.{who}.part"
        for name in (REQUESTED, FAILURE)
        for who in (f"{socket.gethostname()}.{os.getppid()}", f"elsewhere.{gone.pid}")
    }
    assert {path.name for path in folder.glob(".*.part")} == left


def test_a_request_that_cannot_be_written_leaves_nothing_beside_it(plan, monkeypatch):
    def sync(path):
        raise OSError(28, "No space left on device")

    sweep = plan({"p": ["0"]})
    monkeypatch.setattr(dispatch, "sync", sync)
    with pytest.raises(OSError, match="No space left"):
        execute_sweep(sweep, ScriptedEngine())
    assert not list(sweep.jobs[0].plan.folder.glob(".*.part"))


def test_two_runs_with_one_id_are_refused(plan):
    with pytest.raises(UserError, match="Two runs of the grid are the same run"):
        plan({"p": ["1%", "0.01"]})


def test_an_axis_that_changes_the_tokenizer_of_a_shared_start_is_refused(plan, tmp_path):
    from mlx_forget.training.run import execute

    base = plan({"p": ["0"]}).bases[0]
    execute(base.plan)
    start = str(base.plan.folder)
    with pytest.raises(UserError, match="The axis 'vocab_size' changes the tokenizer"):
        plan({"vocab_size": [512, 600]}, init=start)
    assert len(plan({"seed": [0, 1]}, init=start).jobs) == 2

"""Every engine with real processes of the NumPy bigram: the same records as in one process, whatever dies on the way."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_forget.engines import Demand, Task, open_engine
from mlx_forget.engines.child import Child, command_of
from mlx_forget.engines.lease import Leaseholder, attend
from mlx_forget.errors import UserError
from mlx_forget.records import REQUESTED
from mlx_forget.sweeps.dispatch import execute_sweep
from mlx_forget.sweeps.grid import Recipe, Resources
from mlx_forget.sweeps.sweep import plan_sweep
from mlx_forget.training.folder import is_held
from mlx_forget.training.watch import Watch
from tests.bigrams import CONFIG, install, records
from tests.fakes import add_fake_backend

GRID = {"p": ["0", "1%", "5%"], "seed": [0, 1, 2, 3], "base.seed": [0, 1]}


def has(module):
    return importlib.util.find_spec(module) is not None


needs_ray = pytest.mark.skipif(not has("ray"), reason="Ray is not installed")
needs_submitit = pytest.mark.skipif(not has("submitit"), reason="submitit is not installed")


@pytest.fixture(scope="module")
def child_path(tmp_path_factory, cache_folder):
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture
def bigram(monkeypatch, child_path):
    """This process and its children know the bigram; children wait for no lock longer than a test."""
    add_fake_backend(monkeypatch, "bigram")
    monkeypatch.setenv("PYTHONPATH", child_path)


def sweep_of(folder, grid, zips=(), **config):
    return plan_sweep(Recipe("r", CONFIG | config, grid, zips=zips), folder)


# Three runs, two of them long enough to be caught.
THREE = [{"p": ["0", "1%", "5%"], "iters": [2, 600, 600]}]


def kill_worker(sweep):
    """An `on_change` that kills whoever attends to the first run that is under way, once."""
    killed = []

    def kill(jobs):
        # One that is nearly done would be so before the signal comes.
        running = [
            job for job in sweep.jobs if job.state == "running" and 2 <= job.progress.get("step", 0) <= job.plan.num_steps // 2
        ]
        if killed or not running:
            return
        folder = running[0].plan.folder
        own = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        pids = [int(mark.read_text().split()[1]) for mark in sweep.folder.glob(f".sweep-*/attended/{own}") if mark.read_text()]
        if not pids:
            pids = children_of(os.getpid(), str(folder))
        if pids:
            killed.extend(pids[:1])
            os.kill(pids[0], signal.SIGKILL)

    return kill, killed


def children_of(parent, word):
    """Processes below one, whose command line has a word in it."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()[
        1:
    ]
    rows = [(int(line.split()[0]), int(line.split()[1]), line) for line in listed]
    return [pid for pid, above, line in rows if above == parent and word in line]


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def three(tmp_path_factory, child_path):
    """The records of the three runs, trained in this process."""
    patch = pytest.MonkeyPatch()
    add_fake_backend(patch, "bigram")
    folder = tmp_path_factory.mktemp("three")
    sweep = sweep_of(folder, {}, THREE)
    execute_sweep(sweep, open_engine("in-process", Demand(folder), Watch()))
    patch.undo()
    assert len(records(folder)) == 3
    return records(folder)


@pytest.mark.parametrize(
    "engine, settings",
    [
        ("processes", {}),
        pytest.param("ray", {}, marks=needs_ray),
        pytest.param("slurm", {"cluster": "local"}, marks=needs_submitit),
    ],
)
def test_a_worker_is_killed_and_every_run_ends_once_with_the_same_record(bigram, three, tmp_path, engine, settings):
    said = []
    sweep = sweep_of(tmp_path / "s", {}, THREE)
    demand = Demand(sweep.folder, workers=2, settings=settings, say=said.append)
    watch = Watch(say=said.append)
    kill, killed = kill_worker(sweep)
    jobs = execute_sweep(sweep, open_engine(engine, demand, watch), on_change=kill, watch=watch)
    assert {job.state for job in jobs} == {"done"}, [(job.title, job.reason) for job in jobs]
    assert killed
    assert any("It is taken up again." in sentence for sentence in said)
    assert records(sweep.folder) == three
    assert not list(sweep.folder.glob(".sweep-*"))


def command(recipe, folder, *more):
    return [sys.executable, "-m", "mlx_forget", "sweep", str(recipe), "--output", str(folder), *more]


def write_recipe(folder, grid):
    path = Path(folder) / "r.json.yaml"
    path.write_text(json.dumps({"name": "r", "config": CONFIG, "grid": grid}))
    return path


def interrupt(process, folder, number, count):
    """Signal a sweep once it has so many records and trains others; wait until nothing of it runs any more."""

    def at_work():
        return len(records(folder)) >= count and any(is_held(path) for path in Path(folder).glob("*-bigram"))

    wait_until(lambda: at_work() or process.poll() is not None, 300)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    # Jobs of a cluster outlive a killed sweep until its lease lapses.
    wait_until(lambda: not any(is_held(path) for path in Path(folder).glob("*-bigram")), 300)
    return err


def killed_twice(tmp_path, child_path, grid, count, *options):
    """A sweep that is terminated, killed, and then left alone; the records of each stage must be those of one in this process."""
    recipe = write_recipe(tmp_path, grid)
    environment = os.environ | {"PYTHONPATH": child_path}
    folder = tmp_path / "s"
    for number, code, done in ((signal.SIGINT, 130, 2), (signal.SIGKILL, -9, count // 2)):
        process = subprocess.Popen(
            command(recipe, folder, *options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        err = interrupt(process, folder, number, done)
        assert process.returncode == code, err
        assert len(records(folder)) < count, "the sweep ended before it could be interrupted"
    result = subprocess.run(command(recipe, folder, *options, "--json"), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {row["state"] for row in json.loads(result.stdout)["runs"]} == {"done"}
    return records(folder)


@pytest.fixture
def uninterrupted(bigram, tmp_path):
    def train(grid):
        folder = tmp_path / "uninterrupted"
        execute_sweep(sweep_of(folder, grid), open_engine("in-process", Demand(folder), Watch()))
        return records(folder)

    return train


def test_24_runs_killed_twice_end_with_24_equal_records(tmp_path, child_path, uninterrupted):
    found = killed_twice(tmp_path, child_path, GRID, 24, "--stack", "3", "--workers", "2")
    assert len(found) == 24
    assert found == uninterrupted(GRID)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        ["--engine", "processes"],
        ["--engine", "in-process"],
        pytest.param(["--engine", "ray", "--workers", "4"], marks=needs_ray),
        pytest.param(["--engine", "slurm", "--slurm", "cluster=local"], marks=needs_submitit),
        pytest.param(["--engine", "ray", "--stack", "4"], marks=needs_ray),
    ],
    ids=" ".join,
)
def test_24_runs_killed_twice_on_every_engine(tmp_path, child_path, uninterrupted, options):
    found = killed_twice(tmp_path, child_path, GRID, 24, *options)
    assert len(found) == 24
    assert found == uninterrupted(GRID)


def task_of(sweep, job, **resources):
    job.plan.folder.mkdir(parents=True, exist_ok=True)
    from mlx_forget.config_layers import to_yaml

    (job.plan.folder / REQUESTED).write_text(to_yaml(job.plan.config))
    return Task(
        job.title, (job.plan.folder.absolute(),), job.log.absolute(), Resources(threads=1, gpus=0.0).over(Resources(**resources))
    )


def test_a_worker_whose_sweep_is_gone_ends_its_run_with_a_checkpoint(bigram, tmp_path):
    sweep = sweep_of(tmp_path / "s", {"p": ["0"]}, iters=100_000, steps_per_eval=10_000)
    holder = Leaseholder(sweep.folder, {}, seconds_to_lapse=2)
    folder = sweep.jobs[0].plan.folder

    def die():
        wait_until((folder / "progress.json").exists)
        # A sweep that is killed beats no more, and its lease stays behind.
        holder._closed.set()

    threading.Thread(target=die).start()
    assert attend(task_of(sweep, sweep.jobs[0]), holder.lease) == 143
    assert not is_held(folder)
    log = (folder / "log.txt").read_text()
    assert "the same command goes on from there" in log, log
    assert (folder / "checkpoints" / "last" / "state.json").exists()


@pytest.mark.full
@needs_submitit
def test_a_preempted_job_writes_a_checkpoint_and_comes_back(bigram, tmp_path):
    import submitit

    from mlx_forget.engines.slurm_arrays import AttendedJob

    sweep = sweep_of(tmp_path / "s", {"p": ["0"]}, iters=100_000)
    folder = sweep.jobs[0].plan.folder
    holder = Leaseholder(sweep.folder, {})
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(AttendedJob(), task_of(sweep, sweep.jobs[0]), holder.lease)
    wait_until((folder / "progress.json").exists)
    # The signal of Slurm before a job's time is up, to the process that attends to the run.
    (mark,) = (holder.lease.folder / "attended").iterdir()
    os.kill(int(mark.read_text().split()[1]), signal.SIGUSR2)
    wait_until(lambda: "Resuming at step" in (folder / "log.txt").read_text())
    holder.stop()
    assert job.result() == 143
    holder.close()


def test_a_worker_that_does_not_see_the_sweeps_folder_says_so(tmp_path, monkeypatch):
    holder = Leaseholder(tmp_path / "s", {}, seconds_to_lapse=0.5)
    holder.close()
    with pytest.raises(UserError, match="must share the sweep's folder"):
        attend(Task("t", (tmp_path / "r",), tmp_path / "log", Resources()), holder.lease)


def test_a_task_that_begins_after_the_stop_ends_at_once(tmp_path):
    holder = Leaseholder(tmp_path / "s", {})
    holder.stop()
    assert attend(Task("t", (tmp_path / "r",), tmp_path / "log", Resources()), holder.lease) == 143
    holder.close()
    assert not (tmp_path / "s" / "r").exists()


def test_leases_of_killed_sweeps_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    first = Leaseholder(tmp_path, {})
    stale = first.lease.folder.with_name(first.lease.folder.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    stale.mkdir()
    second = Leaseholder(tmp_path, {})
    assert not stale.exists()
    assert first.lease.folder.exists()
    first.close()
    second.close()


def test_several_gpus_are_ranks_of_one_torchrun_behind_a_guard(tmp_path):
    folders = (tmp_path / "a", tmp_path / "b")
    one = command_of(Task("t", folders, tmp_path / "log", Resources(gpus=1)))
    assert one[:4] == [sys.executable, "-m", "mlx_forget", "train"]
    assert one[-2:] == ["--stack-with", str(folders[1])]
    several = command_of(Task("t", folders[:1], tmp_path / "log", Resources(gpus=4)))
    assert several[2] == "mlx_forget.engines.guard"
    assert several[5:11] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "mlx_forget"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel looks after it on Linux")
def test_a_guarded_launcher_is_terminated_with_its_parent(tmp_path):
    sleep = "import time; time.sleep(600)"
    script = (
        "import os, subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-m', 'mlx_forget.engines.guard', str(os.getpid()), sys.executable, '-c', {sleep!r}],"
        " start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
        "p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    launcher = int(parent.stdout.readline())
    wait_until(lambda: sleep.encode() in Path(f"/proc/{launcher}/cmdline").read_bytes())
    wait_until(lambda: b"guard" not in Path(f"/proc/{launcher}/cmdline").read_bytes())
    parent.kill()
    parent.communicate()

    def ended():
        try:
            return "Z" in Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True

    wait_until(ended, 20)


def test_killing_a_child_takes_what_it_started_along(bigram, tmp_path):
    sweep = sweep_of(tmp_path / "s", {"p": ["0"]}, iters=100_000)
    folder = sweep.jobs[0].plan.folder
    child = Child(task_of(sweep, sweep.jobs[0]))
    wait_until(lambda: is_held(folder))
    child.kill()
    assert child.poll() == 137
    assert not is_held(folder)


def processes_of(folder):
    """Command lines of processes that are at work in a folder."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if str(folder) in line]


@pytest.mark.full
@pytest.mark.skipif(not has("torch"), reason="torchrun comes with PyTorch")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_of_two_ranks_stops_with_the_sweep_and_goes_on(tmp_path, number, code):
    recipe = tmp_path / "r.yaml"
    keys = CONFIG | {"backend": "cuda", "iters": 300, "steps_per_eval": 20}
    recipe.write_text(json.dumps({"config": keys | {"resources": {"ranks": 2, "threads": 1}}, "grid": {"p": ["5%"]}}))
    folder = tmp_path / "s"
    process = subprocess.Popen(command(recipe, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(folder.glob("*/checkpoints/last")), 240)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == code
    # The launcher, its guard and both ranks: those of a killed sweep write a checkpoint first.
    wait_until(lambda: not processes_of(folder), 120 if number == signal.SIGKILL else 1)
    assert not list(folder.glob("*/record.json"))
    result = subprocess.run(command(recipe, folder), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (record,) = (json.loads(path.read_text()) for path in folder.glob("*/record.json"))
    assert record["world_size"] == 2
    assert record["num_resumes"] >= 1
    straight = tmp_path / "straight"
    result = subprocess.run(command(recipe, straight), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert records(folder) == records(straight)
    assert not processes_of(tmp_path)

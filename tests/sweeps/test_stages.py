"""Continual learning: stages that start from one another, what they replay, and the matrix of their losses."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import open_checkpoint
from mlx_forget.errors import UserError
from mlx_forget.pipeline.sides import Blend
from mlx_forget.records import RECORD, find_runs, read_record
from mlx_forget.report.contents import make_report
from mlx_forget.report.page import render
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.studies import loss_matrix
from mlx_forget.studies.loss_matrix import CSV_COLUMNS, LossMatrix, measure, read_matrices, summary, table_lines, write_matrices
from mlx_forget.sweeps.grid import Recipe, read_recipe
from mlx_forget.sweeps.stages import execute_stages, plan_stages, titled_stages
from mlx_forget.training.run import execute, start_trainer, trainer_spec
from mlx_forget.training.watch import Watch
from tests.fakes import add_fake_backend

TINY = {"model": "0.16m", "vocab_size": 512, "target_tokens": 20_000, "iters": 6, "batch_size": 8, "eval_rows": 16,
        "steps_per_eval": 2, "num_threads": 1, "base": {"iters": 8, "steps_per_eval": 4}}  # fmt: skip
NETWORKS = available_backends()
STAGES = ({"target": "code"}, {"target": "math", "iters": 4})


@pytest.fixture(autouse=True)
def in_a_folder_with_the_fake(monkeypatch, tmp_path):
    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)


def recipe(*stages, backend="fake", arms=None, **config):
    return Recipe("r", {**TINY, "backend": backend, **config}, {}, arms=arms or {}, stages=stages or STAGES)


def run_here(sweep):
    """Runs a sweep in this process, base first."""
    for job in (*sweep.bases, *sweep.jobs):
        assert execute(job.plan)["status"] in ("finished", "stopped")
        job.state = "done"
    return [*sweep.bases, *sweep.jobs]


def run_all(chains, folder=Path("s"), run=run_here):
    matrices = []

    def done(folders):
        matrices[:] = [measure(chain, own, matrices) for chain, own in zip(chains, folders, strict=True)]

    jobs = execute_stages(chains, folder, run=run, done=done)
    return jobs, matrices


@pytest.mark.parametrize("backend", ["fake", *available_backends()])
def test_each_stage_starts_where_the_one_before_ended(backend):
    chains = plan_stages(recipe(backend=backend, method="kl-replay", coefficient=1.0))
    _, (matrix,) = run_all(chains)
    first, second = (read_record(Path("s") / name) for name in matrix.runs)
    assert (first["config"]["target"], second["config"]["target"]) == ("code", "math")
    assert second["init"] == first["run_id"]
    assert second["learning_rate"] == pytest.approx(first["learning_rate"]), "not a share of a share"
    assert second["num_steps"] == 4
    assert matrix.rows == ("start", "code", "math")
    assert matrix.columns == ("prose", "code", "math")
    # What the runs read themselves, and nothing else, stands where they read it.
    for i, record in enumerate((first, second)):
        start, end = record["losses"]["start"], record["losses"]["end"]
        assert matrix.loss(i, 0).mean == pytest.approx(start["pretrain_val"], abs=1e-6)
        assert matrix.loss(i, i + 1).mean == pytest.approx(start["target_val"], abs=1e-6)
        assert matrix.loss(i + 1, 0).mean == pytest.approx(end["pretrain_val"], abs=1e-6)
        assert matrix.loss(i + 1, i + 1).mean == pytest.approx(end["target_val"], abs=1e-6)
    report = make_report(Path("s"))
    starts = {"auto", f"run {first['run_id']}, which learnt code"}
    assert starts == set(report.recipe.axes["init"]), "not a path, which means nothing to who reads it elsewhere"
    assert "checkpoints" not in render(report)
    # The samples that the second stage replays are those of its own start model.
    stores = {record["data"]["replay:self"]["fingerprint"] for record in (first, second)}
    assert len(stores) == 2


@pytest.mark.skipif(not available_backends(), reason="the fake has no adapters")
def test_a_stage_of_adapters_starts_from_those_of_the_one_before_fused():
    backend = NETWORKS[-1]
    chains = plan_stages(recipe(backend=backend, method="plain", fine_tune_type="lora", lora_rank=4, learning_rate=1e-2))
    _, (matrix,) = run_all(chains)
    first, second = (read_record(Path("s") / name)["losses"] for name in matrix.runs)
    assert second["start"]["pretrain_val"] == pytest.approx(first["end"]["pretrain_val"], abs=1e-5)
    assert first["end"]["pretrain_val"] != pytest.approx(first["start"]["pretrain_val"], abs=1e-4)
    for i, losses in enumerate((first, second)):
        assert matrix.loss(i + 1, 0).mean == pytest.approx(losses["end"]["pretrain_val"], abs=1e-5)
        assert matrix.loss(i + 1, i + 1).mean == pytest.approx(losses["end"]["target_val"], abs=1e-5)


def test_the_reference_of_a_stage_is_the_model_it_starts_from():
    chains = plan_stages(recipe(method="kl-replay", coefficient=1.0))
    _, (matrix,) = run_all(chains)
    folder = Path("s") / matrix.runs[0]
    plan = chains[0].plan(1, folder)
    trainer = load_backend("fake")(trainer_spec(plan))
    plan = start_trainer(plan, trainer, Watch())
    batch = plan.stream.batch(0)
    np.testing.assert_array_equal(trainer.compare(batch.tokens, batch.loss_mask).kl, 0)
    assert open_checkpoint(folder / "checkpoints" / "last").state["run_id"] == plan.start.state["run_id"]


def test_the_best_checkpoint_goes_on_where_it_is_kept():
    stages = ({"target": "code", "keep": "best", "iters": 40, "learning_rate": 0.3, "target_tokens": 2000}, {"target": "math"})
    chains = plan_stages(recipe(*stages))
    _, (matrix,) = run_all(chains)
    losses = read_record(Path("s") / matrix.runs[0])["losses"]
    assert losses["best"]["step"] < losses["end"]["step"]
    assert matrix.loss(1, 1).mean == pytest.approx(losses["best"]["target_val"], abs=1e-6)
    after = read_record(Path("s") / matrix.runs[1])["losses"]["start"]
    assert after["pretrain_val"] == pytest.approx(losses["best"]["pretrain_val"], abs=1e-6)


def test_done_stages_are_neither_trained_nor_measured_again(monkeypatch):
    chains = plan_stages(recipe(arms={"plain": {"method": "plain"}, "kept": {"method": "kl-replay"}}))
    assert [chain.label for chain in chains] == ["plain", "kept"]
    calls = []

    def fails_in_the_second_stage(sweep):
        calls.append(sweep)
        if len(calls) == 1:
            return run_here(sweep)
        for job in sweep.jobs:
            job.state = "failed"
        return sweep.jobs

    jobs, matrices = run_all(chains, run=fails_in_the_second_stage)
    assert [job.state for job in jobs] == ["done"] * 3 + ["failed"] * 2
    assert [matrix.rows for matrix in matrices] == [("start", "code")] * 2
    write_matrices(Path("s") / "stages.json", "r", matrices)
    before = {path: path.stat().st_mtime_ns for path in Path("s").glob(f"*/{RECORD}")}
    assert len(before) == 2
    known = read_matrices(Path("s") / "stages.json")
    loaded = []
    monkeypatch.setattr(loss_matrix, "_reader", lambda plan: loaded.append(plan) or load_backend("fake")(trainer_spec(plan)))
    again = plan_stages(recipe(arms={"plain": {"method": "plain"}, "kept": {"method": "kl-replay"}}))
    straight = [measure(chain, [Path("s") / own.runs[0]], known) for chain, own in zip(again, known, strict=True)]
    assert not loaded
    assert [summary(m) for m in straight] == [summary(m) for m in matrices]
    run_all(again)
    assert len(list(find_runs(Path("s")))) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_earlier_data_is_what_each_stage_learnt_from_in_equal_parts():
    stages = ({"target": "code", "target_tokens": 5000}, {"target": "math"}, {"target": "cpp", "method": "ntp-replay"})
    chain = plan_stages(recipe(*stages, method="kl-replay", replay_data="earlier"))[0]
    configs = [plan.config for plan in chain.plans]
    assert [config.replay_data for config in configs] == ["prose", "code=1/2,prose=1/2", "code=1/3,math=1/3,prose=1/3"]
    assert [dict(config.replay_limits) for config in configs] == [{}, {"code": 4992}, {"code": 4992, "math": 19_968}]
    execute(chain.plans[0].base)
    plan = chain.plan(2, Path(chain.plans[0].base.folder))
    replay = start_trainer(plan, load_backend("fake")(trainer_spec(plan)), Watch()).stream.replay
    assert isinstance(replay.subset, Blend)
    assert [member.num_rows for member in replay.subset.members[:2]] == [5000 // 128, 20_000 // 128]
    learnt = {tuple(row) for row in _rows(chain.plans[0].stream.target)}
    assert {tuple(row) for row in _rows(replay.subset.members[0])} == learnt
    plain = plan_stages(recipe(*STAGES, method="plain", replay_data="earlier"))[0].plans[1].config
    assert (plain.replay_data, dict(plain.replay_limits)) == ("self", {}), "a run without replay is the same run"


def _rows(subset):
    out = np.empty((subset.num_rows, subset.row_length + 1), np.int32)
    subset.read_placed(subset.place(np.arange(subset.num_rows)), out)
    return out.tolist()


def test_limits_of_replay_make_another_run_and_name_a_source():
    limited, free = (
        plan_stages(recipe({"target": "code", **keys}, {"target": "math"}, method="ntp-replay", replay_data="prose"))[0].plans[0]
        for keys in ({"replay_limits": {"prose": 2048}}, {})
    )
    assert limited.run_id != free.run_id
    with pytest.raises(UserError, match="replay_limits names cpp, which is no source of replay_data"):
        plan_stages(recipe(method="ntp-replay", replay_data="prose", replay_limits={"cpp": 1}))


WRONG = [
    (({"target": "code"},), "at least two"),
    (({"target": "code"}, {"target": "code"}), "Two stages are called 'code'"),
    (({"target": "code"}, {"target": "math", "init": "x"}), "starts from the one before"),
    (({"target": "code"}, {"target": "math", "keep": "last"}), "Unknown keep 'last'"),
    (({"target": "code"}, {"target": "nowhere.txt"}), "no file or folder nowhere.txt"),
    (({"target": "code"}, {"traget": "math"}), "Did you mean 'target'"),
    (({"target": "code", "pretrain": None, "init": None}, {"target": "math"}), "starts from the one before"),
]


@pytest.mark.parametrize("stages, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_stages_are_refused_before_anything_is_trained(stages, message):
    with pytest.raises(UserError, match=message):
        plan_stages(recipe(*stages))
    assert not Path("s").exists()


def test_a_recipe_with_wrong_stages_is_one_line(run_forget, tmp_path):
    for content, message in (
        ("stages: code", "must be a list"),
        ("stages: [code]", "must be a list"),
        ("stagess: []", "Did you mean"),
    ):
        (tmp_path / "r.yaml").write_text(content)
        code, _, err = run_forget("sweep", tmp_path / "r.yaml", "--dry-run")
        assert code == 2
        assert message in err


def test_stages_larger_than_the_disk_are_refused_before_anything_is_written(run_forget, tmp_path, monkeypatch):
    content = {"config": {**TINY, "backend": "fake"}, "stages": [dict(stage) for stage in STAGES]}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    free = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr("mlx_forget.sweeps.costs.shutil.disk_usage", lambda place: free)
    code, _, err = run_forget("sweep", tmp_path / "r.yaml", "--output", tmp_path / "s")
    assert code == 2
    assert "3 MB are free" in err
    assert not (tmp_path / "s").exists()


def test_a_dry_run_of_stages_prepares_nothing(run_forget, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGET_HOME", str(tmp_path / "home"))
    code, out, err = run_forget("sweep", "stages", "--dry-run", "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert [row["run_id"] for row in planned["runs"]] == [None] * 10
    assert "Not prepared yet" in planned["notes"][0]
    assert not list((tmp_path / "home").rglob("*.arrow"))
    assert not (tmp_path / "runs").exists()


def test_what_replays_earlier_data_is_outlined_when_only_the_first_corpora_are_there():
    (first, _), (second, _) = titled_stages(recipe(method="kl-replay", replay_data="earlier"))[0]
    assert (first.config.replay_data, second.config.replay_data) == (first.config.pretrain, "self")


def test_stages_may_use_what_the_recipe_lets_them():
    chains = plan_stages(recipe(resources={"threads": 3}))
    sweeps = []
    execute_stages(chains, Path("s"), run=lambda sweep: sweeps.append(sweep) or [*sweep.bases, *sweep.jobs])
    assert [job.resources.threads for job in (*sweeps[0].bases, *sweeps[0].jobs)] == [3, 3]


# --- the matrix ---


def matrix_of(losses, *, spread=0.0, first_stage=1):
    """A matrix of known means over four windows, two of which are `spread` above and two below."""
    windows = tuple(tuple(np.array([c + spread, c - spread, c + spread, c - spread]) for c in row) for row in losses)
    names = ("a", "b", "c")[: len(losses[0]) - first_stage]
    count = len(losses)
    return LossMatrix("kept", ("start", *names)[:count], ("old",) * first_stage + names, first_stage, windows,
                      tuple(f"r{i}" for i in range(count - 1)), tuple("w" * count), tuple("e" * len(losses[0])))  # fmt: skip


LOSSES = [[3.0, 5.0, 6.0, 7.0], [3.1, 4.0, 5.8, 6.9], [3.3, 4.3, 4.5, 6.5], [3.6, 4.4, 4.9, 5.0]]


def test_transfer_is_what_its_definition_says():
    matrix = matrix_of(LOSSES)
    assert matrix.backward_transfer.mean == pytest.approx(-((4.4 - 4.0) + (4.9 - 4.5)) / 2)
    assert matrix.forward_transfer.mean == pytest.approx(((6.0 - 5.8) + (7.0 - 6.5)) / 2)
    assert {name: round(e.mean, 6) for name, e in matrix.forgotten.items()} == {"old": 0.6, "a": 0.4, "b": 0.4}
    assert matrix.backward_transfer.stderr == pytest.approx(0, abs=1e-12), "the spread between windows cancels in pairs"
    begun = matrix_of(LOSSES[:2])
    assert begun.backward_transfer is None
    assert begun.forward_transfer.mean == pytest.approx(0.2)
    assert list(begun.forgotten) == ["old"]
    alone = matrix_of([row[1:] for row in LOSSES], first_stage=0)
    assert alone.backward_transfer == matrix.backward_transfer
    assert alone.forward_transfer == matrix.forward_transfer
    assert list(alone.forgotten) == ["a", "b"]


def test_standard_errors_of_a_transfer_add_over_data_sets():
    rng = np.random.default_rng(0)
    noisy = matrix_of(LOSSES)
    losses = tuple(tuple(cell + rng.normal(0, 0.1, 4) for cell in row) for row in noisy.losses)
    matrix = LossMatrix(**{**vars(noisy), "losses": losses})
    expected = [np.std(losses[3][j] - losses[j][j], ddof=1) / 2 for j in (1, 2)]
    assert matrix.backward_transfer.stderr == pytest.approx(math.hypot(*expected) / 2)


def test_matrices_are_written_and_read_back(tmp_path):
    matrix = matrix_of(LOSSES, spread=0.25)
    write_matrices(tmp_path / "stages.json", "r", [matrix])
    (again,) = read_matrices(tmp_path / "stages.json")
    assert summary(again) == summary(matrix)
    text = "\n".join(table_lines([again]))
    assert "3.6000±0.1443" in text
    assert "backward transfer: -0.4000" in text
    assert read_matrices(tmp_path / "none.json") == []
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_matrices(tmp_path / "stages.json")


# --- the whole way ---


@pytest.mark.skipif(not available_backends(), reason="a sweep needs a framework")
def test_the_recipe_runs_resumes_and_becomes_a_table_and_a_figure(run_forget, tmp_path):
    (configs,) = {len(read_recipe(find_recipe("stages")).configs({}))}
    assert configs == 3
    plan_stages(read_recipe(find_recipe("stages")))
    code, out, err = run_forget("sweep", "stages", "--dry-run", "--on", "h100", "--json")
    assert code == 0, err
    planned = json.loads(out)
    base, *rows = planned["runs"]
    assert base["title"].startswith("base")
    assert base["hours"] > 0
    assert [(row["stage"], row["run_id"] is None) for row in rows] == [(1, False), (2, True), (3, True)] * 3
    # The base may have been trained by another test.
    left = [row for row in planned["runs"] if row["state"] != "done"]
    assert planned["totals"]["hours"] == pytest.approx(sum(row["hours"] for row in left))
    (tmp_path / "r.yaml").write_text(
        "arms: {replayed: {method: kl-replay, replay_data: earlier}}\nstages: [{target: code}, {target: math}]\n"
        "smoke: {config: {model: 0.16m, vocab_size: 512, target_tokens: 20000, iters: 4, batch_size: 8, eval_rows: 16, "
        "steps_per_eval: 2, base: {iters: 4, steps_per_eval: 2}}}\n"
    )
    command = [sys.executable, "-m", "mlx_forget", "sweep", "r.yaml", "--output", "s", "--threads", "1", "--json"]
    outcomes = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        outcomes.append(json.loads(result.stdout))
        # The second time, the last stage is lost, and only it is trained again.
        if len(outcomes) == 1:
            shutil.rmtree(outcomes[0]["runs"][-1]["folder"])
    assert outcomes[0]["chains"] == outcomes[1]["chains"]
    assert [row["title"] for row in outcomes[0]["runs"]][1:] == ["replayed, code", "replayed, math"]
    code, out, err = run_forget("plot", "s", "-o", "f", "--json")
    assert code == 0, err
    assert json.loads(out)["chains"] == outcomes[0]["chains"]
    for suffix in ("png", "pdf"):
        assert (tmp_path / "f" / f"s.{suffix}").stat().st_size > 8_000
    with (tmp_path / "f" / "s.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert tuple(cells[0]) == CSV_COLUMNS
    assert len(cells) == 3 * 3
    code, out, _ = run_forget("plot", "s", "-o", "f")
    assert "forward transfer" in out
    code, _, err = run_forget("sweep", "r.yaml", "--output", "s", "--dry-run")
    assert (code, err.count("Backend "), err.count("Corpus code:")) == (0, 1, 1)

"""`forget runs`: what it lists, compares, exports, prunes and verifies."""

import csv
import json
import shutil
import struct

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlx_forget.errors import UserError
from mlx_forget.history import HistoryWriter, read_history
from mlx_forget.runs.export import export, read_export
from mlx_forget.tables import read_table

PROGRESS = {"title": "p = 1%", "step": 30, "num_steps": 600, "tokens_per_second": 1e3, "seconds_left": 60.0, "losses": "target 3.2"}


@pytest.fixture
def runs(make_run, tmp_path):
    """Three finetunes, one of them diverged; a pretraining run; and what else may lie about."""
    root = tmp_path / "runs"
    make_run(root / "sweep", "aaa111", p="0", forgotten=3.8, learnt=3.0)
    make_run(root / "sweep", "aab222", p="5%", forgotten=3.2, learnt=2.9)
    make_run(root / "other", "bbb333", p="1%", forgotten=3.4, learnt=2.95, method="kl-replay", seed=1, status="diverged")
    make_run(root, "base00000989680", init="scratch", forgetting_nats=None)
    (root / "half-cuda").mkdir()
    (root / "half-cuda" / "progress.json").write_text(json.dumps(PROGRESS))
    (root / "half-cuda" / "config.yaml").write_text("")
    (root / "newer-cuda").mkdir()
    (root / "newer-cuda" / "record.json").write_text('{"schema_version": 99}')
    return root


def listed(run_forget, *arguments):
    code, out, err = run_forget("runs", *arguments, "--json")
    assert code == 0, err
    return [row["run_id"] for row in json.loads(out)["runs"]]


def test_list_is_the_default_and_names_what_it_leaves_out(run_forget, runs, monkeypatch):
    code, out, err = run_forget("runs", "list", runs)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["base00000989680", "bbb333", "aaa111", "aab222"]
    assert "newer-cuda" in err
    assert "record schema 99, where this release reads 1" in err
    assert "begun, without a record yet: 1" in err
    assert "half-cuda" in err
    assert run_forget("runs", runs) == (code, out, err)
    monkeypatch.chdir(runs.parent)
    assert run_forget("runs")[1].splitlines()[0] == out.splitlines()[0]


def test_the_json_of_a_list_holds_the_records_themselves(run_forget, runs):
    code, out, err = run_forget("runs", "list", runs, "--json")
    assert (code, out.count("\n"), err) == (0, 1, "")
    content = json.loads(out)
    for row in content["runs"]:
        record = json.loads((runs / row["folder"] / "record.json").read_text())
        assert {key: value for key, value in row.items() if key != "folder"} == record
    assert list(content["left_out"]) == [str(runs / "newer-cuda")]
    assert content["begun"] == [str(runs / "half-cuda")]


def test_runs_are_filtered_and_sorted(run_forget, runs):
    assert listed(run_forget, runs, "--where", 'p > 0 and method == "injection"') == ["aab222"]
    assert listed(run_forget, runs, "--where", 'base != "scratch"', "--sort", "forgetting_nats") == ["aab222", "bbb333", "aaa111"]
    assert listed(run_forget, runs, "--sort", "-p", "--status", "finished")[0] == "aab222"
    assert listed(run_forget, runs, "--sort", "forgetting_nats")[-1] == "base00000989680"
    assert listed(run_forget, runs, "--status", "diverged") == ["bbb333"]
    assert listed(run_forget, runs, "--where", "batch_size == 16 and seed > 0") == ["bbb333"]
    assert listed(run_forget, runs, "--where", "N < 5") == []


@pytest.mark.parametrize(
    "options, message",
    [
        (("--where", "forgeting_nats > 0"), "Did you mean 'forgetting_nats'"),
        (("--where", "method == kl"), "Text is written in quotes"),
        (("--where", "p >"), "Cannot read the condition"),
        (("--where", "3 > 2 > 1 < True"), "Cannot read the condition"),
        (("--status", "done"), "Unknown status 'done'"),
        (("--sort", "los"), "Did you mean 'loss'"),
    ],
)
def test_a_wrong_choice_is_one_sentence(run_forget, runs, options, message):
    code, out, err = run_forget("runs", "list", runs, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_run_is_shown_by_folder_or_by_the_beginning_of_its_id(run_forget, runs):
    record = json.loads((runs / "sweep" / "aaa111-cuda" / "record.json").read_text())
    assert json.loads(run_forget("runs", "show", runs / "sweep" / "aaa111-cuda", "--json")[1]) == record
    assert json.loads(run_forget("runs", "show", "aaa", "--in", runs, "--json")[1]) == record
    for name, message in (
        ("aa", "2 runs are called aa..."),
        ("zz", "no run folder zz"),
        (runs / "half-cuda", "holds no finished run"),
    ):
        code, _, err = run_forget("runs", "show", name, "--in", runs)
        assert code == 2
        assert message in err
    code, _, err = run_forget("runs", "show", runs / "newer-cuda")
    assert code == 2
    assert "record schema 99" in err


def test_a_comparison_says_what_differs_and_by_how_much(run_forget, runs, tmp_path):
    code, out, err = run_forget("runs", "compare", "aaa", "aab", "--in", runs, "--json", "--plot", tmp_path / "figures" / "c.png")
    assert code == 0, err
    content = json.loads(out)
    assert content["differences"] == {"p": ["0", "5%"]}
    first, second = content["runs"]
    assert first["less_first"] is None
    difference = second["losses"]["best"]["pretrain_val"] - first["losses"]["best"]["pretrain_val"]
    assert second["less_first"]["pretrain_val"]["mean"] == pytest.approx(difference)
    assert (tmp_path / "figures" / "c.png").stat().st_size > 10_000
    code, out, _ = run_forget("runs", "compare", "aaa", "bbb", "--in", runs)
    assert code == 0
    assert "kl-replay" in out
    assert "diverged" in out


def test_losses_on_other_data_are_not_compared_window_by_window(run_forget, runs):
    path = runs / "sweep" / "aab222-cuda" / "record.json"
    record = json.loads(path.read_text())
    record["data"]["code"]["fingerprint"] = "other"
    path.write_text(json.dumps(record))
    content = json.loads(run_forget("runs", "compare", "aaa", "aab", "--in", runs, "--json")[1])
    assert set(content["runs"][1]["less_first"]) == {"pretrain_val"}
    assert "fingerprint of code" in content["differences"]
    assert run_forget("runs", "compare", "aaa", "--in", runs)[0] == 2


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_an_exported_table_is_fitted_like_the_folder(run_forget, runs, tmp_path, name):
    code, _, err = run_forget("runs", "export", runs, "-o", tmp_path / name)
    assert code == 0, err
    for response in ("pretraining", "target"):
        table, whole = read_table(tmp_path / name, response=response), read_table(runs, response=response)
        assert table.run.tolist() == whole.run.tolist() == ["aaa111", "aab222"]
        assert table.base.tolist() == whole.base.tolist()
        for column in ("N", "D", "p", "r", "R", "P", "steps", "L0", "loss"):
            assert table.columns[column].tolist() == whole.columns[column].tolist(), column
        assert table.labels["domain"].tolist() == whole.labels["domain"].tolist()
        without = {reason: len(sources) for reason, sources in table.left_out.items()}
        assert without == {"diverged": 1, "pretrained from scratch, where nothing could be forgotten": 1}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_numbers_of_an_exported_table_are_compared_as_numbers(run_forget, runs, tmp_path, name):
    assert run_forget("runs", "export", runs, "-o", tmp_path / "t.parquet")[0] == 0
    rows = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    (last_blocks,) = (row for row in rows if row["run"] == "aaa111")
    # As text, 98 is more than 651.
    last_blocks |= {"N": 651_392, "P": 98_000}
    export(rows, tmp_path / name, root=runs, provenance={})
    table = read_table(tmp_path / name, response="pretraining", adapters=False)
    assert table.run.tolist() == ["aab222"]
    assert any("last blocks" in reason for reason in table.left_out)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_text_where_an_exported_table_has_numbers_is_one_sentence(run_forget, runs, tmp_path, name):
    assert run_forget("runs", "export", runs, "-o", tmp_path / "whole.parquet")[0] == 0
    rows = pyarrow.parquet.read_table(tmp_path / "whole.parquet").to_pylist()
    export([row | {"P": "many"} for row in rows], tmp_path / name, root=runs, provenance={})
    for read in (lambda: read_table(tmp_path / name, response="pretraining", adapters=False), lambda: read_export(tmp_path / name)):
        with pytest.raises(UserError, match=r"Row 1 of .* has 'many' as P, which is a number"):
            read()


def test_names_of_digits_stay_as_they_were_exported(run_forget, runs, tmp_path):
    assert run_forget("runs", "export", runs, "-o", tmp_path / "whole.parquet")[0] == 0
    rows = pyarrow.parquet.read_table(tmp_path / "whole.parquet").to_pylist()
    export([row | {"domain": "007"} for row in rows], tmp_path / "t.csv", root=runs, provenance={})
    assert {row["domain"] for row in read_export(tmp_path / "t.csv")} == {"007"}


def test_an_export_carries_law_columns_first_and_where_they_come_from(run_forget, runs, tmp_path):
    code, out, err = run_forget("runs", "export", runs, "-o", tmp_path / "t.parquet", "--where", "p > 0", "--json")
    assert code == 0, err
    assert json.loads(out)["num_runs"] == 2
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    law = ["N", "D", "p", "r", "R", "P", "steps", "L0", "L_ft", "loss", "run", "base"]
    assert table.column_names[: len(law)] == law
    assert table["p"].type == pa.float64()
    assert table["folder"].to_pylist() == ["other/bbb333-cuda", "sweep/aab222-cuda"]
    assert all("4e85" in text for text in table["fingerprints"].to_pylist())
    provenance = json.loads(table.schema.metadata[b"mlx_forget"])
    assert provenance["where"] == "p > 0"
    # A table is handed on, and where it lay on one machine is not.
    assert provenance["folder"] == runs.name
    assert list(provenance["left_out"]) == ["newer-cuda"]
    assert run_forget("runs", "export", runs, "-o", tmp_path / "t.csv")[0] == 0
    with open(tmp_path / "t.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_an_export_names_places_as_seen_from_the_folder_of_the_runs(make_run, run_forget, tmp_path):
    folder = make_run(tmp_path / "s", "a" * 12)
    record = json.loads((folder / "record.json").read_text())
    record["config"]["init"] = str(tmp_path / "s" / ("b" * 12 + "-cuda") / "checkpoints" / "last")
    (folder / "record.json").write_text(json.dumps(record))
    assert run_forget("runs", "export", tmp_path / "s", "-o", tmp_path / "t.parquet")[0] == 0
    (row,) = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert row["init"] == "bbbbbbbbbbbb-cuda/checkpoints/last"


@pytest.mark.parametrize(
    "options, message",
    [
        (("-o", "t.xlsx"), "Unknown table format"),
        (("-o", "."), "Unknown table format"),
        (("-o", "t.csv", "--where", "p > 2"), "No run is left"),
        (("-o", "folder.csv"), "Cannot write"),
    ],
)
def test_a_wrong_export_is_refused(run_forget, runs, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    code, _, err = run_forget("runs", "export", runs, *options)
    assert code == 2
    assert message in err


def test_pruning_keeps_the_best_asks_first_and_never_touches_records(run_forget, runs):
    def files():
        return {path.relative_to(runs) for path in runs.rglob("*") if path.is_file()}

    before = files()
    for options in (("--dry-run", "--yes"), ()):
        code, out, err = run_forget("runs", "prune", runs, *options, "--json")
        assert code == 0, err
        content = json.loads(out)
        assert len(content["checkpoints"]) == 4
        assert content["removed"] is False
        assert files() == before
    assert "without --yes" in err
    code, out, err = run_forget("runs", "prune", runs / "sweep", "--yes", "--json")
    assert json.loads(out)["removed"] is True
    assert before - files() == {path for path in before if path.parts[0] == "sweep" and path.parts[2:4] == ("checkpoints", "last")}
    assert run_forget("runs", "prune", runs / "sweep", "--yes", "--best-too")[0] == 0
    assert {path.name for path in files() if path.parts[0] == "sweep"} == {"record.json", "config.yaml", "history.arrows"}
    assert "Nothing to remove" in run_forget("runs", "prune", runs / "sweep", "--yes")[2]


def test_a_run_that_others_started_from_keeps_its_checkpoints(run_forget, runs, make_run):
    make_run(runs, "ccc444", init="base00000989680")
    make_run(runs, "ddd555", init="f" * 64)
    config = runs / "ddd555-cuda" / "record.json"
    record = json.loads(config.read_text())
    record["config"]["init"] = str(runs / "ccc444-cuda" / "checkpoints" / "best")
    config.write_text(json.dumps(record))
    code, out, _ = run_forget("runs", "prune", runs, "--yes", "--json", "--best-too")
    assert code == 0
    assert set(json.loads(out)["kept"]) == {str(runs / "base00000989680-cuda"), str(runs / "ccc444-cuda")}
    assert (runs / "ccc444-cuda" / "checkpoints" / "last").is_dir()
    assert not (runs / "ddd555-cuda" / "checkpoints" / "last").exists()


@pytest.mark.parametrize("name, content", [("config.yaml", "init: {}\n"), ("requested.yaml", "model: {}\n")])
def test_a_run_that_has_not_ended_keeps_what_it_is_to_go_on_from(run_forget, runs, make_run, name, content):
    start = make_run(runs, "ccc444")
    (runs / "interrupted").mkdir()
    (runs / "interrupted" / "history.arrows").write_bytes(b"")
    (runs / "interrupted" / name).write_text(content.format(start / "checkpoints" / "best"))
    code, out, err = run_forget("runs", "prune", runs, "--yes", "--json", "--best-too")
    assert code == 0, err
    assert str(start) in json.loads(out)["kept"]
    assert (start / "checkpoints" / "last").is_dir()


def test_whole_runs_are_whole(run_forget, runs):
    code, out, err = run_forget("runs", "verify", runs / "sweep", "--json")
    assert code == 0, err
    assert json.loads(out) == {"num_runs": 2, "problems": {}, "begun": {}}


def test_words_say_what_json_says(run_forget, runs, tmp_path):
    """What is shown, what is wrong, and what was only begun."""
    import yaml

    code, out, _ = run_forget("runs", "show", runs / "sweep" / "aaa111-cuda")
    assert (code, yaml.safe_load(out)["run_id"]) == (0, "aaa111")
    code, out, err = run_forget("runs", "verify", runs)
    assert code == 1
    assert f"{runs / 'newer-cuda'}: " in out
    assert f"{runs / 'half-cuda'}: begun, at step 30 of 600 when last heard of" in out
    code, _, err = run_forget("runs", "compare", "aaa111", "aab222", "--in", runs, "--plot", tmp_path / "c.txt")
    assert (code, "Unknown figure format '.txt'" in err) == (2, True)


def test_every_damage_is_named(run_forget, runs):
    def damage(name, change):
        shutil.copytree(runs / "sweep" / "aaa111-cuda", runs / name)
        path = runs / name / "record.json"
        record = json.loads(path.read_text()) | {"run_id": name}
        for state in (runs / name).glob("checkpoints/*/state.json"):
            state.write_text(json.dumps(json.loads(state.read_text()) | {"run_id": name}))
        change(runs / name, record)
        path.write_text(json.dumps(record))

    def shorten(folder, record):
        table = read_history(folder / "history.arrows").slice(0, 5)
        with pa.OSFile(str(folder / "history.arrows"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)

    def flip(folder, record):
        rows = read_history(folder / "history.arrows").to_pylist()
        with HistoryWriter(folder / "history.arrows") as history:
            for row in rows:
                history.append(row)
        content = (folder / "history.arrows").read_bytes()
        number = struct.pack("<d", rows[0]["target_val_windows"][0])
        assert number in content
        (folder / "history.arrows").write_bytes(content.replace(number, struct.pack("<d", 0.5), 1))

    def disagree(folder, record):
        record["losses"]["best"]["pretrain_val"] += 0.1

    damage("d1", lambda folder, record: (folder / "checkpoints" / "best" / "model.safetensors").write_bytes(b"x"))
    damage("d2", shorten)
    damage("d3", disagree)
    damage("d4", lambda folder, record: (folder / "history.arrows").unlink())
    damage("d5", lambda folder, record: record.pop("versions"))
    damage("d6", lambda folder, record: record.update(status="perhaps"))
    damage("d7", lambda folder, record: (folder / "config.yaml").unlink())
    damage("d8", lambda folder, record: (folder / "history.arrows").write_bytes(b"not arrow"))
    damage("d9", flip)
    shutil.copytree(runs / "sweep" / "aab222-cuda", runs / "zcopy")
    (runs / "torn").mkdir()
    (runs / "torn" / "record.json").write_text("{")
    code, out, _ = run_forget("runs", "verify", runs, "--json")
    assert code == 1
    content = json.loads(out)
    wanted = {
        "d1": "model.safetensors is damaged",
        "d2": "no evaluation at step 300, which the record calls best",
        "d3": "disagree about step 300",
        "d4": "history.arrows is missing",
        "d5": "lacks versions",
        "d6": "status 'perhaps'",
        "d7": "config.yaml is missing",
        "d8": "cannot be read",
        "d9": "is damaged",
        "zcopy": "is a copy of sweep/aab222-cuda",
        "torn": "is damaged",
        "newer-cuda": "record schema 99",
    }
    assert set(content["problems"]) == set(wanted)
    for name, words in wanted.items():
        assert words in " ".join(content["problems"][name]), name
    assert content["begun"] == {"half-cuda": "begun, at step 30 of 600 when last heard of"}
    (runs / "half-cuda" / "failure.json").write_text('{"reason": "out of memory"}')
    assert json.loads(run_forget("runs", "verify", runs, "--json")[1])["begun"] == {"half-cuda": "failed: out of memory"}
    assert "d1" not in json.loads(run_forget("runs", "verify", runs, "--no-hashes", "--json")[1])["problems"]


def test_an_unreadable_number_in_a_row_does_not_hide_the_others(run_forget, make_run, tmp_path):
    losses = {"step": 1, "target_train": 1.0, "target_val": 2.0, "pretrain_val": None}
    sparse = make_run(tmp_path, "eee666", losses={"best": losses, "start": losses, "end": losses}, progress_lost=None)
    assert sparse.is_dir()
    make_run(tmp_path, "fff777", tokens_per_second=float("nan"))
    code, out, err = run_forget("runs", "list", tmp_path)
    assert code == 0, err
    assert len(out.splitlines()) == 3
    # Strict JSON knows no NaN.
    assert json.loads(run_forget("runs", "show", "fff", "--in", tmp_path, "--json")[1])["tokens_per_second"] is None
    listed = json.loads(run_forget("runs", "list", tmp_path, "--json")[1], parse_constant=pytest.fail)["runs"]
    assert {run["run_id"][:6]: run["tokens_per_second"] for run in listed}["fff777"] is None


def test_no_table_that_comes_with_the_package_names_a_place_on_the_machine_that_made_it():
    from mlx_forget.resources import path

    for file in path("runs").glob("*.parquet"):
        table = pyarrow.parquet.read_table(file)
        words = [json.loads(table.schema.metadata[b"mlx_forget"])["folder"]]
        words += [cell for column in table.column_names for cell in table[column].to_pylist() if isinstance(cell, str)]
        assert [word for word in words if word.startswith("/")] == [], file.name


def test_the_table_that_comes_with_the_package_is_what_was_published(run_forget, tmp_path):
    from mlx_forget.resources import path
    from mlx_forget.runs.export import read_export

    rows = {(row["p_asked"], row["seed"]): row for row in read_export(path("runs", "figure1.parquet"))}
    assert len(rows) == 14
    for share, forgetting in (("0", 0.7836), ("0.1%", 0.9172), ("1%", 0.6145), ("5%", 0.5388)):
        assert rows[(share, 0)]["forgetting_nats"] == pytest.approx(forgetting, abs=5e-5)
    options = ("--law", "forgetting-fixed-n", "--fix", "beta=0", "--bootstrap", "0", "--json")
    code, out, err = run_forget("fit", path("runs", "figure1.parquet"), *options)
    assert code == 0, err
    fit = json.loads(out)
    assert fit["num_rows"] == 14
    assert fit["params"]["A"]["value"] == pytest.approx(0.79, abs=0.01), "what is forgotten without injection"

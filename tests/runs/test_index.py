"""The cached index: the same rows with and without it, whatever happens to it or beside it."""

import json
import os
import subprocess
import sys
import time

import pytest

from mlx_forget.errors import UserError
from mlx_forget.runs import index as run_index
from mlx_forget.runs.index import INDEX, read_index
from tests.benchmarks.synthetic_records import write_records


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "runs", run_index.LEAST_RECORDS + 5, histories=False)
    return tmp_path / "runs"


def rewrite(record, *, age=60, **changes):
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    os.utime(record, (time.time() - age, time.time() - age))


def no_reading(monkeypatch):
    read = []
    monkeypatch.setattr(run_index, "_read_row", lambda path: read.append(path) or {"problem": "read"})
    return read


def test_the_cache_gives_the_rows_that_the_records_give(folder, monkeypatch):
    fresh = read_index(folder)
    assert (folder / INDEX).is_file()
    read = no_reading(monkeypatch)
    cached = read_index(folder)
    assert cached == fresh
    assert not read
    assert [cached.folder_of(row) for row in cached.rows] == sorted(path.parent for path in folder.glob("*/record.json"))


def test_only_what_changed_is_read_anew(folder, monkeypatch):
    read_index(folder)
    records = sorted(folder.glob("*/record.json"))
    rewrite(records[3], age=30, num_steps=7)
    (folder / "gone").mkdir()
    os.rename(records[4], folder / "gone" / "record.json")
    read = []
    original = run_index._read_row
    monkeypatch.setattr(run_index, "_read_row", lambda path: read.append(path) or original(path))
    index = read_index(folder)
    assert sorted(read) == [records[3], folder / "gone" / "record.json"]
    rows = {row["folder"]: row for row in index.rows}
    assert rows[records[3].parent.name]["num_steps"] == 7
    assert records[4].parent.name not in rows
    assert "gone" in rows


def test_a_record_that_may_still_be_replaced_in_the_same_tick_is_not_kept(folder, monkeypatch):
    young = sorted(folder.glob("*/record.json"))[0]
    # Of the future, however long this test takes.
    rewrite(young, age=-3600)
    read_index(folder)
    read = no_reading(monkeypatch)
    read_index(folder)
    assert read == [young]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"index_version": 1}', '{"index_version": 99, "records": [], "columns": {}}'])
def test_a_damaged_or_foreign_cache_is_made_again(folder, content):
    fresh = read_index(folder)
    (folder / INDEX).write_text(content)
    assert read_index(folder) == fresh
    assert json.loads((folder / INDEX).read_text())["index_version"] == run_index.INDEX_VERSION


def test_rows_that_other_code_made_are_made_again(folder, monkeypatch):
    read_index(folder)
    monkeypatch.setattr(run_index, "_maker", lambda: "another release")
    read = []
    original = run_index._read_row
    monkeypatch.setattr(run_index, "_read_row", lambda path: read.append(path) or original(path))
    read_index(folder)
    assert len(read) == run_index.LEAST_RECORDS + 5


def test_a_folder_that_cannot_be_written_is_only_read(folder, monkeypatch):
    fresh = read_index(folder)
    (folder / INDEX).unlink()

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert read_index(folder) == fresh
    assert not [path for path in folder.iterdir() if path.is_file()]


def test_processes_side_by_side_see_whole_indexes(folder):
    script = (
        "import sys, pathlib; from mlx_forget.runs import index as run_index; folder = pathlib.Path(sys.argv[1])\n"
        "for number in range(6):\n"
        f"    assert len(run_index.read_index(folder).rows) == {run_index.LEAST_RECORDS + 5}\n"
        "    (folder / run_index.INDEX).unlink(missing_ok=True)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(folder)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert not list(folder.glob("*.part"))


def test_few_runs_need_no_cache(tmp_path):
    write_records(tmp_path, 3, histories=False)
    assert len(read_index(tmp_path).rows) == 3
    assert not (tmp_path / INDEX).exists()


def test_begun_runs_and_unreadable_records_are_named(tmp_path):
    write_records(tmp_path / "sweep", 2, histories=False)
    (tmp_path / "sweep" / "config.yaml").write_text("")
    for name, file in (("half", "history.arrows"), ("asked", "requested.yaml"), ("torn", ".record.json.part")):
        (tmp_path / name / "checkpoints" / "last").mkdir(parents=True)
        (tmp_path / name / file).write_text("")
    (tmp_path / "plots").mkdir()
    for name, content in (("newer", '{"schema_version": 99}'), ("broken", "{"), ("foreign", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
    index = read_index(tmp_path)
    assert len(index.rows) == 2
    assert index.begun == ["asked", "half", "torn"]
    assert index.problems == {
        "broken": "damaged or not of this tool",
        "foreign": "damaged or not of this tool",
        "newer": "of record schema 99, where this release reads 1",
    }
    assert read_index(tmp_path / "sweep").begun == []
    with pytest.raises(UserError, match="There is no folder"):
        read_index(tmp_path / "nothing")


def test_a_run_folder_is_its_own_index(tmp_path):
    write_records(tmp_path, 1, histories=False)
    (run,) = tmp_path.iterdir()
    (row,) = read_index(run).rows
    assert row["folder"] == "."
    assert read_index(run).folder_of(row) == run

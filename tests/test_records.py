"""Records, histories and the files beneath them: whole or absent, and never taken for what they are not."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest

from mlx_forget import durable_files, records
from mlx_forget.durable_files import is_whole, make_folder, read_object, replacing, sealed, sha256_of, write_text
from mlx_forget.errors import UserError
from mlx_forget.history import SCHEMA, HistoryWriter, read_history
from mlx_forget.npy_files import array_of, map_array
from mlx_forget.records import find_runs, installed_versions, read_record, write_record

COLUMNS = """step tokens pretrain_tokens learning_rate batch_loss target_train_loss target_val_loss pretrain_val_loss target_val_windows
    pretrain_val_windows grad_norm num_skipped tokens_per_second wall_seconds forgetting_ce forgetting_ce_hard forgetting_kl start_agreement"""
ROW = {"step": 1, "tokens": 2, "batch_loss": 3.5, "target_val_windows": [1.0, 2.5], "pretrain_val_windows": None}


def run(folder, **more):
    folder.mkdir(parents=True)
    write_record(folder, {"schema_version": 1, "run_id": folder.name, **more})
    return folder


def test_what_is_written_is_read_and_the_checksum_is_kept_from_the_reader(tmp_path):
    run(tmp_path / "a", losses={"start": (1, 2.5)})
    assert read_record(tmp_path / "a") == {"schema_version": 1, "run_id": "a", "losses": {"start": [1, 2.5]}}
    assert set(json.loads((tmp_path / "a" / "record.json").read_text())) == {"schema_version", "run_id", "losses", "checksum"}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["record.json"]


def test_a_run_without_a_record_has_not_ended(tmp_path):
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is damaged: remove it"),
        ("[]", "is damaged: remove it"),
        ("{}", "is damaged: remove it"),
        ('{"a": ' + "[" * 100_000, "is damaged: remove it"),
        ('{"schema_version": 1, "checksum": "0"}', "its checksum does not match"),
        ('{"schema_version": 2}', "has record schema 2, this version reads 1"),
    ],
)
def test_a_record_that_is_none_is_one_sentence(tmp_path, text, words):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_record(tmp_path)


def test_a_record_of_an_earlier_release_has_no_checksum(tmp_path):
    (tmp_path / "record.json").write_text('{"schema_version": 1, "run_id": "x"}')
    assert read_record(tmp_path) == {"schema_version": 1, "run_id": "x"}


def test_runs_are_found_in_the_order_of_their_names_two_folders_deep(tmp_path):
    for name in ("b", "a", "sweep/c"):
        run(tmp_path / name)
    (tmp_path / "begun").mkdir()
    run(tmp_path / "x" / "y" / "too-deep")
    found = list(find_runs(tmp_path))
    assert [one.folder.name for one in found] == ["a", "b", "c"]
    assert [one.record["run_id"] for one in found] == ["a", "b", "c"]
    assert found[0].history == tmp_path / "a" / "history.arrows"
    assert [one.folder for one in find_runs(str(tmp_path / "a"))] == [tmp_path / "a"]


def test_the_names_in_a_run_folder_are_those_that_scripts_know():
    assert (records.RECORD, records.HISTORY, records.CONFIG) == ("record.json", "history.arrows", "config.yaml")
    assert (records.REQUESTED, records.FAILURE, records.SCHEMA_VERSION) == ("requested.yaml", "failure.json", 1)


def test_versions_are_those_of_what_is_installed(monkeypatch):
    asked = []

    def version(name):
        asked.append(name)
        if name == "torch":
            raise records.PackageNotFoundError
        return f"{name} 1"

    monkeypatch.setattr(records, "version", version)
    assert installed_versions() == {name: f"{name} 1" for name in ("mlx-forget", "numpy", "pyarrow", "sentencepiece", "mlx")}
    assert set(asked) == {"mlx-forget", "numpy", "pyarrow", "sentencepiece", "torch", "mlx"}


# --- histories


def test_rows_come_back_with_null_where_nothing_was_said(tmp_path):
    with HistoryWriter(tmp_path / "history.arrows") as writer:
        writer.append(ROW)
        writer.append({**ROW, "step": 2})
    table = read_history(tmp_path / "history.arrows")
    assert table.schema == SCHEMA
    assert table["step"].to_pylist() == [1, 2]
    assert table["target_val_windows"].to_pylist() == [[1.0, 2.5]] * 2
    assert table["forgetting_kl"].to_pylist() == [None, None]
    assert writer._file.closed
    assert SCHEMA.metadata == {b"schema_version": b"1"}
    assert SCHEMA.names == COLUMNS.split()
    assert [path.name for path in tmp_path.iterdir()] == ["history.arrows"]


def test_a_row_is_in_the_file_before_the_next_and_an_unfinished_one_is_left_out(tmp_path):
    path = tmp_path / "history.arrows"
    writer = HistoryWriter(path)
    assert read_history(path).num_rows == 0
    for number in (1, 2):
        writer.append({**ROW, "step": number})
        assert read_history(path).num_rows == number
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert read_history(path)["step"].to_pylist() == [1]
    writer.close()


def test_a_history_that_goes_on_drops_what_came_after(tmp_path):
    path = tmp_path / "history.arrows"
    with HistoryWriter(path) as writer:
        for number in (1, 2, 3):
            writer.append({**ROW, "step": number})
    with HistoryWriter(path, keep_through=2) as writer:
        assert read_history(path)["step"].to_pylist() == [1, 2]
        writer.append({**ROW, "step": 5})
    assert read_history(path)["step"].to_pylist() == [1, 2, 5]
    HistoryWriter(path).close()
    assert read_history(path).num_rows == 0


def test_a_changed_row_and_a_lost_one_are_named(tmp_path):
    path = tmp_path / "history.arrows"
    with HistoryWriter(path) as writer:
        writer.append(ROW)
    whole = path.read_bytes()
    (place,) = [i for i in range(len(whole)) if whole[i : i + 8] == np.float64(3.5).tobytes()]
    path.write_bytes(whole[:place] + np.float64(3.25).tobytes() + whole[place + 8 :])
    with pytest.raises(UserError, match=r"row 1 is not what was written"):
        read_history(path)
    path.write_bytes(whole)
    (tmp_path / "record.json").write_text('{"history_rows": 2}')
    with pytest.raises(UserError, match="it holds 1 of 2 rows"):
        read_history(path)
    # What begins anew does not mind what stood there, nor what goes on that nothing did.
    HistoryWriter(path).close()
    HistoryWriter(tmp_path / "other.arrows", keep_through=2).close()
    path.write_bytes(whole)
    (tmp_path / "record.json").write_text('{"history_rows": 1}')
    assert read_history(path).num_rows == 1
    (tmp_path / "record.json").write_text("{}")
    assert read_history(path).num_rows == 1


def test_columns_that_an_older_release_did_not_write_are_null_and_others_are_refused(tmp_path):
    path = tmp_path / "history.arrows"
    old = pa.schema([SCHEMA.field("step"), SCHEMA.field("batch_loss")])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, old) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([{"step": 4, "batch_loss": 1.5}], schema=old))
    assert read_history(path)["batch_loss"].to_pylist() == [1.5]
    assert read_history(path)["grad_norm"].to_pylist() == [None]
    other = pa.schema([("step", pa.string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, other) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([{"step": "x"}], schema=other))
    with pytest.raises(UserError, match="its columns are not those of a history"):
        read_history(path)


# --- the files beneath


def test_a_folder_to_write_to_is_made_or_it_is_said_why_not(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write to .*file/c: Not a directory\."):
        make_folder(tmp_path / "file" / "c")
    asked = []
    monkeypatch.setattr(durable_files.os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(UserError, match=r"Cannot write to .*a: no permission\."):
        make_folder(tmp_path / "a")
    assert asked == [(tmp_path / "a", os.W_OK)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "öne")
    assert path.read_text(encoding="utf-8") == "öne"
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", None])
    assert path.read_text(encoding="utf-8") == "öne"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(durable_files.os, "fsync", lambda handle: done.append(os.fstat(handle).st_size))
    replace = os.replace
    monkeypatch.setattr(durable_files.os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "xyz")
    assert done == [3, "rename"]
    write_record(tmp_path, {"schema_version": 1})
    assert done[2:] == [(tmp_path / "record.json").stat().st_size, "rename", tmp_path.stat().st_size]


def test_a_seal_shows_every_change_and_no_order(tmp_path):
    whole = sealed({"b": (1, 2), "a": None, 3: "x"})
    again = json.loads(json.dumps(dict(reversed(whole.items()))))
    assert is_whole(whole)
    assert is_whole(again)
    assert not is_whole({**again, "a": 0})
    assert not is_whole({**again, "c": 1})
    assert is_whole({"a": 1, "checksums": {}})
    # One bit of the seal's own name.
    again["checksul"] = again.pop("checksum")
    assert not is_whole(again)


@pytest.mark.parametrize("name", ["record.json", "pipe"])
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "record.json").symlink_to("/dev/zero")
    for read in (read_object, sha256_of):
        with pytest.raises(OSError, match="no ordinary file"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="damaged"):
        read_record(tmp_path)


def test_an_array_gets_no_more_memory_than_its_file_has(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    content = (tmp_path / "a.npy").read_bytes()
    assert array_of(content).tolist() == map_array(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    # Of as many digits, so that the header keeps its length.
    many = content.replace(b"(2, 3), }         ", b"(2, 999999999999)}")
    assert many != content
    for wrong in (many, content[:-1], content.replace(b"<i4", b"|O8"), b"", content.replace(b"'shape'", b"}'shap'")):
        (tmp_path / "a.npy").write_bytes(wrong)
        for read in (lambda: array_of(wrong), lambda: map_array(tmp_path / "a.npy")):  # noqa: B023
            with pytest.raises(ValueError):  # noqa: PT011
                read()

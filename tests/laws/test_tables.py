import json

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.table import Table, check
from mlx_forget.pipeline.shares import parse_law_share
from mlx_forget.tables import read_table

ROWS = [
    {"params": 4.1e7, "D": 3e5, "p": 0.0, "L0": 3.9, "final_loss": 4.1, "domain": "math"},
    {"params": 1.09e8, "D": 1e6, "p": 0.01, "L0": 3.4, "final_loss": 3.6, "domain": "code"},
    {"params": 3.34e8, "D": 3e6, "p": 0.05, "L0": 3.0, "final_loss": 3.1, "domain": "math"},
]
MAPPING = {"N": "params", "loss": "final_loss"}


def write(path, kind):
    table = pa.Table.from_pylist(ROWS)
    if kind == "csv":
        lines = [",".join(ROWS[0])] + [",".join(str(value) for value in row.values()) for row in ROWS]
        path.write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "arrow", "arrows"])
def test_every_format_gives_the_same_table(tmp_path, kind):
    path = tmp_path / f"runs.{kind}"
    write(path, kind)
    table = read_table(path, mapping=MAPPING)
    assert table.columns["N"].tolist() == [4.1e7, 1.09e8, 3.34e8]
    assert table.columns["loss"].tolist() == [4.1, 3.6, 3.1]
    assert table.labels["domain"].tolist() == ["math", "code", "math"]
    assert sorted(table.groups("domain")) == ["code", "math"]


def test_percent_cells_and_constants_are_read(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("N,D,p,loss\n1e8,1e6,1%,3.0\n1e8,1e6,5%,2.9\n")
    table = read_table(path, mapping={"L0": "2.8"})
    assert table.columns["p"].tolist() == [0.01, 0.05]
    assert table.columns["L0"].tolist() == [2.8, 2.8]


@pytest.mark.parametrize(
    "text, mapping, words",
    [
        ("N,D,loss\n1e8,1e6,abc\n", {}, "row 1 holds 'abc'"),
        ("N,D,loss\n", {}, "no rows"),
        ("N,D,value\n1e8,1e6,3\n", {"loss": "los"}, "--map loss=los: the table has no column 'los'; it has N, D, value"),
        ("N,D,N\n1,2,3\n", {}, "'N' twice"),
        ("N;D;loss\n1e8;1e6;3\n", {}, "not separated by commas"),
        ("N,D,loss\n1e8,1e6,3\n1e8,2e6,3,1\n", {}, "Row 2 of .* has 4 cells for 3 columns"),
        ("N,D,value\n1e8,1e6,3\n", {"lss": "value"}, "Did you mean 'loss'"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, text, mapping, words):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_table(path, mapping=mapping)


def test_a_missing_file_or_unknown_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="No table"):
        read_table(tmp_path / "nothing.csv")
    (tmp_path / "runs.xlsx").write_text("")
    with pytest.raises(UserError, match="Unknown table format"):
        read_table(tmp_path / "runs.xlsx")


def rows_with(**changes):
    columns = {
        "N": [4.1e7, 1.09e8, 3.34e8, 6e8, 1e9],
        "D": [3e5, 1e6, 3e6, 1e7, 3e7],
        "p": [0.0, 0.01, 0.05, 0.0, 0.01],
    }
    columns |= {"L0": [3.9, 3.4, 3.0, 2.8, 2.6], "loss": [4.1, 3.6, 3.1, 3.0, 2.7]}

    return Table.of(**(columns | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss": [4.1, np.nan, 3.1, 3.0, np.inf]}, "rows 2, 5, column 'loss' is not a finite number"),
        ({"loss": [4.1, 3.6, -3.1, 3.0, 2.7]}, "row 3, column 'loss' is not positive"),
        ({"D": [3e5, 1e6, 0.0, 1e7, 3e7]}, "row 3, column 'D' is not positive"),
        ({"N": [41.0, 109.0, 334.0, 665.0, 1270.0]}, "millions"),
        ({"p": [0.0, 1.0, 5.0, 0.0, 1.0]}, "share"),
        ({"p": [0.0, 0.5, 1.0, 0.0, 0.1]}, "row 3, p is 100%"),
        ({"loss": [3.9, 3.3, 2.9, 2.7, 2.5], "L0": [4.1, 3.6, 3.1, 2.8, 2.7]}, "swapped"),
        (
            {
                name: [values[0], *values[:4]]
                for name, values in {
                    "N": [4e7, 1e8, 3e8, 6e8],
                    "D": [3e5, 1e6, 3e6, 1e7],
                    "p": [0, 0.01, 0.05, 0],
                    "L0": [4, 3, 3, 2],
                    "loss": [4.1, 3.6, 3.1, 3.0],
                }.items()
            },
            "Row 2 repeats row 1",
        ),
    ],
)
def test_rows_that_would_spoil_a_fit_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        check(rows_with(**changes), get_law("bethune-forgetting"))


@pytest.mark.parametrize("num, shown", [(1, "In row 1, "), (8, "In rows 1, 2, 3, 4, 5, 6, 7, 8, column"), (9, "7, 8, ..., column")])
def test_at_most_eight_rows_are_named(num, shown):
    from mlx_forget.laws.table import Table

    loss = np.where(np.arange(12) < num, -1.0, 3.0)
    with pytest.raises(UserError, match=shown) as refused:
        check(Table.of(N=np.geomspace(1e7, 1e9, 12), D=1e7, loss=loss), get_law("chinchilla"))
    assert str(refused.value).endswith("remove it." if num == 1 else "remove them.")


def test_rows_of_two_runs_may_agree_and_of_one_run_may_not():
    from mlx_forget.laws.table import Table

    columns = {name: [values[0], *values[:4]] for name, values in rows_with().columns.items()}
    law = get_law("bethune-forgetting")
    check(Table.of(run=["a", "b", "a", "a", "a"], **columns), law)
    for run in (None, ["a", "a", "b", "b", "b"]):
        with pytest.raises(UserError, match=r"Row 2 repeats row 1 exactly \(1 duplicated row in all\)"):
            check(Table.of(run=run, **columns), law)
        check(Table.of(run=run, **columns), law, allow_duplicates=True)


def test_counts_in_millions_are_refused_unless_they_are_so_small():
    for column, value, law in (("N", 334.0, "chinchilla"), ("D", 1500.0, "chinchilla"), ("P", 2.5, "kalajdzievski-finetuning")):
        columns = {"N": np.geomspace(1e7, 1e9, 9), "D": 1e7, "P": 1e6, "steps": 100.0, "loss": np.linspace(3, 4, 9)} | {
            column: value
        }
        from mlx_forget.laws.table import Table

        table = Table.of(**columns)
        with pytest.raises(UserError, match=f"Column '{column}' never exceeds {value:g}"):
            check(table, get_law(law))
        check(table, get_law(law), allow_units=True)


@pytest.mark.parametrize(
    "wanted, there",
    [("N", "total_params"), ("D", "train_tokens"), ("p", "replay_fraction"), ("P", "trainable"), ("steps", "num_iters"), ("L0", "base_loss"),
     ("loss", "final_nll"), ("run", "my_name"), ("base", "init_from"), ("L_ft", "target_nats"), ("r", "domain_share"), ("R", "MIX_RATIO")],
)  # fmt: skip
def test_what_others_call_a_column_is_recognised(wanted, there):
    from mlx_forget.laws.table import Table, missing_columns

    assert f"--map {wanted}={there}" in str(missing_columns([wanted], Table.of(zzz=1.0, **{there: 1.0})))


def test_of_many_columns_two_dozen_are_named():
    from mlx_forget.laws.table import Table, missing_columns

    for num, end in ((24, "x23. "), (25, "x23, .... ")):
        assert f", x22, {end}" in str(missing_columns(["N"], Table.of(**{f"x{i}": 1.0 for i in range(num)})))


def test_fewer_rows_than_parameters_are_refused():
    with pytest.raises(UserError, match="4 free parameters and the table 3 rows"):
        check(rows_with().select(np.arange(5) < 3), get_law("bethune-forgetting"))


def test_a_missing_column_names_the_nearest():

    for name in ("tokens_D", "num_tokens", "d"):
        table = Table.of(N=[1e8, 2e8], **{name: [1e6, 2e6]}, loss=[3.0, 2.9])
        with pytest.raises(UserError, match=f"--map D={name}"):
            check(table, get_law("chinchilla"))


def test_all_missing_columns_are_named_at_once():
    table = Table.of(model_size=[1e8, 2e8], D=[1e6, 2e6], final_loss=[3.0, 2.9])
    with pytest.raises(UserError, match="Then add --map N=model_size --map loss=final_loss"):
        check(table, get_law("chinchilla"))
    with pytest.raises(UserError, match="Name them with --map p=COLUMN --map L0=COLUMN --map loss=final_loss"):
        check(table, get_law("forgetting-fixed-n"))


def record(folder, *, p, loss, status="finished", version=1):
    folder.mkdir(parents=True)
    seen = 4e6
    content = {
        "schema_version": version,
        "run_id": folder.name,
        "status": status,
        "backend": "cuda",
        "num_params": 650_000,
        "num_steps": 500,
        "seed": 0,
        "data": {
            "code": {"role": "target", "unique_tokens": 3e5, "tokens_seen": seen * (1 - p)},
            "prose": {"role": "pretrain", "unique_tokens": 1e7, "tokens_seen": seen * p},
        },
        "losses": {
            "start": {"step": 0, "target_val": 4.0, "pretrain_val": 3.42},
            "best": {"step": 300, "target_val": 3.1, "pretrain_val": loss},
            "end": {"step": 500, "target_val": 3.2, "pretrain_val": loss},
        },
    }
    (folder / "record.json").write_text(json.dumps(content))


def test_run_folders_become_law_rows(tmp_path):
    record(tmp_path / "sweep" / "a", p=0.0, loss=5.69)
    record(tmp_path / "sweep" / "b", p=0.01, loss=4.73)
    record(tmp_path / "sweep" / "c", p=0.05, loss=9.0, status="diverged")
    table = read_table(tmp_path, response="pretraining")
    assert table.columns["N"].tolist() == [650_000, 650_000]
    assert table.columns["D"].tolist() == [3e5, 3e5]
    assert table.columns["p"] == pytest.approx([0.0, 0.01])
    assert table.columns["L0"].tolist() == [3.42, 3.42]
    assert table.columns["loss"].tolist() == [5.69, 4.73]
    assert table.run.tolist() == ["a", "b"]
    assert read_table(tmp_path, response="target").columns["loss"].tolist() == [3.1, 3.1]


def test_runs_of_other_methods_do_not_pass_as_injection(tmp_path):
    for name, method in (("a", "injection"), ("b", "plain"), ("c", "kl-replay"), ("d", "kl-replay")):
        record(tmp_path / name, p=0.0, loss=5.0)
        file = tmp_path / name / "record.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"method": {"name": method}}))
    table = read_table(tmp_path, response="pretraining")
    assert table.run.tolist() == ["a", "b"]
    assert {reason: len(sources) for reason, sources in table.left_out.items()} == {
        "trained with kl-replay, which is not injection,": 2
    }
    for name in "ab":
        (tmp_path / name / "record.json").unlink()
    assert read_table(tmp_path, response="pretraining").run.tolist() == ["c", "d"]


def test_later_stages_are_no_finetunes_of_a_pretrained_model(tmp_path):
    for name, init in (("a", "pretrained"), ("b", "a"), ("c", "b"), ("d", "pretrained")):
        record(tmp_path / name, p=0.0, loss=5.0)
        file = tmp_path / name / "record.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init": init}))
    table = read_table(tmp_path, response="pretraining")
    assert table.run.tolist() == ["a", "d"]
    assert {reason: len(sources) for reason, sources in table.left_out.items()} == {
        "that started from a finetune, not from a pretrained model,": 2
    }


def test_what_a_folder_holds_besides_is_left_out_and_named(tmp_path):
    record(tmp_path / "a", p=0.0, loss=5.0)
    record(tmp_path / "b", p=0.01, loss=9.0, status="diverged")
    record(tmp_path / "c", p=0.01, loss=5.0, version=99)
    record(tmp_path / "d", p=0.01, loss=None)
    record(tmp_path / "copy" / "a", p=0.0, loss=5.0)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "record.json").write_text('{"schema_version": 1, "title": "somebody else\'s"}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "record.json").write_text("{")
    base = json.loads((tmp_path / "a" / "record.json").read_text()) | {"init": "scratch", "run_id": "base"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "record.json").write_text(json.dumps(base))
    table = read_table(tmp_path, response="pretraining")
    assert table.num_rows == 1
    assert {reason: len(sources) for reason, sources in table.left_out.items()} == {
        "diverged": 1,
        "of record schema 99, where this release reads 1": 1,
        "without loss": 1,
        "copied from another folder": 1,
        "damaged or not of this tool": 2,
        "pretrained from scratch, where nothing could be forgotten": 1,
    }


def test_a_folder_without_a_run_that_can_be_fitted_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"No record\.json"):
        read_table(tmp_path)
    record(tmp_path / "a", p=0.0, loss=5.0, version=99)
    record(tmp_path / "b", p=0.0, loss=5.0, status="diverged")
    with pytest.raises(UserError, match=r"None of the 2 runs .* can be fitted: 1 of record schema 99.*; 1 diverged"):
        read_table(tmp_path, response="pretraining")


def test_ids_of_digits_are_names_and_base_models_are_read(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss,run,base\n1e8,1e6,3.0,123e4,12\n1e8,2e6,2.9,,12\n1e9,1e6,2.8,,13\n")
    table = read_table(path)
    assert len(set(table.run)) == 3
    assert table.base.tolist() == ["12", "12", "13"]


@pytest.mark.parametrize("text, value", [("1%", 0.01), ("0.05", 0.05), ("0", 0.0), ("1/128", 1 / 128), ("100%", 1.0)])
def test_shares_are_written_in_every_way_that_a_run_takes(text, value):
    assert parse_law_share(text, "p") == value


@pytest.mark.parametrize("text", ["5", "-1%", "half", ""])
def test_a_share_outside_0_to_1_is_refused(text):
    with pytest.raises(UserError, match=r"^R must"):
        parse_law_share(text, "R")


@pytest.mark.parametrize(
    "expression, kept",
    [
        ("not params <= 5e7", [1, 2]),
        ("p > -0.5 and -1 < p < 0.02", [0, 1]),
        ("5e7 < params < 2e8 or domain == 'math'", [0, 1, 2]),
        ("not (domain == 'math' and p == 0)", [1, 2]),
    ],
)
def test_conditions_are_combined_denied_and_chained(tmp_path, expression, kept):
    write(tmp_path / "t.csv", "csv")
    assert np.flatnonzero(read_table(tmp_path / "t.csv", mapping=MAPPING).where(expression)).tolist() == kept


@pytest.mark.parametrize("expression", ["params", "-domain == 1", "params <= 3 if p else 4", "params <", "max(params) > 3"])
def test_what_is_no_condition_is_one_sentence(tmp_path, expression):
    write(tmp_path / "t.csv", "csv")
    with pytest.raises(UserError, match=r"condition|Cannot read"):
        read_table(tmp_path / "t.csv", mapping=MAPPING).where(expression)


def test_jsonl_may_begin_with_a_mark_and_hold_other_line_ends_in_its_text(tmp_path):
    line = json.dumps({"N": 1e8, "loss": 3.0, "domain": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8-sig")
    table = read_table(tmp_path / "t.jsonl")
    assert table.columns["N"].tolist() == [1e8, 1e8]
    assert set(table.labels["domain"]) == {"one\u2028two"}

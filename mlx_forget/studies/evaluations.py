"""Every evaluation of every finetuning run of a sweep as one CSV file, which stands beside the exported table of the runs."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_forget.durable_files import write_text
from mlx_forget.errors import UserError
from mlx_forget.history import read_history
from mlx_forget.records import Run

_LOSSES = ("target_train_loss", "target_val_loss", "pretrain_val_loss")
CSV_COLUMNS = (
    *("run", "domain", "model", "N", "target_tokens", "p_asked", "seed"),
    *("step", "tokens", "pretrain_tokens", *_LOSSES),
)


def write_evaluations(runs: Sequence[Run], path: Path) -> None:
    """Every evaluation of every finetuning run as CSV, columns `CSV_COLUMNS`; losses in nats per token, to five places."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in runs:
        record, config = run.record, run.record["config"]
        if record["forgetting_nats"] is None:
            continue
        head = (record["run_id"], config["target"], config["model"], record["num_params"], config["target_tokens"], config["p"])
        for row in read_history(run.history).to_pylist():
            losses = (round(row[name], 5) for name in _LOSSES)
            writer.writerow([*head, record["seed"], row["step"], row["tokens"], row["pretrain_tokens"], *losses])
    write_text(path, text.getvalue())


def read_evaluations(path: Path) -> dict[str, list[Mapping[str, float]]]:
    """The steps and losses of each run in a file that `write_evaluations` wrote, by run id; none of a file with other columns.

    Raises:
        UserError: a row is not as it was written.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != CSV_COLUMNS:
            return {}
        try:
            for row in reader:
                found.setdefault(row["run"], []).append({name: float(row[name]) for name in ("step", *_LOSSES)})
        except (ValueError, TypeError):
            raise UserError(
                f"{path}, line {reader.line_num}, is not as forget plot wrote it: write it again, or move it away."
            ) from None
    return found

"""What stages of continual learning do to one another: the loss on every data set after every stage.

Row 0 is the start model, row i the checkpoint of stage i that went on; column 0 is the pretraining data, column j the validation data of
stage j. With L[i, j] in nats per token and T stages, after Lopez-Paz and Ranzato (2017), whose accuracies have the other sign:

    backward transfer  mean over j < T of L[j, j] - L[T, j]        what later stages gave to earlier ones; negative: forgotten
    forward transfer   mean over j > 1 of L[0, j] - L[j - 1, j]    what earlier stages gave to one that had not begun

Standard errors are over evaluation windows, paired by window; data sets are independent draws.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.backends import load_backend
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.durable_files import read_object, write_text
from mlx_forget.errors import UserError
from mlx_forget.evaluate import Estimate, Losses, Windows, estimate, paired_difference, window_losses
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.methods import MethodSpec
from mlx_forget.sweeps.stages import CHECKPOINT_OF, Chain
from mlx_forget.trainer import Trainer
from mlx_forget.training.plan import Plan
from mlx_forget.training.run import trainer_spec

FILE = "stages.json"
SCHEMA_VERSION = 1
START = "start"
CSV_COLUMNS = ("chain", "num_stages_done", "after", "data", "loss", "stderr")


@dataclass(frozen=True)
class LossMatrix:
    """The losses of one chain of stages, as far as it has come.

    Args:
        label: the chain.
        rows: `start`, then the stages that are done.
        columns: the pretraining data where it is measured, then every stage.
        first_stage: the column of the first stage: 1, or 0 without pretraining data.
        losses: [rows][columns], the mean loss of each evaluation window in nats per token, float64[num_windows].
        runs: the run folders of the stages that are done.
        weights: the checksums of each row's weights.
        evaluated: the checksums of each column's windows.
    """

    label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    first_stage: int
    losses: tuple[tuple[Losses, ...], ...]
    runs: tuple[str, ...]
    weights: tuple[str, ...]
    evaluated: tuple[str, ...]

    @property
    def num_done(self) -> int:
        return len(self.rows) - 1

    def loss(self, row: int, column: int) -> Estimate:
        return estimate(self.losses[row][column])

    def change(self, column: int, *, since: int, until: int = -1) -> Estimate:
        """The rise of a column's loss between two rows."""
        return paired_difference(self.losses[until][column], self.losses[since][column])

    @property
    def forgotten(self) -> dict[str, Estimate]:
        """What the last row has forgotten: of the pretraining data since the start, of each earlier stage since it ended."""
        found = {self.columns[0]: self.change(0, since=0)} if self.first_stage else {}
        stages = range(1, self.num_done)
        return found | {self.rows[j]: self.change(self.first_stage + j - 1, since=j) for j in stages}

    @property
    def backward_transfer(self) -> Estimate | None:
        """None before the second stage has ended."""
        return _mean(
            [self.change(self.first_stage + j - 1, since=j, until=self.num_done) for j in range(1, self.num_done)], sign=-1
        )

    @property
    def forward_transfer(self) -> Estimate | None:
        """None before the first stage has ended."""
        stages = range(2, min(self.num_done + 1, len(self.columns) - self.first_stage) + 1)
        return _mean([self.change(self.first_stage + j - 1, since=0, until=j - 1) for j in stages], sign=-1)


def _mean(changes: Sequence[Estimate], *, sign: int) -> Estimate | None:
    if not changes:
        return None
    mean = sign * float(np.mean([change.mean for change in changes]))
    return Estimate(mean, math.sqrt(sum(change.stderr**2 for change in changes)) / len(changes))


def measure(chain: Chain, folders: Sequence[Path], known: Sequence[LossMatrix] = ()) -> LossMatrix:
    """The matrix of a chain whose first stages are done, in these run folders; losses that `known` matrices hold are not read again."""
    windows = _columns(chain)
    evaluated = tuple(_checksum(one.tokens) for one in windows)
    before = {
        (weights, column): losses
        for matrix in known
        for weights, row in zip(matrix.weights, matrix.losses, strict=True)
        for column, losses in zip(matrix.evaluated, row, strict=True)
    }
    starts = [_first_start(chain.plans[0])]
    keeps = [stage.keep for stage in chain.stages]
    trust = chain.plans[0].config.trust_remote_code
    starts += [
        whole_checkpoint(checkpoint.find_checkpoint(folder / "checkpoints" / CHECKPOINT_OF[keep], trust_remote_code=trust))
        for folder, keep in zip(folders, keeps, strict=False)
    ]
    weights = tuple(start.state["files"][checkpoint.WEIGHTS] for start in starts)
    trainer: Trainer | None = None
    losses = []
    for start, name in zip(starts, weights, strict=True):
        if any((name, column) not in before for column in evaluated):
            trainer = trainer or _reader(chain.plans[0])
            trainer.load(start.weights)
            before |= {(name, column): window_losses(trainer, one) for column, one in zip(evaluated, windows, strict=True)}
        losses.append(tuple(before[name, column] for column in evaluated))
    stages = tuple(stage.name for stage in chain.stages)
    measured = chain.plans[0].config.pretrain
    return LossMatrix(
        label=chain.label,
        rows=(START, *stages[: len(folders)]),
        columns=stages if measured is None else (measured, *stages),
        first_stage=0 if measured is None else 1,
        losses=tuple(losses),
        runs=tuple(folder.name for folder in folders),
        weights=weights,
        evaluated=evaluated,
    )


def _columns(chain: Chain) -> list[Windows]:
    """The windows of the pretraining data, if it is measured, and of each stage's validation data."""
    _, _, pretrain = chain.plans[0].windows
    return [*([] if pretrain is None else [pretrain]), *(plan.windows[1] for plan in chain.plans)]


def _first_start(plan: Plan) -> Checkpoint:
    if plan.start is not None:
        return plan.start
    assert plan.base is not None, "a first stage from scratch has no start model"
    return checkpoint.open_checkpoint(plan.base.folder / "checkpoints" / "last")


def _reader(plan: Plan) -> Trainer:
    """A trainer that only evaluates."""
    spec = trainer_spec(plan)
    runtime = replace(spec.runtime, reads_only=True, shard=False)
    return load_backend(plan.backend)(replace(spec, method=MethodSpec(), adapter=None, runtime=runtime))


def _checksum(tokens: npt.NDArray[np.int32]) -> str:
    return hashlib.sha256(repr(tokens.shape).encode() + tokens.tobytes()).hexdigest()


# --- the file ---


def write_matrices(path: Path, recipe: str, matrices: Sequence[LossMatrix]) -> None:
    """Write `stages.json`, aside first: every chain with its losses, what was forgotten, and the losses of the windows."""
    chains = [{**summary(m), "window_losses": [[losses.tolist() for losses in row] for row in m.losses]} for m in matrices]
    write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, "recipe": recipe, "chains": chains}))


def read_matrices(path: Path) -> list[LossMatrix]:
    """The matrices of `stages.json`; none where there is no such file.

    Raises:
        UserError: the file is damaged or of another schema.
    """
    try:
        content = read_object(path)
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"{path} has schema {content['schema_version']}, this version reads {SCHEMA_VERSION}.")
        return [_from_json(chain) for chain in content["chains"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: remove it, and the same sweep measures it again.") from None


def _from_json(chain: dict[str, Any]) -> LossMatrix:
    names = ("rows", "columns", "runs", "weights", "evaluated")
    losses = tuple(tuple(np.array(one, np.float64) for one in row) for row in chain["window_losses"])
    texts = {name: tuple(map(str, chain[name])) for name in names}
    made = LossMatrix(label=str(chain["label"]), first_stage=int(chain["first_stage"]), losses=losses, **texts)
    # One loss for every window of a column in every row, and a column for every stage that is done.
    shapes = [[one.shape for one in row] for row in losses]
    is_whole = shapes == [[(one.size,) for one in losses[0]]] * len(made.rows) and len(losses[0]) == len(made.columns)
    if not is_whole or made.first_stage not in (0, 1) or not 0 <= made.num_done <= len(made.columns) - made.first_stage:
        raise ValueError
    if not len(made.rows) == len(made.weights) == made.num_done + 1 or len(made.evaluated) != len(made.columns):
        raise ValueError
    return made


def summary(matrix: LossMatrix) -> dict[str, Any]:
    """A matrix as plain values, without the losses of single windows."""
    cells = [[matrix.loss(i, j) for j in range(len(matrix.columns))] for i in range(len(matrix.rows))]

    def plain(value: Estimate | None) -> dict[str, float] | None:
        return None if value is None else asdict(value)

    return {
        "label": matrix.label,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "first_stage": matrix.first_stage,
        "losses": [[cell.mean for cell in row] for row in cells],
        "stderr": [[cell.stderr for cell in row] for row in cells],
        "forgotten": {name: plain(value) for name, value in matrix.forgotten.items()},
        "backward_transfer": plain(matrix.backward_transfer),
        "forward_transfer": plain(matrix.forward_transfer),
        "runs": matrix.runs,
        "weights": matrix.weights,
        "evaluated": matrix.evaluated,
    }


def write_csv(matrices: Sequence[LossMatrix], path: Path) -> None:
    """Every cell of every matrix, columns `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for matrix in matrices:
        for i, row in enumerate(matrix.rows):
            for j, column in enumerate(matrix.columns):
                cell = matrix.loss(i, j)
                writer.writerow([matrix.label, i, row, column, cell.mean, cell.stderr])
    write_text(path, text.getvalue())


def table_lines(matrices: Sequence[LossMatrix]) -> list[str]:
    """The matrices as aligned text, each followed by what it comes to."""
    lines: list[str] = []
    for matrix in matrices:
        width = max(len(name) for name in (*matrix.rows, "after"))
        lines.append(matrix.label or "losses")
        lines.append(f"  {'after':<{width}}" + "".join(f"  {name:>15.15}" for name in matrix.columns))
        for i, name in enumerate(matrix.rows):
            cells = (matrix.loss(i, j) for j in range(len(matrix.columns)))
            lines.append(f"  {name:<{width}}" + "".join(f"  {cell.mean:>8.4f}±{cell.stderr:.4f}" for cell in cells))
        lines += [f"  forgotten of {name}: {_text(value)}" for name, value in matrix.forgotten.items()]
        for name, value in (("backward", matrix.backward_transfer), ("forward", matrix.forward_transfer)):
            if value is not None:
                lines.append(f"  {name} transfer: {_text(value)}")
    lines.append(
        "Validation losses in nats per token; ± is one standard error over evaluation windows, differences are paired by window."
    )
    return lines


def _text(value: Estimate) -> str:
    return f"{value.mean:+.4f} ± {value.stderr:.4f} nats"

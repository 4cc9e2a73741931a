"""What the law tests share."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import mlx_forget.laws  # noqa: F401  (registers the published laws)
from mlx_forget.cli import laws as law_commands
from mlx_forget.errors import UserError

REFERENCE = Path(__file__).parents[2] / "data" / "reference"


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def forget() -> Callable[..., Ran]:
    """Run a law command as the real application does: a user error is one line on stderr and exit code 2."""
    app = typer.Typer()
    law_commands.register(app)
    runner = CliRunner()

    def run(*arguments: str | Path) -> Ran:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, UserError):
            return Ran(2, result.stdout, f"error: {result.exception}\n")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run

"""What the law tests share."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mlx_forget.laws  # noqa: F401  (registers the published laws)

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
def forget(run_forget) -> Callable[..., Ran]:
    """Run the command line in this process."""
    return lambda *arguments: Ran(*run_forget(*arguments))

"""The files of an audit: `audit.json` and `audit.html`, each whole or absent."""

import json
from pathlib import Path

from mlx_forget.audit.page import render
from mlx_forget.audit.run import Audit
from mlx_forget.durable_files import write_text

JSON, PAGE = "audit.json", "audit.html"


def write_audit(audit: Audit, folder: Path) -> None:
    """Write both files; they take the place of an earlier audit's."""
    for name, content in ((JSON, to_json(audit) + "\n"), (PAGE, render(audit))):
        write_text(folder / name, content)


def to_json(audit: Audit) -> str:
    """One JSON object on one line."""
    return json.dumps(audit.as_json(), allow_nan=False)

"""The files of an audit: `audit.json` and `audit.html`, each whole or absent."""

import json
import os
from pathlib import Path

from mlx_forget.audit.page import render
from mlx_forget.audit.run import Audit
from mlx_forget.durable_files import write_text
from mlx_forget.errors import UserError

JSON, PAGE = "audit.json", "audit.html"


def make_folder(folder: Path) -> None:
    """Make the folder of an audit before the work starts.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write to {folder}: no permission.")


def write_audit(audit: Audit, folder: Path) -> None:
    """Write both files; they take the place of an earlier audit's."""
    for name, content in ((JSON, to_json(audit) + "\n"), (PAGE, render(audit))):
        write_text(folder / name, content)


def to_json(audit: Audit) -> str:
    """One JSON object on one line."""
    return json.dumps(audit.as_json(), allow_nan=False)

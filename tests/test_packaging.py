"""The wheel works from an empty folder, with its recipes inside and nothing of this checkout on the path."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_in(folder, site, *command):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment)


def test_the_wheel_holds_packages_and_data_and_nothing_else(unpacked):
    tops = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"mlx_forget", "cuda_backend"}
    assert (unpacked / "mlx_forget" / "_data" / "recipes" / "figure1.yaml").is_file()
    for package in ("pages", "audit", "report"):
        assert (unpacked / "mlx_forget" / package / "page.html.jinja").is_file()
    (metadata,) = unpacked.glob("*.dist-info")
    assert "forget = mlx_forget.cli:main" in (metadata / "entry_points.txt").read_text()


def test_the_wheel_works_from_an_empty_folder(unpacked, tmp_path):
    where = run_in(tmp_path, unpacked, "-c", "import mlx_forget, mlx_forget.resources as r; print(r.path('recipes'))")
    assert where.stdout.strip() == str(unpacked / "mlx_forget" / "_data" / "recipes")
    result = run_in(tmp_path, unpacked, "-m", "mlx_forget", "sweep", "figure1", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["runs"]) == 5
    assert list(tmp_path.iterdir()) == []


def test_resources_are_found_from_a_source_tree_too(tmp_path):
    where = run_in(tmp_path, ROOT, "-c", "import mlx_forget.resources as r; print(r.path('recipes'))")
    assert where.stdout.strip() == str(ROOT / "data" / "recipes")

"""The wheel works from an empty folder, with its recipes inside and nothing of this checkout on the path; the sdist builds it."""

import email
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mlx_forget.backends import available_backends

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    (wheel,) = built.glob("*.whl")
    site = tmp_path_factory.mktemp("wheel") / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_in(folder, site, *command):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment)


def test_the_wheel_holds_packages_and_data_and_nothing_else(unpacked):
    tops = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"mlx_forget", "cuda_backend"}
    assert (unpacked / "mlx_forget" / "_data" / "recipes" / "figure1.yaml").is_file()
    for package in ("pages", "audit", "report"):
        assert (unpacked / "mlx_forget" / package / "page.html.jinja").is_file()
    assert all((unpacked / package / "py.typed").is_file() for package in tops)
    (metadata,) = unpacked.glob("*.dist-info")
    assert "forget = mlx_forget.cli:main" in (metadata / "entry_points.txt").read_text()
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    # Tables of others keep their licences beside them.
    assert {path.name for path in (unpacked / "mlx_forget" / "_data" / "reference").glob("LICENSE-*")} == {
        path.name for path in (ROOT / "data" / "reference").glob("LICENSE-*")
    }


def test_the_metadata_say_what_pyproject_says(unpacked):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (metadata,) = unpacked.glob("*.dist-info")
    found = email.message_from_string((metadata / "METADATA").read_text(encoding="utf-8"))
    assert (found["Name"], found["Version"], found["License-Expression"]) == (project["name"], project["version"], "MIT")
    assert found["Requires-Python"] == project["requires-python"]
    assert set(found.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert found.get_payload().startswith("# mlx-forget")


def test_the_sdist_holds_what_a_packager_tests_and_documents_with(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "docs/index.md", "data/recipes/figure1.yaml", "LICENSE"} <= names
    tracked = subprocess.run(["git", "ls-files", "tests", "data", "docs"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) - names == set()


def test_every_dependency_states_its_oldest_version_and_the_tested_one_is_no_older():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(name): Version(number) for name, _, number in (line.partition("==") for line in lines) if number}
    for line in [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]:
        requirement = Requirement(line)
        (oldest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        # wandb asks for a service: runs of the tests need none, and no version is pinned.
        if requirement.name != "wandb":
            assert tested[canonicalize_name(requirement.name)] >= Version(oldest), line


def test_the_wheel_works_from_an_empty_folder(unpacked, tmp_path):
    where = run_in(tmp_path, unpacked, "-c", "import mlx_forget, mlx_forget.resources as r; print(r.path('recipes'))")
    assert where.stdout.strip() == str(unpacked / "mlx_forget" / "_data" / "recipes")
    result = run_in(tmp_path, unpacked, "-m", "mlx_forget", "sweep", "figure1", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["runs"]) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(not available_backends(), reason="trains a network")
def test_figure_1_is_made_from_the_wheel(unpacked, tmp_path):
    result = run_in(tmp_path, unpacked, "-m", "mlx_forget", "sweep", "figure1", "--set", "p=[0, 5%]", "--output", "runs")
    assert result.returncode == 0, result.stderr
    result = run_in(tmp_path, unpacked, "-m", "mlx_forget", "plot", "runs", "--output", "figures")
    assert result.returncode == 0, result.stderr
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} >= {".png", ".pdf", ".csv"}


def test_resources_are_found_from_a_source_tree_too(tmp_path):
    where = run_in(tmp_path, ROOT, "-c", "import mlx_forget.resources as r; print(r.path('recipes'))")
    assert where.stdout.strip() == str(ROOT / "data" / "recipes")

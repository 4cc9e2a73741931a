"""The documentation site: it builds, it is complete, and it asks nothing of a network."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import mlx_forget
from mlx_forget.cli import COMMANDS
from mlx_forget.history import SCHEMA
from tests.fakes import add_fake_backend

ROOT = Path(__file__).resolve().parents[1]
# What a browser fetches by itself: scripts, styles, pictures, frames; not the links that a reader may follow.
FETCHED = re.compile(r'<(?:script|img|iframe|link(?=[^>]*rel="?(?:stylesheet|preload|icon)))[^>]*(?:src|href)="?(https?:)?//')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the extra docs: make docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_builds_without_a_warning_and_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page


def test_the_site_has_every_command_every_public_name_and_equations(site):
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="forget-{name}"' in commands for name in COMMANDS)
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert all(f"mlx_forget.{name}" in python for name in mlx_forget.__all__)
    laws = (site / "laws.html").read_text(encoding="utf-8")
    assert laws.count("<math") >= 20
    assert "arithmatex" not in laws
    assert "make docs</code> makes this page" not in commands + python


def test_pages_read_without_the_site_have_the_tables_of_the_code():
    # In a process of its own: other tests register laws.
    command = [sys.executable, str(ROOT / "docs" / "_hooks" / "from_code.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"python docs/_hooks/from_code.py: {result.stdout + result.stderr}"
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    # A table whose last mark is missing would never be made anew.
    assert all(page.count("<!-- from code:") + page.count("<!-- on the site:") == page.count("<!-- end -->") for page in pages)
    assert sum("<!-- from code:" in page for page in pages) >= 5


@pytest.mark.parametrize("name", mlx_forget.__all__)
def test_every_public_name_says_what_it_is(name):
    assert len(getattr(mlx_forget, name).__doc__ or "") > 20


def test_the_glossary_names_every_key_of_a_record_a_history_and_a_fit(run_forget, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    add_fake_backend(monkeypatch)
    code, out, err = run_forget("train", "--backend", "fake", "--json")
    assert code == 0, err
    rows = "".join(
        f"{n},{d},{p},3,{3 + 20 * d**0.3 / ((1 + 300 * p) * n) ** 0.42}\n"
        for n in (1e8, 1e9)
        for d in (1e6, 3e6)
        for p in (0, 0.01)
    )
    (tmp_path / "runs.csv").write_text("N,D,p,L0,loss\n" + rows)
    fit = json.loads(run_forget("fit", "runs.csv", "--json")[1])
    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")))
    for keys in (json.loads(out), SCHEMA.names, fit):
        assert set(keys) - named == set()


def test_the_tour_of_the_tree_names_every_package_and_module_at_the_top_and_no_other_file():
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in (ROOT / "mlx_forget").glob("*/__init__.py"):
        assert f"`mlx_forget/{package.parent.name}/`" in tour
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", tour))
    assert {path.name for path in (ROOT / "mlx_forget").glob("*.py") if not path.name.startswith("__")} - named == set()
    assert named - {path.name for folder in ("mlx_forget", "tests") for path in (ROOT / folder).rglob("*.py")} == set()


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"], cited["title"]) == (project["version"], project["license"], project["name"])


def test_the_pages_are_in_the_source_distribution():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = content["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in ("docs", "mkdocs.yml", "CONTRIBUTING.md", "CITATION.cff"):
        assert name in listed
        assert (ROOT / name).exists()

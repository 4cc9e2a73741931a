"""Who may import whom, proven in fresh interpreters; and what start-up must not load."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FRAMEWORKS = {
    "torch",
    "mlx",
    "scipy",
    "sentencepiece",
    "datasets",
    "tokenizers",
    "transformers",
    "matplotlib",
    "ray",
    "submitit",
}


def loaded_by(statement, *watched):
    """Top-level modules among `watched` that a statement loads in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split()) & set(watched)


@pytest.mark.parametrize("statement", ["import mlx_forget", "import mlx_forget.cli", "import mlx_forget.errors"])
def test_importing_the_package_loads_nothing_heavy(statement):
    assert loaded_by(statement, *FRAMEWORKS, "numpy", "pyarrow", "yaml") == set()


def test_help_loads_nothing_heavy():
    statement = "from mlx_forget.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    script = f"import sys, io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()):\n    exec({statement!r})"
    assert loaded_by(script, *FRAMEWORKS, "numpy", "pyarrow", "yaml") == set()


@pytest.mark.parametrize(
    "module", ["store", "mixture", "batches", "sources", "tokenizer", "corpora", "catalog", "recipes", "tokenise", "overlap"]
)
def test_the_pipeline_needs_numpy_and_arrow_only(module):
    assert loaded_by(f"import mlx_forget.pipeline.{module}", *FRAMEWORKS, "yaml", "safetensors") == set()


def test_the_laws_need_numpy_and_scipy_only():
    assert loaded_by("import mlx_forget.laws", *(FRAMEWORKS - {"scipy"}), "pyarrow", "yaml") == set()


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "trainer",
        "backends",
        "specs",
        "steps",
        "training.identity",
        "training.data",
        "ladder",
        "training.loop",
        "evaluate",
        "checkpoint",
        "pretrained",
        "training.start",
        "history",
        "records",
        "runs.rows",
        "runs.index",
        "training.plan",
        "training.watch",
        "training.run",
        "training.replay_rows",
        "sweeps.grid",
        "sweeps.sweep",
        "sweeps.costs",
        "sweeps.dispatch",
        "engines.processes",
        "engines.lease",
        "studies.figure1",
        "replay.online",
        "replay.sampled_store",
        "replay.log_probs",
        "studies.method_comparison",
        "studies.rate_tradeoff",
        "studies.method_plots",
        "studies.toy_continual",
        "comparison",
        "audit.run",
        "audit.page",
        "runs.export",
    ],
)
def test_the_core_loads_no_framework(module):
    assert loaded_by(f"import mlx_forget.{module}", *FRAMEWORKS) == set()


def test_a_report_needs_the_laws_and_no_framework():
    assert loaded_by("import mlx_forget.report.page", *(FRAMEWORKS - {"scipy"})) == set()


@pytest.mark.parametrize(
    "module, own, other", [("cuda_backend.backend", "torch", "mlx"), ("mlx_forget.mlx_backend.backend", "mlx", "torch")]
)
def test_backends_do_not_import_each_other(module, own, other):
    if importlib.util.find_spec(own) is None:
        pytest.skip(f"{own} is not installed")
    assert loaded_by(f"import {module}", own, other) == {own}


def imported_at_once(path, modules):
    """The modules of the project that a file imports when it is loaded: not within functions, and not for types alone."""
    waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            yield from (name for a in node.names if (name := f"{node.module}.{a.name}") in modules)
            yield from [node.module] * (node.module in modules)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def test_no_module_imports_itself_by_way_of_others():
    files = [path for package in ("mlx_forget", "cuda_backend") for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    assert len(modules) > 150
    needs = {name: set(imported_at_once(path, modules)) - {name} for name, path in modules.items()}
    assert "mlx_forget.errors" in needs["mlx_forget.trainer"]
    # A package whose `__init__` gathers its own modules is no circle, but all else is: raises CycleError, which names it.
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    TopologicalSorter(
        {name: {n for n in found if not (n in packages and name.startswith(f"{n}."))} for name, found in needs.items()}
    ).prepare()

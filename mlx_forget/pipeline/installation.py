"""Where the built-in corpora are cut from: a pinned list of distributions, and their installed files."""

import contextlib
import functools
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from mlx_forget.pipeline.passages import LANGUAGES, Language, SourceFile

# The versions of constraints.txt that the published fingerprints belong to.
PINNED_SOURCES: dict[str, str] = {
    "Python": "3.11.7",
    "datasets": "5.2.0",
    "fonttools": "4.68.0",
    "fsspec": "2026.9.0",
    "huggingface_hub": "2.4.0",
    "Jinja2": "3.1.6",
    "matplotlib": "3.11.2",
    "mlx": "0.32.4",
    "mlx-lm": "0.32.2",
    "mpmath": "1.3.0",
    "networkx": "3.6.1",
    "numpy": "2.4.6",
    "pandas": "3.1.1",
    "pillow": "13.0.0",
    "pyarrow": "26.0.1",
    "rich": "15.0.0",
    "scipy": "1.17.1",
    "sympy": "1.14.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
PINNED_HEADERS: dict[str, str] = {name: PINNED_SOURCES[name] for name in ("numpy", "pyarrow", "torch")}
SMOKE_SOURCES: dict[str, str] = {"Python": PINNED_SOURCES["Python"]}
SMOKE_HEADERS: dict[str, str] = {"numpy": PINNED_SOURCES["numpy"]}
_SMOKE_FOLDERS = {
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "urllib",
}

# Tests, copies of other projects, and `pydoc_data`, whose topics are read as what they are.
_SKIPPED_FOLDERS = {
    "..",
    "__pycache__",
    "_bundled",
    "_vendor",
    "dist-packages",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "testdata",
    "testing",
    "tests",
}
# What an installation writes for itself: versions, paths and build settings.
_SKIPPED_FILES = {"__config__.py", "_distributor_init.py", "_version.py", "version.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-3", "torch/include/ATen/ops/")


@functools.cache
def installed_version(name: str) -> str | None:
    """The version of a distribution, or of Python itself; None where it is not installed."""
    if name == "Python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def differences(pinned: dict[str, str]) -> list[str]:
    """What is not as pinned, a clause each. A local version such as `2.13.0+cpu` counts as `2.13.0`."""
    clauses = []
    for name, wanted in pinned.items():
        found = installed_version(name)
        if found is None:
            clauses.append(f"{name} is not installed (published with {wanted})")
        elif found.partition("+")[0] != wanted:
            clauses.append(f"{name} {found} instead of {wanted}")
        elif name != "Python" and not metadata.files(name):
            clauses.append(f"{name} has no list of its files (pip did not install it)")
    return clauses


def source_files(pinned: dict[str, str], *, languages: set[Language], smoke: bool = False) -> list[SourceFile]:
    """The files in these languages, sorted by their names inside the installation, wherever that is.

    `smoke` takes a few folders of the standard library only. Nothing is imported.
    """
    named: list[tuple[str, Path]] = []
    for name in pinned:
        if name == "Python":
            named += _standard_library(smoke=smoke)
        else:
            named += _distribution_files(name)
    found = []
    for name, path in sorted(named):
        language = LANGUAGES.get(path.suffix)
        if language is not None and language in languages and _is_wanted(name):
            # A file that is listed but was deleted is not there to read.
            with contextlib.suppress(OSError):
                found.append(SourceFile(path, language, path.stat().st_size))
    return found


def _is_wanted(name: str) -> bool:
    *folders, file = name.split("/")
    return not (_SKIPPED_FOLDERS.intersection(folders) or file in _SKIPPED_FILES or name.startswith(_SKIPPED_PREFIXES))


def _standard_library(*, smoke: bool) -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        if smoke and Path(folder) == root:
            folders[:] = sorted(_SMOKE_FOLDERS.intersection(folders))
            continue
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _distribution_files(name: str) -> Iterable[tuple[str, Path]]:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return []
    return [(file.as_posix(), Path(str(file.locate()))) for file in files if file.suffix in LANGUAGES]

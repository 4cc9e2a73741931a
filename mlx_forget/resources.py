"""Files that travel with the code: recipes, reference data, measured run tables."""

from pathlib import Path

from mlx_forget.errors import UserError, unknown

_PACKAGE = Path(__file__).resolve().parent


def path(*parts: str) -> Path:
    """A file or folder of `data/`: inside the installed wheel, else beside the pyproject.toml of a source tree.

    Raises:
        UserError: this installation has no data folder.
    """
    for root in (_PACKAGE / "_data", _PACKAGE.parent / "data"):
        if root.is_dir() and (root.name == "_data" or (root.parent / "pyproject.toml").is_file()):
            return root.joinpath(*parts)
    raise UserError("This installation lacks its data folder: install the mlx-forget wheel, or run from a source tree.")


def recipe(name: str) -> Path:
    """A recipe by file path, or by the name of one that comes with the package.

    Raises:
        UserError: neither exists.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    known = recipe_files()
    if name in known:
        return known[name]
    if given.suffix in (".yaml", ".yml"):
        raise UserError(f"There is no recipe file {name}.")
    raise unknown("recipe", name, known)


def recipe_files() -> dict[str, Path]:
    """The recipes of sweeps that come with the package, by name."""
    folder = path("recipes")
    files = [file for file in sorted(folder.rglob("*.yaml")) if folder / "corpora" not in file.parents]
    return {str(file.relative_to(folder).with_suffix("")): file for file in files}

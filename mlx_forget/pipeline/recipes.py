"""Recipes of public corpora (`data/recipes/corpora/*.yaml`): where each is, at which revision, under which licence, and how it is read.

forget prepare pile-arxiv --from /data/pile -o stores/arxiv      from files that are here
forget prepare fineweb-edu -o stores/fineweb                     streamed from the Hub
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_forget import resources
from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline.conversations import Fields
from mlx_forget.pipeline.hub import HubData
from mlx_forget.pipeline.sources import Reading
from mlx_forget.strict_yaml import read_yaml


@dataclass(frozen=True)
class CorpusRecipe:
    """A public corpus.

    Args:
        name: what `forget prepare` and `--target` take.
        description: one line for people.
        role: what it is meant for.
        id, config, revision: where it is on the Hub.
        files: (split, pattern) of its files there, where the data set does not declare what is wanted.
        licence: its terms, in a word.
        fields: how its records are read.
        schema: the type of each column of a record that is read.
        num_bytes, num_documents: of the training text, about; 0 where it is not published.
        category: the Pile's category, for its subsets.
    """

    name: str
    description: str
    role: str
    id: str
    revision: str
    licence: str
    schema: Mapping[str, Any]
    config: str | None = None
    files: tuple[tuple[str, str], ...] = ()
    fields: Fields = field(default_factory=Fields)
    num_bytes: int = 0
    num_documents: int = 0
    category: str | None = None

    def hub(self) -> HubData:
        """Where the corpus is on the Hub."""
        return HubData(self.id, self.config, self.revision, self.files)

    def reading(self, asked: Reading) -> Reading:
        """How it is read, with the filters that were asked for."""
        return replace(asked, fields=self.fields)


def names() -> list[str]:
    """The recipes there are."""
    return sorted(_all())


def load(name: str) -> CorpusRecipe:
    """A recipe by name.

    Raises:
        UserError: there is none of that name.
    """
    recipes = _all()
    if name not in recipes:
        raise unknown("recipe", name, recipes)
    return recipes[name]


@lru_cache(maxsize=1)
def _all() -> dict[str, CorpusRecipe]:
    found: dict[str, CorpusRecipe] = {}
    for path in sorted(resources.path("recipes", "corpora").glob("*.yaml")):
        for recipe in read_recipes(path):
            found[recipe.name] = recipe
    return found


def read_recipes(path: Path) -> list[CorpusRecipe]:
    """The recipes in a file: one, or one for each of its `subsets`.

    Raises:
        UserError: a key that is missing or unknown, or files that lead out of the corpus.
    """
    content = read_yaml(path)
    subsets = content.pop("subsets", None)
    _check_mappings(path, content, subsets)
    if subsets is None:
        return [_recipe(path.stem, content, path)]
    return [_recipe(f"{path.stem}-{name}", _merged(content, own), path) for name, own in subsets.items()]


def _check_mappings(path: Path, content: dict[str, Any], subsets: Any) -> None:
    """Refuse what is no mapping where one is expected."""
    if subsets is not None and not (isinstance(subsets, dict) and all(isinstance(own, dict) for own in subsets.values())):
        raise UserError(f"{path}: subsets must be a mapping of names to mappings.")
    for one in (content, *(subsets or {}).values()):
        for key in ("fields", "files", "schema"):
            if not isinstance(one.get(key, {}), dict):
                raise UserError(f"{path}: {key} must be a mapping of keys to values.")
        fields = one.get("fields", {})
        if not isinstance(fields.get("where", {}), dict) or not all(isinstance(key, str) for key in (*one, *fields)):
            raise UserError(f"{path}: fields must be a mapping of names to columns, and where one of columns to values.")
        for patterns in one.get("files", {}).values():
            if not all(isinstance(pattern, str) for pattern in _listed(patterns) or [None]):
                raise UserError(f"{path}: files must be patterns, or lists of them, by split.")


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {**shared, **own, "fields": {**shared.get("fields", {}), **own.get("fields", {})}}


def _recipe(name: str, content: dict[str, Any], path: Path) -> CorpusRecipe:
    values = dict(content)
    files = tuple((split, pattern) for split, patterns in values.pop("files", {}).items() for pattern in _listed(patterns))
    for _, pattern in files:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"{path}: the files {pattern!r} lead out of the corpus, which is refused.")
    given = dict(values.pop("fields", {}))
    where = tuple((str(key), str(value)) for key, value in given.pop("where", {}).items())
    try:
        return CorpusRecipe(name=name, files=files, fields=Fields(**given, where=where), **values)
    except TypeError as error:
        raise UserError(f"{path}: {str(error).split('.__init__() ')[-1]}.") from None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

"""What pages take from the code: laws, methods, sizes, columns, recipes, results; on the site, commands and public names too.

A page asks with lines of its own. Between `<!-- from code: WHAT -->` and `<!-- end -->` it keeps what was made, for those who read it
without the site: `python docs/_hooks/from_code.py` writes that anew, and with `--check` names the pages that are old. What is long or
stands in another file is made for the site alone, in place of what says so between `<!-- on the site: WHAT -->` and `<!-- end -->`.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx_forget
import mlx_forget.laws
from mlx_forget import resources
from mlx_forget.cli import COMMANDS, load_command
from mlx_forget.ladder import SIZES, model_spec, num_non_embedding_params, num_params
from mlx_forget.laws.forms import COLUMNS, get_law, laws
from mlx_forget.methods import METHODS
from mlx_forget.runs.export import read_export
from mlx_forget.studies.law_study_text import domain_lines, study_lines
from mlx_forget.studies.prospective import compare, outcome_lines, read_predictions
from mlx_forget.sweeps.grid import read_recipe

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

_KEPT = re.compile(r"^(<!-- from code: (\w+)(?: (\S+))? -->\n).*?^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
_ON_THE_SITE = re.compile(r"^<!-- on the site: (\w+)(?: (\S+))? -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
# Pages at the top of the tree, named from a page of docs/: on the site they stand beside the others.
_AT_THE_TOP = re.compile(r"\]\(((?:\.\./)*)\.\./(CONTRIBUTING|SECURITY|CHANGELOG)\.md")
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(markdown: str) -> str:
    """A page whose tables are those of the code as it is now."""
    return _KEPT.sub(lambda found: f"{found[1]}\n{_made(found[2], found[3])}\n\n{found[4]}", markdown)


def _made(name: str, argument: str | None) -> str:
    return MAKERS[name](*filter(None, [argument]))


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Some pages stand at the top of the tree, where people look for them; the site has them too."""
    from mkdocs.structure.files import File

    for name in ("contributing.md", "security.md", "changelog.md"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / f"{Path(name).stem.upper()}.md")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    os.environ.pop("FORGET_SCALE", None)
    # The pages at the top of the tree name those of the site by their place in it.
    markdown = markdown.replace("](docs/", "](")
    markdown = _AT_THE_TOP.sub(lambda found: f"]({found[1]}{found[2].lower()}.md", markdown)
    return with_tables(_ON_THE_SITE.sub(lambda found: _made(found[1], found[2]), markdown))


def readme(name: str) -> str:
    """A measured table of README.md, between the marks where people, and `make parity`, write it."""
    text = (ROOT / "README.md").read_text("utf-8")
    return text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].replace("](docs/", "](").strip()


def commands() -> str:
    """Every command: what it does, how it is called, its options, an example."""
    return "\n\n".join(part for name in COMMANDS for part in _command(name, load_command(name), level=2))


def _command(words: str, command: Any, *, level: int) -> Iterable[str]:
    yield f"{'#' * level} forget {words}"
    yield _unmarked(command.help)
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        context = command.make_context(words, [], resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"```text\nforget {words} {usage}\n```"
        yield table(
            ("argument or option", "what it is"), (_parameter(p) for p in command.params if not getattr(p, "hidden", False))
        )
        yield f'```text title="Example"\n{command.epilog.removeprefix("Example: ")}\n```'
    for name, below in subcommands.items():
        yield from _command(f"{words} {name}", below, level=level + 1)


def _parameter(parameter: Any) -> tuple[str, str]:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`", _unmarked(parameter.help)
    names = [*parameter.opts, *parameter.secondary_opts]
    return " ".join(f"`{name}`" for name in names), _unmarked(parameter.help)


def _unmarked(text: str | None) -> str:
    """Help text without the escapes that the terminal's markup needs, and with those of Markdown."""
    return re.sub(r"([\[\]<*_])", r"\\\1", (text or "").replace("\\[", "["))


def public_names() -> str:
    """Every public name, from its docstring."""
    parts = []
    for name, where in mlx_forget._PUBLIC.items():
        module, _, attribute = where.partition(":")
        part = f"::: {module}.{attribute or name}\n    options:\n      heading: mlx_forget.{name}\n      toc_label: {name}"
        # Keys say what they are in their metadata, not in a signature.
        keys = [
            field for field in getattr(getattr(mlx_forget, name), "__dataclass_fields__", {}).values() if "help" in field.metadata
        ]
        parts.append(f"{part}\n      show_signature: false\n\n{_keys(keys)}" if keys else part)
    return "\n\n".join(parts)


def _keys(fields: Iterable[Any]) -> str:
    rows = (
        (
            f"`{one.name}`",
            "" if one.default is MISSING or one.default is None else f"`{one.default}`",
            _unmarked(one.metadata["help"]),
        )
        for one in fields
    )
    return table(("key", "default", "meaning"), rows)


def law(name: str) -> str:
    """One law: equation, source, columns, parameters."""
    found = get_law(name)
    rows = ((f"`{q.name}`", q.meaning, q.unit or "a pure number", _range(q.low, q.high)) for q in found.parameters)
    head = f"$$\n{found.latex}\n$$\n\n`{found.name}`: {found.source}. Columns: {', '.join(f'`{c}`' for c in (*found.columns, 'loss'))}."
    return f"{head}\n\n{table(('parameter', 'meaning', 'unit', 'searched in'), rows)}"


def _range(low: float, high: float) -> str:
    return f"{low:g} to {high:g}"


def law_list() -> str:
    # What abbreviates is defined where the law has its own section.
    formulas = ((one, one.latex.split(r", \;")[0]) for one in laws())
    rows = ((f"`{one.name}`", f"${formula}$", ", ".join(f"`{c}`" for c in one.columns)) for one, formula in formulas)
    return table(("law", "formula", "columns besides `loss`"), rows)


def law_columns() -> str:
    return table(("column", "meaning"), ((f"`{name}`", meaning) for name, meaning in COLUMNS.items()))


def methods() -> str:
    rows = (
        (f"`{name}`", one.text, f"{one.strength}, {one.default:g}" if one.strength else "none", "yes" if one.reads_replay else "no")
        for name, one in METHODS.items()
    )
    return table(("method", "what it does", "coefficient and its default", "needs replay rows"), rows)


def sizes() -> str:
    rows = []
    for name, (num_layers, width) in SIZES.items():
        vocab_size, context_length = _usual(name)
        spec = model_spec(name, vocab_size, context_length)
        numbers = (vocab_size, context_length, num_params(spec), num_non_embedding_params(spec))
        rows.append((f"`{name}`", f"{num_layers} x {width}", *(f"{number:,}" for number in numbers)))
    return table(("name", "layers x width", "vocabulary", "context", "parameters N", "of them not embeddings"), rows)


def _usual(size: str) -> tuple[int, int]:
    """Vocabulary and context by which a size is named: those of the paper it comes from, or the built-in tokenizer's."""
    if size.startswith("marek-"):
        return 4_096, 256
    return (32_000, 1_024) if size[0].isalpha() else (2_048, 128)


def law_study(name: str) -> str:
    """What a study of the laws found, from the file that `forget plot --kind laws` wrote; says how much of its recipe was run."""
    path = resources.path("runs") / f"{name}.json"
    num_asked = len(read_recipe(resources.recipe(name)).configs({}))
    if not path.is_file():
        return f"The study, {num_asked} runs, has not been run for this release."
    content = json.loads(path.read_text("utf-8"))
    lines = study_lines(content)
    if content["num_runs"] < num_asked:
        lines[:0] = [f"**{_how_many(content, num_asked)}; these say:**", ""]
    if (ROOT / "docs" / f"{name}.png").is_file():
        lines.append(f"![Forgetting against p by size, measured against the law, B by domain, progress lost]({name}.png)")
    return "\n".join(lines)


def laws_by_domain(name: str) -> str:
    """The table by domain of a study of the laws, and how much of it was run."""
    content = json.loads((resources.path("runs") / f"{name}.json").read_text("utf-8"))
    sizes = content["axes"]["N"]
    return "\n".join(
        [
            *domain_lines(content),
            "",
            f"{_how_many(content, len(read_recipe(resources.recipe(name)).configs({})))}, of {sizes[0] / 1e6:.2g}M to {sizes[-1] / 1e6:.2g}M parameters.",
        ]
    )


def _how_many(content: dict[str, Any], num_asked: int) -> str:
    num_runs = content["num_runs"]
    return f"{num_runs} of the recipe's {num_asked} runs have been made{' so far' if num_runs < num_asked else ''}"


def predicted(name: str) -> str:
    """What became of predictions in `data/runs/NAME/`, in one sentence: the runs are those that we measured of their recipe."""
    content = read_predictions(resources.path("runs") / name / "predictions.json")
    assert content is not None
    return outcome_lines(content, compare(content, read_export(resources.path("runs") / f"{content['recipe']}.parquet")))[-1]


def recipes() -> str:
    """The recipes that come with the tool."""
    folder = resources.path("recipes")
    found = {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*.yaml"))
        if folder / "corpora" not in path.parents
    }
    return table(("recipe", "what"), ((f"`{name}`", _unmarked(read_recipe(path).description)) for name, path in found.items()))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines)


MAKERS: dict[str, Callable[..., str]] = {
    one.__name__: one
    for one in (
        readme,
        commands,
        public_names,
        law,
        law_list,
        law_columns,
        law_study,
        laws_by_domain,
        predicted,
        methods,
        sizes,
        recipes,
    )
}

if __name__ == "__main__":
    # Recipes at smoke scale are of another size.
    os.environ.pop("FORGET_SCALE", None)
    pages = {page: page.read_text("utf-8") for page in PAGES}
    old = {page: made for page, text in pages.items() if (made := with_tables(text)) != text}
    if "--check" in sys.argv:
        sys.exit(", ".join(page.name for page in old) or None)
    for page, made in old.items():
        page.write_text(made, encoding="utf-8")

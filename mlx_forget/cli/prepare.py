"""`forget prepare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_forget.cli import completion

if TYPE_CHECKING:
    from mlx_forget.pipeline.catalog import NamedDocuments
    from mlx_forget.pipeline.tokenise import Progress

app = typer.Typer()

_SOURCES = (
    "Built-in corpora, recipes (forget data recipes), files (.txt .md .jsonl .json .parquet .arrow, .gz and .zst), folders, globs, "
    "Hub ids (OWNER/NAME\\[:CONFIG]\\[@REVISION]), or - for standard input."
)


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help=_SOURCES, autocompletion=completion.sources)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The store to make; must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer.model or tokenizer.json, a folder that has one, hf:OWNER/NAME, or new: train one on this text. "
            "\\[default: built-in]"
        ),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary of a built-in or new tokenizer. \\[default: 2048]")] = None,
    tokenizer_kind: Annotated[str | None, typer.Option(help="A new tokenizer: unigram or bpe. \\[default: unigram]")] = None,
    text_column: Annotated[str | None, typer.Option(help="The column of plain documents. \\[default: text]")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="The column of questions. \\[default: prompt]")] = None,
    completion_column: Annotated[str | None, typer.Option(help="The column of answers. \\[default: completion]")] = None,
    messages_column: Annotated[str | None, typer.Option(help="The column of conversations. \\[default: messages]")] = None,
    system_column: Annotated[str | None, typer.Option(help="A column that stands before the question.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="COLUMN=VALUE that a record must have; a dot enters nested ones.")] = None,
    min_chars: Annotated[int | None, typer.Option(help="Leave out shorter documents.")] = None,
    max_chars: Annotated[int | None, typer.Option(help="Leave out longer documents.")] = None,
    dedup: Annotated[bool | None, typer.Option("--dedup/--no-dedup", help="Leave out exact repetitions. \\[default: no]")] = None,
    without_copies_of: Annotated[
        str | None, typer.Option(help="Leave out near-copies of the validation documents of this source or store.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="The configuration of a dataset repository or Hub id.")] = None,
    split: Annotated[str | None, typer.Option(help="Read this split only, and validate on a share of it.")] = None,
    from_folder: Annotated[Path | None, typer.Option("--from", help="Where the files of a recipe are, instead of the Hub.")] = None,
    on_error: Annotated[str | None, typer.Option(help="What cannot be read: stop, or skip and count. \\[default: stop]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenise; the result is the same. \\[default: every core]")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: prepare the i-th of n parts (1/8 ... 8/8), for forget data merge.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the store's facts as one JSON object.")] = False,
) -> None:
    """Tokenise text into a store.

    The same command goes on after an interruption, from the last whole shard.

    Example: forget prepare notes.txt --output stores/notes
    """
    import tempfile

    from rich.console import Console

    from mlx_forget.cli.answers import propose, works_in
    from mlx_forget.cli.data import print_facts
    from mlx_forget.errors import UserError, unknown
    from mlx_forget.pipeline.catalog import documents_of, held_out_of, write_store
    from mlx_forget.pipeline.conversations import Fields
    from mlx_forget.pipeline.sources import Reading
    from mlx_forget.progress import Preparation

    console = Console(stderr=True)
    progress = Preparation(console)
    if output.exists():
        raise UserError(f"{output} exists already: choose another place or remove it.")
    works_in(output)
    if on_error not in (None, "stop", "skip"):
        raise unknown("--on-error", on_error, ["stop", "skip"])
    for name, value in (("--min-chars", min_chars), ("--max-chars", max_chars)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, it is {value}.")
    if workers is not None and workers < 0:
        raise UserError(f"--workers must not be negative, it is {workers}.")
    plain = Fields()
    reading = Reading(
        fields=Fields(
            text=text_column or plain.text,
            prompt=prompt_column or plain.prompt,
            completion=completion_column or plain.completion,
            messages=messages_column or plain.messages,
            system=system_column,
            where=tuple(_condition(one) for one in where or ()),
        ),
        min_chars=min_chars,
        max_chars=max_chars,
        once=bool(dedup),
        part=_part(shard),
        config=config,
        split=split,
    )
    held_out = held_out_of(without_copies_of, progress=progress) if without_copies_of is not None else None
    named = [
        documents_of(source, reading, folder=from_folder, skip_bad=on_error == "skip", held_out=held_out, progress=progress)
        for source in sources
    ]
    with tempfile.TemporaryDirectory() as scratch:
        file = _tokenizer_file(tokenizer, tokenizer_kind, vocab_size, named, Path(scratch), progress)
        store = write_store(output, named, file, num_workers=workers, progress=progress)
    print_facts(store, as_json=as_json)
    for one in named:
        for example in one.bad.examples:
            console.print(f"Left out: {example}", highlight=False, soft_wrap=True, markup=False)
    if "validation" not in store.splits:
        console.print("No document was held out to validate on, so a run cannot be evaluated on this store: give more text.")
    if not as_json:
        console.print(f"Wrote {output}", highlight=False, soft_wrap=True)
    if "validation" in store.splits and shard is None:
        propose("train", "--target", output)


def _tokenizer_file(
    tokenizer: str | None,
    kind: str | None,
    vocab_size: int | None,
    named: "list[NamedDocuments]",
    scratch: Path,
    progress: "Progress",
) -> Path:
    """The tokenizer that was asked for; a new one is trained into `scratch`."""
    from mlx_forget import checkpoint
    from mlx_forget.config import TrainConfig, scale_defaults
    from mlx_forget.errors import UserError
    from mlx_forget.pipeline.catalog import builtin_tokenizer, new_tokenizer
    from mlx_forget.pipeline.vocabularies import find_tokenizer

    size = vocab_size or TrainConfig(**scale_defaults()).vocab_size
    if tokenizer == "new":
        file = scratch / "tokenizer.model"
        if kind not in (None, "unigram", "bpe"):
            raise UserError(f"--tokenizer-kind must be unigram or bpe, not {kind}.")
        new_tokenizer(named, file, vocab_size=size, kind="bpe" if kind == "bpe" else "unigram", progress=progress)
        return file
    if kind is not None:
        raise UserError("--tokenizer-kind is for a new tokenizer: give --tokenizer new too.")
    if tokenizer is None:
        return builtin_tokenizer(size, progress=progress)
    given = Path(tokenizer).expanduser()
    if given.is_dir() and any((given / name).is_dir() for name in ("checkpoints", "last")):
        return checkpoint.find_checkpoint(given).tokenizer
    return find_tokenizer(tokenizer)


def _condition(text: str) -> tuple[str, str]:
    from mlx_forget.errors import UserError

    column, equals, value = text.partition("=")
    if not equals or not column:
        raise UserError(f"--where must be COLUMN=VALUE, not {text!r}.")
    return column, value


def _part(text: str | None) -> tuple[int, int] | None:
    from mlx_forget.errors import UserError

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not number.isdigit() or not count.isdigit() or not 1 <= int(number) <= int(count):
        raise UserError(f"--shard must be i/n with 1 <= i <= n, such as 3/8, not {text!r}.")
    return int(number) - 1, int(count)

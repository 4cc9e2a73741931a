"""`forget prepare`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="A built-in corpus, a .txt or .jsonl file, or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The store to make; must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.model, a run or checkpoint folder, or new: train one on this text. \\[default: built-in]"),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary of a built-in or new tokenizer. \\[default: 2048]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the store's facts as one JSON object.")] = False,
) -> None:
    """Tokenise text into a store.

    Example: forget prepare notes.txt --output stores/notes
    """
    import tempfile

    from rich.console import Console

    from mlx_forget import checkpoint
    from mlx_forget.cli.data import print_facts
    from mlx_forget.config import TrainConfig, scale_defaults
    from mlx_forget.errors import UserError
    from mlx_forget.pipeline.catalog import builtin_tokenizer, documents_of, write_store
    from mlx_forget.pipeline.tokenizer import train_tokenizer
    from mlx_forget.progress import Preparation

    console = Console(stderr=True)
    progress = Preparation(console)
    if output.exists():
        raise UserError(f"{output} exists already: choose another place or remove it.")
    named = documents_of(source, progress=progress)
    size = vocab_size or TrainConfig(**scale_defaults()).vocab_size
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer == "new":
            file = Path(scratch) / checkpoint.TOKENIZER
            progress(f"training a tokenizer of {size:,} pieces", 0.0)
            train_tokenizer((text for split, text in named.read() if split == "train"), vocab_size=size).save(file)
        elif tokenizer is None:
            file = builtin_tokenizer(size, progress=progress)
        else:
            given = Path(tokenizer).expanduser()
            file = checkpoint.find_checkpoint(given).tokenizer if given.is_dir() else given
        store = write_store(output, named.read(), file, source=named.source, num_bytes=named.num_bytes, progress=progress)
    print_facts(store, as_json=as_json)
    if "validation" not in store.splits:
        console.print("No document was held out to validate on, so a run cannot be evaluated on this store: give more text.")
    if as_json:
        return
    console.print(f"Wrote {output}", highlight=False, soft_wrap=True)

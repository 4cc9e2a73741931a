"""`forget data`: look into a store."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlx_forget.pipeline.store import TokenStore

app = typer.Typer(no_args_is_help=True, help="Look into a store: info, head, sample, verify.")

Store = Annotated[Path, typer.Argument(help="A store made by forget prepare.")]
SplitOption = Annotated[str | None, typer.Option(help="train or validation. \\[default: train]")]
Count = Annotated[int | None, typer.Option("-n", "--num", help="How many documents. \\[default: 3]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def info(store: Store, as_json: AsJson = False) -> None:
    """What is in a store: splits, tokens, documents, fingerprint.

    Example: forget data info stores/notes
    """
    from mlx_forget.pipeline.store import open_store

    print_facts(open_store(store, verify=False), as_json=as_json)


@app.command()
def head(store: Store, split: SplitOption = None, num: Count = None, as_json: AsJson = False) -> None:
    """The first documents, decoded.

    Example: forget data head stores/notes -n 1
    """
    _print_documents(store, split or "train", num, as_json=as_json, seed=None)


@app.command()
def sample(
    store: Store,
    split: SplitOption = None,
    num: Count = None,
    seed: Annotated[int | None, typer.Option(help="Which documents. \\[default: 0]")] = None,
    as_json: AsJson = False,
) -> None:
    """Random documents, decoded.

    Example: forget data sample stores/notes -n 1 --seed 4
    """
    _print_documents(store, split or "train", num, as_json=as_json, seed=seed or 0)


@app.command()
def verify(store: Store, as_json: AsJson = False) -> None:
    """Check every byte of a store against its checksums.

    Example: forget data verify stores/notes
    """
    from mlx_forget.pipeline.store import open_store

    opened = open_store(store, verify=True)
    if as_json:
        print(json.dumps({"store": str(store), "whole": True, "fingerprint": opened.fingerprint}))
    else:
        print(f"{store} is whole: {opened.fingerprint}")


def print_facts(store: "TokenStore", *, as_json: bool) -> None:
    """The facts of a store, for people or as one JSON object."""
    splits: dict[str, dict[str, Any]] = {}
    for name, split in store.splits.items():
        num_bytes = sum(int(split.documents(number)[1].sum()) for number in range(len(split.shards)))
        splits[name] = {
            "num_tokens": split.num_tokens,
            "num_documents": split.num_documents,
            "num_bytes": num_bytes,
        }
    facts = {
        "store": str(store.folder),
        "source": store.source,
        "fingerprint": store.fingerprint,
        "tokenizer_hash": store.tokenizer_hash,
        "vocab_size": store.vocab_size,
        "splits": splits,
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(
        f"source       {store.source}\nfingerprint  {store.fingerprint}\ntokenizer    {store.tokenizer_hash} ({store.vocab_size:,} pieces)"
    )
    for name, row in splits.items():
        per_token = row["num_bytes"] / max(1, row["num_tokens"])
        print(
            f"{name:<12} {row['num_tokens']:,} tokens, {row['num_documents']:,} documents, {row['num_bytes']:,} bytes "
            f"({per_token:.2f} bytes per token)"
        )


def _print_documents(folder: Path, split: str, num: int | None, *, as_json: bool, seed: int | None) -> None:
    import numpy as np

    from mlx_forget.pipeline.catalog import tokenizer_of
    from mlx_forget.pipeline.store import open_store
    from mlx_forget.pipeline.tokenizer import Tokenizer

    store = open_store(folder, verify=False)
    chosen = store.split(split)
    count = min(3 if num is None else num, chosen.num_documents)
    order = np.arange(count) if seed is None else np.random.default_rng(seed).choice(chosen.num_documents, count, replace=False)
    tokenizer = Tokenizer.load(tokenizer_of(folder))
    texts = [tokenizer.decode(chosen.document(int(index))) for index in order]
    if as_json:
        print(
            json.dumps(
                {
                    "split": split,
                    "documents": [{"index": int(i), "text": text} for i, text in zip(order, texts, strict=True)],
                }
            )
        )
        return
    for index, text in zip(order, texts, strict=True):
        print(f"--- document {index:,} of {chosen.num_documents:,} ({split})\n{text}")

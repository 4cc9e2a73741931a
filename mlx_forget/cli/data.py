"""`forget data`: look into a store, merge its parts, list recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli.answers import emit, works_in

if TYPE_CHECKING:
    from mlx_forget.pipeline.store import TokenStore

app = typer.Typer(
    no_args_is_help=True,
    help="Look into a store: info, head, sample, stats, verify; merge its parts; list recipes.\n\nExample: forget data info stores/notes",
)

Store = Annotated[Path, typer.Argument(help="A store made by forget prepare.")]
SplitOption = Annotated[str | None, typer.Option(help="train or validation. \\[default: train]")]
Count = Annotated[int | None, typer.Option("-n", "--num", min=0, help="How many documents. \\[default: 3]")]
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
    seed: Annotated[int | None, typer.Option(min=0, help="Which documents. \\[default: 0]")] = None,
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
        emit({"store": str(store), "whole": True, "fingerprint": opened.fingerprint})
    else:
        print(f"{store} is whole: {opened.fingerprint}")


@app.command()
def stats(
    store: Store,
    against: Annotated[Path | None, typer.Option(help="Also measure what this store's validation documents share with it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Counts of tokens, lengths of documents, use of the vocabulary, and the overlap between splits.

    Example: forget data stats stores/notes
    """
    from mlx_forget.pipeline.overlap import store_overlap, store_statistics
    from mlx_forget.pipeline.store import open_store

    opened = open_store(store, verify=False)
    splits = {name: store_statistics(split, opened.vocab_size) for name, split in opened.splits.items()}
    overlaps: list[tuple[str, dict[str, Any]]] = []
    if {"train", "validation"} <= set(opened.splits):
        overlaps.append(("validation in train", store_overlap(opened.splits["validation"], opened.splits["train"])))
    if against is not None:
        other = open_store(against, verify=False)
        _check_same_tokenizer(opened, other)
        overlaps.append((f"validation of {against} in train", store_overlap(other.split("validation"), opened.split("train"))))
    if as_json:
        emit({"store": str(store), "splits": splits, "overlap": dict(overlaps)})
        return
    for name, row in splits.items():
        print(
            f"{name}: {row['num_tokens']:,} tokens ({row['num_useful_tokens']:,} to learn), {row['num_documents']:,} documents, "
            f"{row['num_pieces_used']:,} of {opened.vocab_size:,} pieces used\n"
            f"  tokens per document: median {row['median_length']:,}, 95% below {row['length_95']:,}, longest {row['max_length']:,}"
        )
        for source, num in row["documents_by_source"].items():
            print(f"  {num:,} documents of {opened.sources[int(source)] if opened.sources else opened.source}")
    for what, row in overlaps:
        print(
            f"{what}: {row['share_of_windows']:.2%} of sampled windows of {row['window']} tokens; "
            f"{row['num_copied_documents']:,} of {row['num_documents']:,} documents share half of theirs or more"
        )


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="The stores of all parts (forget prepare --shard i/n).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The store to make; must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Make one store of all parts of a preparation; nothing is tokenised again.

    Example: forget data merge parts/1 parts/2 --output stores/notes
    """
    from mlx_forget.pipeline.store import merge_stores, open_store

    works_in(output)
    print_facts(merge_stores([open_store(part) for part in parts], output), as_json=as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The public corpora that forget prepare knows by name.

    Example: forget data recipes
    """
    from dataclasses import asdict

    from mlx_forget.pipeline.recipes import load, names

    found = [load(name) for name in names()]
    if as_json:
        emit({"recipes": [asdict(recipe) for recipe in found]})
        return
    for recipe in found:
        size = f", {recipe.num_bytes / 1e9:.2f} GB" if recipe.num_bytes else ""
        print(f"{recipe.name:<20} {recipe.description} ({recipe.role}{size}; {recipe.hub()}; licence: {recipe.licence})")


def _check_same_tokenizer(one: "TokenStore", other: "TokenStore") -> None:
    from mlx_forget.errors import UserError

    if one.tokenizer_hash != other.tokenizer_hash:
        raise UserError(f"{one.folder} and {other.folder} were made with different tokenizers: their tokens cannot be compared.")


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
        if split.has_loss_mask:
            splits[name]["num_useful_tokens"] = sum(int(split.loss_mask(n).sum()) for n in range(len(split.shards)))
    facts = {
        "store": str(store.folder),
        "source": store.source,
        "fingerprint": store.fingerprint,
        "tokenizer_hash": store.tokenizer_hash,
        "vocab_size": store.vocab_size,
        "splits": splits,
        "skipped": dict(store.skipped),
    }
    if as_json:
        emit(facts)
        return
    print(
        f"source       {store.source}\nfingerprint  {store.fingerprint}\ntokenizer    {store.tokenizer_hash} ({store.vocab_size:,} pieces)"
    )
    for name, row in splits.items():
        per_token = row["num_bytes"] / max(1, row["num_tokens"])
        print(
            f"{name:<12} {row['num_tokens']:,} tokens, {row['num_documents']:,} documents, {row['num_bytes']:,} bytes "
            f"({per_token:.2f} bytes per token)"
            + (f", {row['num_useful_tokens']:,} tokens to learn" if "num_useful_tokens" in row else "")
        )
    if store.skipped:
        print(f"left out     {', '.join(f'{num:,} {reason}' for reason, num in store.skipped.items())}")
    if store.part is not None:
        print(f"part         {store.part[0] + 1} of {store.part[1]}: forget data merge makes one store of all")


def _print_documents(folder: Path, split: str, num: int | None, *, as_json: bool, seed: int | None) -> None:
    import numpy as np

    from mlx_forget.pipeline.store import open_store
    from mlx_forget.pipeline.vocabularies import load_vocabulary, marked_text, tokenizer_in

    store = open_store(folder, verify=False)
    chosen = store.split(split)
    count = min(3 if num is None else num, chosen.num_documents)
    order = np.arange(count) if seed is None else np.random.default_rng(seed).choice(chosen.num_documents, count, replace=False)
    tokenizer = load_vocabulary(tokenizer_in(folder))
    texts = [marked_text(tokenizer, chosen.document(int(index))) for index in order]
    if as_json:
        documents = [{"index": int(i), "text": text} for i, text in zip(order, texts, strict=True)]
        emit({"store": str(folder), "split": split, "documents": documents})
        return
    for index, text in zip(order, texts, strict=True):
        print(f"--- document {index:,} of {chosen.num_documents:,} ({split})\n{text}")

"""One store from the parts of one preparation."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_forget.durable_files import sync
from mlx_forget.errors import UserError
from mlx_forget.pipeline.store.manifest import write_manifest
from mlx_forget.pipeline.store.reading import TokenStore, open_store
from mlx_forget.pipeline.store.writing import acquire, refuse_existing
from mlx_forget.pipeline.vocabularies import copy_tokenizer, tokenizer_in


def merge_stores(parts: list[TokenStore], folder: Path) -> TokenStore:
    """One store from all parts of one preparation; their shards are linked where the file system allows it, else copied.

    Raises:
        UserError: the parts are not all of one preparation, or the place is taken.
    """
    numbers = sorted((part.part or (-1, 0, ""))[0] for part in parts)
    wholes = {(part.part or (0, 0, ""))[1:] for part in parts}
    count = next(iter(wholes))[0] if len(wholes) == 1 else 0
    if numbers != list(range(count)) or not count:
        have = ", ".join(
            f"{part.folder} ({part.part[0]}/{part.part[1]})" if part.part else f"{part.folder} (whole)" for part in parts
        )
        raise UserError(f"These are not all parts of one preparation, each once: {have}.")
    first = parts[0]
    if len({(part.tokenizer_hash, part.dtype, part.sources) for part in parts}) > 1:
        raise UserError("The parts were made with different tokenizers or from different sources: prepare them alike.")
    refuse_existing(folder)
    aside = folder.with_name(f".{folder.name}.part")
    lock = acquire(aside, folder)
    try:
        for path in aside.iterdir():
            path.unlink()
        copy_tokenizer(tokenizer_in(first.folder), aside)
        splits: dict[str, list[dict[str, Any]]] = {}
        skipped: dict[str, int] = {}
        masked = False
        for part in sorted(parts, key=lambda part: part.part or (0, 0, "")):
            for reason, num in part.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + num
            for name, split in part.splits.items():
                masked = masked or split.has_loss_mask
                for shard in split.shards:
                    stem = f"{name}-{len(splits.get(name, [])):05d}"
                    names = {"tokens": f"{stem}.arrow", "documents": f"{stem}.documents.arrow"}
                    for kind, target in names.items():
                        _link(part.folder / getattr(shard, kind), aside / target)
                    splits.setdefault(name, []).append(asdict(shard) | names)
        content = {
            "tokenizer_hash": first.tokenizer_hash,
            "vocab_size": first.vocab_size,
            "bos_id": first.bos_id,
            "eos_id": first.eos_id,
            "dtype": first.dtype,
            "source": first.source,
            "splits": splits,
        }
        more = {"sources": list(first.sources), "skipped": skipped}
        version = 2 if first.sources or masked else 1
        write_manifest(aside, content | {name: value for name, value in more.items() if value}, version=version)
        refuse_existing(folder)
        os.rename(aside, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
    return open_store(folder, verify=False)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)

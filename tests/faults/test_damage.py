"""Bits flipped and ends cut off in every file that is kept: a reader says that it is damaged, or reads the very same content."""

import random
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.checkpoint import open_checkpoint
from mlx_forget.errors import UserError
from mlx_forget.history import read_history
from mlx_forget.pipeline.store import open_store
from mlx_forget.records import HISTORY, read_record
from mlx_forget.runs.index import read_index
from tests.faults.scenarios import copy_world


def read_store(folder):
    store = open_store(folder / "stores" / "notes")
    found = [store.fingerprint, store.source, dict(store.skipped), store.bos_id, store.vocab_size]
    for name, split in store.splits.items():
        found += [name, *(tokens.tobytes() for tokens in split.tokens)]
        found += [np.concatenate(split.documents(number)).tobytes() for number in range(len(split.shards))]
    return found


def read_checkpoint(folder):
    found = open_checkpoint(folder / "base" / "checkpoints" / "last")
    return [found.state, found.weights.read_bytes(), found.training_state.read_bytes(), found.model_spec()]


def read_run(folder):
    return [read_record(folder / "base"), read_history(folder / "base" / "history.arrows").to_pylist()]


def read_listed(folder):
    """What `forget runs`, fits and reports read, which is not how a run reads its own record."""
    found = read_index(folder)
    if found.problems:
        raise UserError(str(found.problems))
    return found.rows


# What ends a stream of Arrow: a continuation mark and a length of 0.
_END_MARK_BYTES = 8

READERS = {
    "stores": (read_store, "stores/notes/*"),
    "checkpoints": (read_checkpoint, "base/checkpoints/last/*"),
    "records and histories": (read_run, "base/[hr]*.*"),
    "listed runs": (read_listed, "*/record.json"),
}


def is_noticed(read, folder, wanted, path: Path, content: bytes) -> bool:
    """Whether damage is named; what reads as the very same content has done no harm."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        # NaN is the only value that is not itself, and text of it is.
        assert repr(read(folder)) == repr(wanted), f"{path.name} reads as something else"
    except UserError:
        return True
    finally:
        path.write_bytes(whole)
    return False


def damage(world, tmp_path, tried, kind, num):
    read, pattern = READERS[kind]
    folder = copy_world(world, tmp_path / "w")
    wanted = read(folder)
    chance = random.Random(kind)
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    assert len(files) > 1
    for path in files:
        content = path.read_bytes()
        for _ in range(num):
            flipped = bytearray(content)
            flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            noticed = is_noticed(read, folder, wanted, path, bytes(flipped))
            tried[f"bits flipped in {kind}, {'named' if noticed else 'read as the same content'}; undetected: none"] += 1
        for _ in range(max(1, num // 8)):
            size = chance.randrange(len(content))
            noticed = is_noticed(read, folder, wanted, path, content[:size])
            # A history without the mark of its end, or with a part of it, is one that is still written: no row is lost with it.
            assert noticed or (path.name == HISTORY and size >= len(content) - _END_MARK_BYTES), f"{path.name} was cut off"
            tried[f"files of {kind} cut off, {'named' if noticed else 'read as the same content'}; undetected: none"] += 1


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_named(world, tmp_path, tried, kind):
    damage(world, tmp_path, tried, kind, 25)


@pytest.mark.full
@pytest.mark.parametrize("kind", READERS)
def test_much_damage_is_named(world, tmp_path, tried, kind):
    damage(world, tmp_path, tried, kind, 2000)

"""What is in a store, and what one split has seen of another."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.pipeline.store import Split

# Runs of 13 tokens are what GPT-3's authors compared (Brown et al. 2020, appendix C).
WINDOW = 13
# One window in this many is looked up: chosen by its hash, so that both sides choose the same.
_SAMPLE = np.uint64(8)
_BLOCK = 1 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Words = npt.NDArray[np.uint64]


def store_statistics(split: Split, vocab_size: int) -> dict[str, Any]:
    """Counts and lengths of a split: tokens, tokens to learn, documents by source, pieces of the vocabulary that occur."""
    lengths, by_source = [], np.zeros(1 << 16, np.int64)
    used = np.zeros(vocab_size, np.int64)
    useful = 0
    for number, shard in enumerate(split.shards):
        start, _ = split.documents(number)
        lengths.append(np.diff(start, append=shard.num_tokens))
        by_source += np.bincount(split.sources(number), minlength=1 << 16)
        for begin in range(0, shard.num_tokens, _BLOCK):
            used += np.bincount(split.tokens[number][begin : begin + _BLOCK], minlength=vocab_size)
        useful += int(split.loss_mask(number).sum(dtype=np.int64)) if split.has_loss_mask else shard.num_tokens
    length = np.concatenate(lengths)
    return {
        "num_tokens": split.num_tokens,
        "num_useful_tokens": useful,
        "num_documents": split.num_documents,
        "num_pieces_used": int((used > 0).sum()),
        "median_length": int(np.median(length)),
        "length_95": int(np.quantile(length, 0.95)),
        "max_length": int(length.max()),
        "documents_by_source": {str(source): int(by_source[source]) for source in np.flatnonzero(by_source)},
    }


def store_overlap(held_out: Split, seen: Split) -> dict[str, Any]:
    """How much of some documents another split holds, by runs of 13 tokens.

    Returns:
        `share_of_windows` of the sampled windows of `held_out` that occur in `seen`, and `num_copied_documents` of its
        `num_documents`, half of whose windows or more do.
    """
    marks, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    first = 0
    for number, shard in enumerate(held_out.shards):
        start, _ = held_out.documents(number)
        hashes = _windows(held_out.tokens[number])
        document = np.searchsorted(start, np.arange(len(hashes)), "right") - 1
        end = np.append(start[1:], shard.num_tokens)[document]
        # Only windows that lie within one document.
        kept = (hashes % _SAMPLE == 0) & (np.arange(len(hashes)) + WINDOW <= end)
        marks.append(hashes[kept])
        owners.append(document[kept] + first)
        first += shard.num_documents
    wanted, owner = np.concatenate(marks), np.concatenate(owners)
    unique, place = np.unique(wanted, return_inverse=True)
    found = np.zeros(len(unique), bool)
    for tokens in seen.tokens:
        for begin in range(0, len(tokens), _BLOCK):
            hashes = _windows(tokens[begin : begin + _BLOCK + WINDOW - 1])
            sampled = hashes[hashes % _SAMPLE == 0]
            where = np.searchsorted(unique, sampled)
            inside = where < len(unique)
            hit = where[inside][unique[where[inside]] == sampled[inside]]
            found[hit] = True
    hits = found[place] if len(unique) else np.zeros(0, bool)
    total = np.bincount(owner, minlength=first)
    shared = np.bincount(owner, weights=hits, minlength=first)
    return {
        "window": WINDOW,
        "num_windows": len(wanted),
        "share_of_windows": float(hits.mean()) if len(hits) else 0.0,
        "num_documents": first,
        "num_copied_documents": int(((total > 0) & (shared >= 0.5 * total)).sum()),
    }


def _windows(tokens: npt.NDArray[Any]) -> Words:
    """A hash of each run of 13 tokens, uint64[n - 12]."""
    size = max(0, len(tokens) - WINDOW + 1)
    hashes = np.zeros(size, np.uint64)
    for i in range(WINDOW):
        hashes ^= hashes >> np.uint64(29)
        hashes = hashes * _MULTIPLIER + tokens[i : i + size].astype(np.uint64)
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MULTIPLIER
    return hashes ^ (hashes >> np.uint64(29))

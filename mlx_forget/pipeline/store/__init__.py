"""The token store: a folder of memory-mapped Arrow files that says what is in it and proves it.

    STORE/manifest.json            schema version, tokenizer, splits, shards, checksums, fingerprint; written last
    STORE/tokenizer.model          the tokenizer that made it (or tokenizer.json)
    STORE/train-00000.arrow        one record batch: `token`, and `loss_mask` where not every token is to be learnt; documents end with EOS
    STORE/train-00000.documents.arrow   one row a document: `start` (token offset in the shard), `num_bytes` (UTF-8), and `source` where
                                        there are several

A shard is one record batch, so a split's tokens are flat memory-mapped arrays and a row of any length is a slice. A row is cut when
it is read: the BOS id, then `row_length` consecutive tokens; rows never cross shards. The fingerprint covers content only: the same
tokens have the same fingerprint wherever and by however many workers they were written.

A store is written beside its place (`.STORE.part`) and renamed when it is whole. With a key, what was written of it survives a kill: the
next writer with that key goes on after the last whole shard.
"""

from mlx_forget.pipeline.store.manifest import MANIFEST, SCHEMA_VERSION
from mlx_forget.pipeline.store.merging import merge_stores
from mlx_forget.pipeline.store.reading import TokenStore, open_store
from mlx_forget.pipeline.store.split import Shard, Split
from mlx_forget.pipeline.store.writing import TOKENS_PER_SHARD, StoreWriter

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "TOKENS_PER_SHARD",
    "Shard",
    "Split",
    "StoreWriter",
    "TokenStore",
    "merge_stores",
    "open_store",
]

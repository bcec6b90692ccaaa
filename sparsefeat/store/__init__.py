"""A store of rows on disk: written in shards, killed and resumed without loss, read as a stream or by row."""

from __future__ import annotations

from sparsefeat.store.shards import MANIFEST, Field, Shard, ShardReader, ShardWriter, check_metadata, last_marks

__all__ = ["MANIFEST", "Field", "Shard", "ShardReader", "ShardWriter", "check_metadata", "last_marks"]

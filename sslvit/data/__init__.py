"""Data loading: from tar shards to batches."""

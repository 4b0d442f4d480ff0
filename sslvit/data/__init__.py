"""Tar shard -> batch."""

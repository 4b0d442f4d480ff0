"""A server of shards and a cache for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_fixtures import Server
from shard_fixtures import numbered_shards

from sslvit.data.remote import ShardCache


@pytest.fixture
def server(tmp_path: Path):
    numbered_shards(tmp_path / "served" / "a", 40, shard_mb=0.02)
    server = Server(tmp_path / "served")
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", tries=4, first_wait_seconds=0.01, timeout_seconds=0.5)

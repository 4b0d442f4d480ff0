"""One run on two hosts: what a network does to it, and what is left to go on from."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
from run_fixtures import command, metrics, read_keys, run_ranks, same, weights

from sslvit.train.folder import RunFolder

TOOL = Path(__file__).parents[2] / "tools" / "two_hosts" / "two_hosts.py"
SECONDS = 30  # train.timeout_seconds, which the start of the other host counts for as well
OPTIONS = {"train.steps": 40, "train.checkpoint_every": 5, "train.timeout_seconds": SECONDS, "data.ledger": True}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("two_hosts", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.why_not():
        pytest.skip(reason)
    return module


def words(shards: Path, out: Path, *flags: str) -> list[str]:
    return command(shards, out, *flags, **OPTIONS)[3:]


@pytest.mark.slow
def test_a_host_that_dies_costs_nothing_but_time(shards: Path, tmp_path: Path, tool) -> None:
    """Each host reads its own rows; after a kill both go on, to the same weights and metrics."""
    whole = run_ranks(shards, tmp_path / "whole", **OPTIONS, **{"train.devices": 2})
    cut = RunFolder(tmp_path / "cut")
    with tool.TwoHosts() as hosts:
        first = hosts.start(words(shards, cut.path), tmp_path / "first")
        tool.wait_for_step(cut.path, 18, first)
        hosts.kill(1)
        killed = time.monotonic()
        assert first[0].wait() == 75
        assert time.monotonic() - killed < SECONDS
        said = (tmp_path / "first" / "host-0.txt").read_text()
        assert "another rank has ended, or did not answer" in said
        assert "go on from its last checkpoint: sslvit resume " in said
        second = hosts.start(words(shards, cut.path, "--resume"), tmp_path / "second")
        assert [process.wait() for process in second] == [0, 0], (tmp_path / "second" / "host-0.txt").read_text()
    assert same(whole, cut)
    assert read_keys(whole) == read_keys(cut)
    rows = [set(line_keys(cut, rank)) for rank in (0, 1)]
    assert not rows[0] & rows[1]  # each rank has read its own
    assert all(len(keys) == len(set(keys)) for keys in read_keys(cut).values())


def line_keys(folder: RunFolder, rank: int) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in folder.samples_read(rank).read_text().splitlines()]
    return [(line["epoch"], line["key"]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cut", "slow"])
def test_a_network_that_fails_ends_both_hosts_in_time(shards: Path, tmp_path: Path, tool, what: str) -> None:
    out = tmp_path / "run"
    with tool.TwoHosts() as hosts:
        processes = hosts.start(words(shards, out), tmp_path / "said")
        tool.wait_for_step(out, 8, processes)
        hosts.cut() if what == "cut" else hosts.slow("1kbit")
        start = time.monotonic()
        assert [process.wait(timeout=200) for process in processes] == [75, 75]
        # on a slow link a short exchange may end just in time, and the next one waits anew
        assert time.monotonic() - start < (2 if what == "cut" else 4) * SECONDS
    for host in (0, 1):
        said = (tmp_path / "said" / f"host-{host}.txt").read_text()
        assert f"did not answer for {SECONDS} s (train.timeout_seconds)" in said
        assert "Traceback" not in said
    assert weights(RunFolder(out))  # the checkpoint is whole


@pytest.mark.slow
def test_a_slow_link_alone_changes_nothing(shards: Path, tmp_path: Path, tool) -> None:
    options = {**OPTIONS, "train.steps": 12}
    whole = run_ranks(shards, tmp_path / "whole", **options, **{"train.devices": 2})
    out = tmp_path / "run"
    with tool.TwoHosts() as hosts:
        hosts.slow("400kbit")
        processes = hosts.start(command(shards, out, **options)[3:], tmp_path / "said")
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert metrics(RunFolder(out)) == metrics(whole)

"""A checkpoint is whole or absent, whatever happens to the disk or to the writer."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from run_fixtures import metrics, run, same, weights

from sslvit import sharded_checkpoint
from sslvit.settings import TrainSettings
from sslvit.sharded_checkpoint import check_checkpoint, read_checkpoint, write_checkpoint
from sslvit.stopping import RankLost
from sslvit.train import checkpoint_io
from sslvit.train.checkpoint_io import AtomicCheckpointIO, prune_checkpoints


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture
def full_disk() -> object:
    """Files of this process end at some bytes, with the error that a full disk gives."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path: Path, full_disk) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint({"global_step": 3, "x": torch.zeros(10)}, last)
    full_disk(200_000)
    with pytest.raises(
        RuntimeError, match="checkpoint of step 6 could not be written.*before it is whole.*sslvit resume RUN"
    ):
        write_checkpoint({"global_step": 6, "x": torch.zeros(1_000_000)}, last)
    assert step_of(last) == 3
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(RuntimeError, match="There is none before it"):
        write_checkpoint({"global_step": 6, "x": torch.zeros(1_000_000)}, tmp_path / "other.ckpt")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_on_a_full_disk_ends_and_goes_on_when_there_is_room(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    changes = {"train.checkpoint_in_background": in_background}
    whole = run(shards, tmp_path / "whole", **changes)
    save = torch.save

    def full(checkpoint, file):
        if checkpoint["global_step"] == 6:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RuntimeError, match="of step 6 could not be written .No space left on device"):
            run(shards, tmp_path / "cut", **changes)
    assert step_of(tmp_path / "cut" / "checkpoints" / "last.ckpt") == 3
    assert same(run(shards, tmp_path / "cut", resume=True, **changes), whole)


@pytest.mark.slow
def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, then name, then the folder that holds the name: a power cut between any two leaves a whole file."""
    done = []
    sync, replace = os.fsync, os.replace

    def synced(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        done.append(("sync", Path(name).name, os.fstat(handle).st_size))
        sync(handle)

    def replaced(part, path):
        done.append(("rename", Path(part).name, Path(path).name))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint({"global_step": 3, "weights": torch.zeros(99)}, path)
    size = path.stat().st_size
    assert [entry[:2] for entry in done] == [("sync", "last.part"), ("rename", "last.part"), ("sync", "checkpoints")]
    assert done[0][2] == size  # all of it, its checksum included


def test_a_writer_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    code = """
        import sys, torch
        from pathlib import Path
        from sslvit.sharded_checkpoint import write_checkpoint
        for step in range(1, 10_000):
            write_checkpoint({"global_step": step, "x": torch.full((2_000_000,), float(step))}, Path(sys.argv[1]))
            print(step, flush=True)
    """
    last = tmp_path / "last.ckpt"
    seen = set()
    for delay in (0.0, 0.003, 0.007, 0.011):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(last)], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        written = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        process.wait()
        state = torch.load(last, weights_only=True)
        assert state["global_step"] >= written
        assert (state["x"] == state["global_step"]).all()
        seen.add(last.with_suffix(".part").exists())
    assert True in seen  # at least one was killed in the middle of a file


def test_a_background_writer_gives_the_same_checkpoints(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """Steps that are taken while it writes do not show in what it writes."""
    write, at = checkpoint_io.write_checkpoint, []

    def slowly(checkpoint, path):
        time.sleep(0.3)
        at.append(checkpoint["global_step"])
        write(checkpoint, path)

    kept = {"train.keep_last": 9}
    plain = run(shards, tmp_path / "plain", **kept)
    monkeypatch.setattr(checkpoint_io, "write_checkpoint", slowly)
    behind = run(shards, tmp_path / "behind", **kept, **{"train.checkpoint_in_background": True})
    assert at == [3, 6, 7]
    assert same(behind, plain)
    for name in ("step-00000003.ckpt", "step-00000006.ckpt"):
        one, other = (torch.load(folder.checkpoint.with_name(name), weights_only=True) for folder in (plain, behind))
        assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
        assert str(one["optimizer_states"]) == str(other["optimizer_states"])


def test_some_checkpoints_are_kept_by_their_step(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    (tmp_path / "step-best.ckpt").write_text("mine")
    for keep_last, keep_every, names in (
        (1, None, []),
        (3, None, [80, 90, 100]),
        (1, 40, [40, 80]),
        (2, 40, [40, 80, 90, 100]),
    ):
        for step in range(10, 101, 10):
            write_checkpoint({"global_step": step}, last)
            prune_checkpoints(last, step, keep_last, keep_every)
        assert sorted(path.name for path in tmp_path.glob("step-0*")) == [f"step-{step:08d}.ckpt" for step in names]
        assert all(step_of(tmp_path / f"step-{step:08d}.ckpt") == step for step in names)
        assert (tmp_path / "step-best.ckpt").read_text() == "mine"
        for path in tmp_path.glob("step-0*"):
            path.unlink()


def test_checkpoints_of_steps_that_a_run_went_back_behind_are_not_among_the_newest(tmp_path: Path) -> None:
    """A run resumes before a damaged one, which would be kept in the place of a whole one."""
    last = tmp_path / "last.ckpt"
    for step in (100, 200, 110, 120):
        write_checkpoint({"global_step": step}, last)
        prune_checkpoints(last, step, 2, 200)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000110.ckpt", "step-00000120.ckpt", "step-00000200.ckpt"]  # the last is kept for good


def test_kept_checkpoints_need_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    write_checkpoint({"global_step": 5}, tmp_path / "last.ckpt")
    prune_checkpoints(tmp_path / "last.ckpt", 5, 2, None)
    assert step_of(tmp_path / "step-00000005.ckpt") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-00000005.ckpt"]


def test_a_kept_checkpoint_is_an_encoder_and_a_place_to_go_on_from(shards: Path, tmp_path: Path) -> None:
    from sslvit.checkpoint import load_encoder

    folder = run(shards, tmp_path / "run", **{"train.keep_every": 3})
    names = sorted(path.name for path in folder.checkpoint.parent.iterdir())
    assert names == ["last.ckpt", "step-00000003.ckpt", "step-00000006.ckpt"]
    whole, lines = weights(folder), metrics(folder)
    assert load_encoder(folder.checkpoint.with_name(names[1])).settings.width == 16
    os.replace(folder.checkpoint.with_name(names[1]), folder.checkpoint)
    again = run(shards, tmp_path / "run", resume=True, **{"train.keep_every": 3})
    assert all(torch.equal(value, whole[key]) for key, value in weights(again).items())
    assert metrics(again) == lines


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="train.keep_every: 1500 must be a multiple of train.checkpoint_every .1000"):
        TrainSettings(keep_every=1500)
    with pytest.raises(ValueError, match="train.keep_last: 0 must be positive"):
        TrainSettings(keep_last=0)
    assert AtomicCheckpointIO(TrainSettings()).writer is None


def write_shards(path: Path, ranks: int, name: str, value: torch.Tensor, step: int = 3, **settings) -> None:
    """A checkpoint of several ranks, each holding some rows."""
    manifest = {
        "global_step": step,
        "state_dict": {"w": {"shard": "/w", "shape": list(value.shape)}, "b": torch.ones(2)},
    }
    for rank in reversed(range(ranks)):  # the first one waits for all others
        rows = {"/w": value.chunk(ranks)[rank].clone()}  # without it, all would be written
        AtomicCheckpointIO(TrainSettings(**settings)).save_shard(manifest, rows, path, name, rank, ranks)


def test_a_sharded_checkpoint_is_read_complete(tmp_path: Path) -> None:
    last, value = tmp_path / "last.ckpt", torch.arange(14.0).view(7, 2)
    write_shards(last, 3, "00000003-a", value)
    state = read_checkpoint(last)
    assert torch.equal(state["state_dict"]["w"], value)
    assert state["state_dict"]["b"].tolist() == [1, 1]
    assert state["global_step"] == 3
    assert "shards" not in state


def test_shards_live_as_long_as_a_checkpoint_names_them(tmp_path: Path) -> None:
    last, value = tmp_path / "last.ckpt", torch.arange(4.0)
    (tmp_path / "shards" / "00000009-half-written").mkdir(parents=True)
    for step in (3, 6, 9):
        write_shards(last, 2, f"{step:08d}-x", value + step, step, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000006-x", "00000009-x"]
    assert read_checkpoint(tmp_path / "step-00000006.ckpt")["state_dict"]["w"].tolist() == [6, 7, 8, 9]
    write = AtomicCheckpointIO(TrainSettings())
    write.save_checkpoint({"global_step": 12}, last)  # by ranks that each hold everything
    assert not list((tmp_path / "shards").iterdir())


def test_a_shard_that_does_not_come_ends_the_wait_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    write_checkpoint({"global_step": 3}, last)
    with pytest.raises(RankLost, match="rank-00001.pt: another rank .* its shard .* in 0.05 s .*all machines"):
        AtomicCheckpointIO(TrainSettings(timeout_seconds=0.05)).save_shard({"global_step": 6}, {}, last, "6", 0, 2)
    assert step_of(last) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"folder": "../../elsewhere"}, ValueError, "last.ckpt: its shards are in ../../elsewhere, which is outside"),
        ({"folder": ".."}, ValueError, "its shards are in .., which is outside"),
        ({"ranks": 3}, FileNotFoundError, "rank-00002.pt: a shard of .* is missing. Copy the folder shards/"),
        ({"ranks": -1}, ValueError, "states -1 shards"),
        ({"ranks": 1}, ValueError, "its shards do not fit together .* Are they of one checkpoint"),
    ],
)
def test_shards_that_are_missing_or_elsewhere_are_refused(
    tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    last = tmp_path / "last.ckpt"
    write_shards(last, 2, "00000003-a", torch.arange(4.0))
    manifest = torch.load(last, weights_only=True)
    torch.save(manifest | {"shards": manifest["shards"] | change}, last)
    with pytest.raises(error, match=message):
        read_checkpoint(last)


def test_a_shard_that_would_run_code_is_refused(tmp_path: Path) -> None:
    last, shard = tmp_path / "last.ckpt", tmp_path / "shards" / "3" / "rank-00001.pt"
    write_shards(last, 2, "3", torch.arange(4.0))
    torch.save({"tensors": {"/w": Path("code")}}, shard)
    with pytest.raises(ValueError, match="rank-00001.pt: refused, because it holds objects besides tensors"):
        read_checkpoint(last)


def test_the_first_rank_says_why_another_could_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = tmp_path / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RuntimeError, match="No space left"):
            AtomicCheckpointIO(TrainSettings()).save_shard({"global_step": 6}, {}, last, "6", 1, 2)
    with pytest.raises(
        RuntimeError, match="rank-00001.pt: the checkpoint of step 6 could not be written .No space left"
    ):
        AtomicCheckpointIO(TrainSettings()).save_shard({"global_step": 6}, {}, last, "6", 0, 2)
    assert not last.exists()


def test_an_error_of_the_run_is_not_hidden_by_its_writer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write = AtomicCheckpointIO(TrainSettings(checkpoint_in_background=True))
    write.save_shard({"global_step": 6}, {}, tmp_path / "last.ckpt", "6", 0, 2)  # waits for the other one
    write.aborted.set()
    try:
        raise ValueError("the run's own")
    except ValueError:
        write.teardown()
    assert "not written, as the run ended" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_keeps_the_shards_that_it_may_refer_to(tmp_path: Path, caplog) -> None:
    """Those that were there when it was written; later ones live as long as a checkpoint names them."""
    last, io = tmp_path / "last.ckpt", AtomicCheckpointIO(TrainSettings())

    def save(step: int) -> None:
        time.sleep(0.02)  # a tick of the file system's clock
        manifest = {"global_step": step, "state_dict": {"w": {"shard": "/w", "shape": [4]}}}
        io.save_shard(manifest, {"/w": torch.arange(4.0)}, last, f"{step:08d}-a", 0, 1)
        time.sleep(0.02)

    logging.getLogger("sslvit").addHandler(caplog.handler)
    try:
        save(3)
        (tmp_path / "half-copied.ckpt").write_bytes(b"PK")
        os.utime(tmp_path / "half-copied.ckpt", (0, 0))  # as its original
        (tmp_path / "another-program.ckpt").mkdir()
        for step in (6, 9, 12):
            save(step)
    finally:
        logging.getLogger("sslvit").removeHandler(caplog.handler)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000003-a", "00000012-a"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}/half-copied.ckpt: not a readable checkpoint. Shards that it may refer to are ")
    (tmp_path / "half-copied.ckpt").unlink()
    save(15)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000015-a"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_going_on_reads_a_checkpoint_once_and_into_no_memory(tmp_path: Path, ranks: int) -> None:
    """All bytes for the checksum, shapes from the head, and values when they are used."""
    last, size = tmp_path / "last.ckpt", 2**26
    weights = torch.rand(size // 4)
    if ranks == 1:
        write_checkpoint({"global_step": 3, "state_dict": {"w": weights}}, last)
    else:
        write_shards(last, ranks, "00000003-a", weights, 3)
    for path in (last, *(tmp_path / "shards").rglob("*.pt")):
        os.utime(path, (0, 0))  # written long ago
    small = tmp_path / "small.ckpt"  # what a first reading imports and keeps
    write_checkpoint({"global_step": 3, "state_dict": {"w": weights[:9]}}, small)
    check_checkpoint(small)
    read_checkpoint(small, mmap=True)
    read, memory = usage()
    check_checkpoint(last)
    head = read_checkpoint(last, mmap=True, map_location="meta")
    assert head["state_dict"]["w"].shape == weights.shape
    assert usage()[1] - memory < size / 8
    content = read_checkpoint(last, mmap=True)
    joined = size if ranks > 1 else 0
    assert usage()[1] - memory < joined + size / 8
    assert size < usage()[0] - read < 1.1 * size
    assert torch.equal(content["state_dict"]["w"], weights)


def usage() -> tuple[int, int]:
    """Bytes that this process has read so far, and bytes of memory that no file stands behind."""
    read = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    memory = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert read
    assert memory
    return int(read[1]), int(memory[1]) * 1024


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, read = tmp_path / "last.ckpt", sharded_checkpoint.read_torch_file
    write_shards(last, 2, "00000003-a", torch.arange(4.0), 3)

    def replaced(path: Path, *options) -> dict:
        content = read(path, *options)
        if path == last and content["global_step"] == 3:
            write_shards(last, 2, "00000006-a", torch.arange(4.0) + 1, 6)
        return content

    monkeypatch.setattr(sharded_checkpoint, "read_torch_file", replaced)
    assert read_checkpoint(last)["state_dict"]["w"].tolist() == [1, 2, 3, 4]

"""A rank that is lost is noticed in an exchange between CPUs, before anything waits for a device that waits for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_fixtures import on_fake_cuda, take_fake_cuda
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import DDPStrategy
from run_fixtures import command, run
from torch import distributed
from torch.overrides import TorchFunctionMode

from sslvit.data.module import ShardDataModule
from sslvit.settings.load import load_recipe
from sslvit.stopping import RankLost
from sslvit.tasks.base import Task
from sslvit.train.callbacks.peers import Peers
from sslvit.train.checkpoint_io import AtomicCheckpointIO
from sslvit.train.folder import RunFolder
from sslvit.train.strategies import is_peer_failure, make_strategy
from sslvit.train.timing import Clock, WaitForData
from sslvit.train.trainer import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*no accelerator is found.*")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")
WAITS = (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__,
         torch.Tensor.__float__, torch.Tensor.__int__)  # fmt: skip


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


class Event:
    """torch.cuda.Event, of a device that never is behind."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.seconds - self.seconds)


class Waits(TorchFunctionMode):
    """Notes what waits for the device; .to(a CPU) passes for a wait, too."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in WAITS and args[0].device.type == "cuda":
            self.calls.append("wait")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits"])
def test_the_exchange_is_the_first_thing_after_a_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_of_one: None, recipe: str
) -> None:
    """Before any other collective, and before any callback waits for the device, in steps of every kind."""
    calls: list[str] = []
    take_fake_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Peers, "wait_for", lambda self, event: calls.append(waits_for(event is self.queued)))

    def noted(name: str):
        call = getattr(distributed, name)

        def note(*args, **options):
            on_gloo = options.get("group") is not None and args[0].device.type == "cpu"
            calls.append("exchange" if on_gloo else name)
            return call(*args, **options)

        return note

    for name in COLLECTIVES:
        monkeypatch.setattr(distributed, name, noted(name))
    step = Task.optimizer_step

    def optimizer_step(self, *args, **options) -> None:
        step(self, *args, **options)
        calls.append("step")

    monkeypatch.setattr(Task, "optimizer_step", optimizer_step)
    monkeypatch.setattr(WaitForData, "on_train_batch_end", lambda *_: calls.append("end"))
    with on_fake_cuda(), Waits(calls):
        run(shards, tmp_path / "run", recipe=recipe, **{"train.log_every": 2, "online.train": str(shards),
                                                        "online.val": str(shards)})  # fmt: skip
    ends = iter(number for number, call in enumerate(calls) if call == "end")
    steps = [calls[number + 1 : next(ends)] for number, call in enumerate(calls) if call == "step"]
    assert [step[0] for step in steps] == ["exchange"] * 7
    lines, checkpoints = {2, 4, 6, 7}, {3, 6, 7}
    assert [step[1] for step in steps] == [waits_for(number in lines | checkpoints) for number in range(1, 8)]
    assert lines <= {number for number, step in enumerate(steps, 1) if "wait" in step}
    assert {"all_gather", "all_gather_object"} <= set(calls)


def waits_for(is_this: bool) -> str:
    return "waits for this step" if is_this else "waits for the one before"


class Trainer:
    """What the callback asks a Trainer for."""

    class strategy:
        root_device = torch.device("cuda:0")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps a device has done; its events are the numbers of the steps that they are behind."""
    done, queued = [0], [0]

    class Numbered:
        def record(self) -> None:
            queued[0] += 1
            self.step = queued[0]

        def query(self) -> bool:
            return done[0] >= self.step

    monkeypatch.setattr(torch.cuda, "Event", Numbered)
    return done


def at_step(peers: Peers, step: int) -> None:
    peers.step = step
    peers.on_step(Trainer(), None)


def test_the_exchange_goes_on_while_a_device_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: list[int]
) -> None:
    """Until the step before is done, or the step itself where a line, a checkpoint or the run's end waits for it."""
    peers = Peers(RunFolder(tmp_path), (3, 4), 11, timeout_seconds=60)
    peers.group = "gloo"
    exchanges: list[bool] = []

    def all_reduce(flags: torch.Tensor, *_, group: str) -> None:
        exchanges.append(bool(flags))
        if len(exchanges) % 4 == 0:
            device[0] += 1  # the device comes on meanwhile

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    done = {}
    for step in range(1, 12):
        at_step(peers, step)
        done[step] = device[0]
    assert [step for step in done if done[step] == step] == [3, 4, 6, 8, 9, 11]
    assert [step for step in done if done[step] == step - 1] == [1, 2, 5, 7, 10]
    peers.received = "SIGTERM"  # a checkpoint follows
    at_step(peers, 13)
    assert peers.is_stopping
    assert device[0] == 12


def test_a_device_that_never_comes_on_is_a_lost_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: list[int]
) -> None:
    """As where the network of the devices fails, and that of the CPUs stands."""
    peers = Peers(RunFolder(tmp_path), (1,), 9, timeout_seconds=0.05)
    peers.group = "gloo"
    monkeypatch.setattr(distributed, "all_reduce", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="timed out") as caught:
        at_step(peers, 1)
    assert is_peer_failure(caught.value, 2)


def test_the_group_of_ranks_ends_with_training_however_it_ends(tmp_path: Path, monkeypatch) -> None:
    ended = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)
    for ends in (
        lambda peers: peers.on_train_end(None, None),
        lambda peers: peers.on_exception(None, None, ValueError()),
    ):
        peers = Peers(RunFolder(tmp_path), (3,), 9, 1.0)
        ends(peers)  # one rank has none
        peers.group = "group"
        ends(peers)
        ends(peers)
    assert ended == ["group", "group"]


DIES = """
import os, signal, sys
from sslvit.cli import main
from sslvit.train.callbacks.peers import Peers

highest = Peers.highest

def dies(self, number):
    if self.step == 5 and os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return highest(self, number)
    except RuntimeError:
        print("noticed in the exchange of step", self.step, file=sys.stderr)
        raise

Peers.highest = dies
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_others_in_one_line(shards: Path, tmp_path: Path, strategy: str) -> None:
    """Each started on its own, as srun and torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"train.steps": 100, "train.checkpoint_every": 3, "train.devices": 2, "train.strategy": strategy}
    words = [sys.executable, "-c", DIES, *command(shards, tmp_path / "run", **options)[3:]]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(words, env=env | {"LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    _, said = ranks[0].communicate(timeout=200)
    assert ranks[1].wait(timeout=10) == -signal.SIGKILL
    assert ranks[0].returncode == 75, said
    assert "noticed in the exchange of step 5" in said
    assert "stopped at step 5 of 100: another rank has ended, or did not answer" in said
    assert "go on from its last checkpoint: sslvit resume " in said


class Group:
    """A process group of NCCL, as far as strategies ask for it."""

    def __init__(self) -> None:
        self.timeout: timedelta | None = None
        self.aborted = 0

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout = timeout

    def abort(self) -> None:
        self.aborted += 1


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_nccl_waits_longer_than_the_exchange_and_is_aborted_when_a_rank_is_lost(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = load_recipe("mae/digits", {"train.devices": 2, "train.strategy": name, "train.timeout_seconds": 7}).train
    strategy = make_strategy(settings, Clock())
    strategy.checkpoint_io = AtomicCheckpointIO(settings)
    group, backend = Group(), "gloo"
    monkeypatch.setattr(DDPStrategy, "setup_distributed", lambda self: None)
    monkeypatch.setattr(DDPStrategy, "world_size", 2)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(type(distributed.group), "WORLD", group)
    lost = [RuntimeError("gloo/transport/tcp/pair.cc:545] Connection closed by peer"), RankLost("rank-00001.pt")]
    strategy.setup_distributed()
    for error in lost:
        strategy.on_exception(error)
    assert (group.timeout, group.aborted) == (None, 0)
    backend = "nccl"
    strategy.setup_distributed()
    assert group.timeout is not None
    assert group.timeout.total_seconds() > 7
    strategy.on_exception(RuntimeError("an error of this rank alone"))  # whose peers may still be waited for
    assert group.aborted == 0
    for error in lost:
        strategy.on_exception(error)
    assert group.aborted == 2


def test_the_host_does_not_wait_for_the_device_before_a_micro_batch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Lightning would exchange a flag between GPUs, and read it."""
    exchanged: list[Any] = []
    monkeypatch.setattr(distributed, "broadcast", lambda *given, **_: exchanged.append(given))
    settings = load_recipe("mae/digits", {"data.shards": str(shards), "data.global_batch_size": 8, "data.workers": 0})
    trainer = make_trainer(settings, RunFolder(tmp_path / "run"), ShardDataModule.from_settings(settings))
    assert "self._broadcast_sigterm_tensor()" in getsource(_TrainingEpochLoop.advance)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert not exchanged


def test_torch_has_what_a_strategy_calls() -> None:
    assert callable(distributed.ProcessGroup.abort)
    assert callable(distributed.ProcessGroup.set_timeout)

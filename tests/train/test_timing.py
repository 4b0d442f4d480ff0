"""The parts of a step's time, and the share of the device's peak, are those of what was done."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_fixtures import RECIPES, metrics, run

from sslvit.data.module import ShardDataModule
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings, EncoderSettings, RunSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train import forecast
from sslvit.train.callbacks.base import mean_over_ranks
from sslvit.train.callbacks.run_log import RunLog, work_of
from sslvit.train.folder import RunFolder
from sslvit.train.timing import MAX_TIMESTAMPS, PHASES, Clock, WaitForData

PAUSE = 0.25


@pytest.mark.parametrize("part", ["data", "forward", "backward", "optimizer"])
def test_a_part_that_takes_long_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, capsys: pytest.CaptureFixture
) -> None:
    """By a watch that only that part moves on."""
    watch = SimpleNamespace(now=0.0, perf_counter=lambda: watch.now, monotonic=lambda: watch.now)
    monkeypatch.setattr("sslvit.train.timing.time", watch)
    monkeypatch.setattr("sslvit.train.callbacks.run_log.time", watch)
    task = task_class("mae")
    step, prepare, update = task.training_step, ShardDataModule.prepare, task.optimizer_step

    def pause(gradient=None) -> None:
        watch.now += PAUSE

    def slow_data(self, batch):
        pause()
        return prepare(self, batch)

    def slow_step(self, batch, batch_idx=0):
        loss = step(self, batch, batch_idx)
        if part == "forward":
            pause()
        elif part == "backward":
            loss.register_hook(pause)
        return loss

    def slow_update(self, *given, **named):
        update(self, *given, **named)
        pause()

    if part == "data":
        monkeypatch.setattr(ShardDataModule, "prepare", slow_data)
    elif part == "optimizer":
        monkeypatch.setattr(task, "optimizer_step", slow_update)
    else:
        monkeypatch.setattr(task, "training_step", slow_step)
    folder = run(shards, tmp_path / "run", **{"train.micro_batch_size": 4, "train.steps": 4, "train.log_every": 2})
    passes = 1 if part == "optimizer" else 2
    for line in folder.read_metrics():
        taken = {name: line[f"time/{name}"] for name in PHASES}
        assert taken == {name: PAUSE * passes if name == part else 0 for name in PHASES}
        assert line["time/images_per_second"] == pytest.approx(8 / (PAUSE * passes), rel=0.3)
    assert ("waiting for data" in capsys.readouterr().out) == (part == "data")


def test_elapsed_seconds_go_on_where_a_run_was_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second a step, and a process that starts late; what a stopped run did after its checkpoint does not count."""
    watch = SimpleNamespace(now=10.0, perf_counter=lambda: watch.now, monotonic=lambda: watch.now)
    monkeypatch.setattr("sslvit.train.timing.time", watch)
    monkeypatch.setattr("sslvit.train.callbacks.run_log.time", watch)
    task = task_class("mae")
    step = task.training_step

    def slow(self, batch, batch_idx=0):
        watch.now += 1
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", slow)
    options = {"train.log_every": 2, "train.checkpoint_every": 3, "train.steps": 9}
    from test_resume import interrupted

    interrupted(shards, tmp_path / "run", 5, monkeypatch, **options)
    monkeypatch.setattr(task, "training_step", slow)
    watch.now = 1000.0
    folder = run(shards, tmp_path / "run", resume=True, **options)
    lines = {line["step"]: line for line in folder.read_metrics()}
    assert {step: line["time/elapsed"] for step, line in lines.items()} == {2: 2, 4: 4, 6: 6, 8: 8, 9: 9}
    assert all(line["time/images_per_second"] == 8 for line in lines.values())


def test_throughput_and_share_of_the_peak_are_those_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of a global batch of 48 in half a second each: 96 images a second over all ranks."""
    watch = SimpleNamespace(now=0.0, perf_counter=lambda: watch.now, monotonic=lambda: watch.now)
    monkeypatch.setattr("sslvit.train.timing.time", watch)
    monkeypatch.setattr("sslvit.train.callbacks.run_log.time", watch)
    (tmp_path / "metrics.jsonl").touch()
    log = RunLog(RunFolder(tmp_path), RunPlan(4, 8, 48, ranks=4), 2, Clock(), 0.001)
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value, root_device="cpu")
    trainer = SimpleNamespace(is_global_zero=True, global_step=0, world_size=4, strategy=strategy, loggers=[])
    module = SimpleNamespace(records={})
    log.on_train_start(trainer, module)
    log.clock.mark("start")
    for log.step in range(1, 5):
        watch.now += 0.5
        module.records["train/loss"] = [torch.tensor(value) for value in (1.0, 2.0, 6.0)]
        log.on_step(trainer, module)
    lines = RunFolder(tmp_path).read_metrics()
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 0.25), (4, 0.5)]
    for line in lines:
        assert (line["time/images_per_second"], line["time/mfu"], line["train/loss"]) == (96, pytest.approx(0.096), 3)


def test_the_time_left_counts_large_images_as_more_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nine steps of 2 x 2 patches, a second each, then one of 8 x 8, which takes 64 (6 x 8 + 64) / 4 (6 x 8 + 4)."""
    watch = SimpleNamespace(now=0.0, perf_counter=lambda: watch.now, monotonic=lambda: watch.now)
    monkeypatch.setattr("sslvit.train.timing.time", watch)
    monkeypatch.setattr("sslvit.train.callbacks.run_log.time", watch)
    (tmp_path / "metrics.jsonl").touch()
    encoder = EncoderSettings(width=8, heads=2, image_size=8, patch=1)
    data = DataSettings(resolutions=[2, 8], resolution_fractions=[0.9, 0.1])
    settings, run = RunSettings(data=data, encoder=encoder), RunPlan(10, 5, 4)
    work = work_of(settings, run)
    assert [work(steps) for steps in (0, 4, 9, 10)] == [0, 4 * 4 * 52, 9 * 4 * 52, 9 * 4 * 52 + 64 * 112]
    assert work_of(replace(settings, data=DataSettings(resolutions=[2, 8])), run)(7) == 7  # sampled for each step
    assert work_of(replace(settings, data=DataSettings()), run)(7) == 7
    log = RunLog(RunFolder(tmp_path), run, 1, Clock(), work=work)
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value, root_device="cpu")
    trainer = SimpleNamespace(is_global_zero=True, global_step=0, world_size=1, strategy=strategy, loggers=[])
    log.on_train_start(trainer, SimpleNamespace(records={}))
    log.clock.mark("start")
    with caplog.at_level(logging.INFO):
        for log.step in (1, 2, 3):
            watch.now += 1
            log.on_step(trainer, SimpleNamespace(records={}))
    assert [line.split("  ")[-1] for line in caplog.messages] == [
        "42 s left",
        "41 s left",
        "40 s left",
    ]  # 8 + 34.5, ...


def test_the_peak_of_all_devices_counts() -> None:
    class Images:
        classes = None

        def __len__(self) -> int:
            return 100

    def of(**changes) -> float:
        return forecast.mfu_per_throughput(load_recipe("mae/digits", RECIPES["mae/digits"] | changes), Images())

    one = of(**{"train.peak_tflops": 2.0})
    found = forecast.plan_step(load_recipe("mae/digits", RECIPES["mae/digits"]), 100)
    assert one == pytest.approx(found.flops_per_image / 2e12)
    assert of(**{"train.peak_tflops": 4.0}) == pytest.approx(one / 2)
    assert of(**{"train.peak_tflops": 2.0, "train.devices": 2, "train.nodes": 4}) == pytest.approx(one / 8)


def test_the_mean_over_ranks_is_that_of_all_micro_batches() -> None:
    """Each rank has its own; the strategy is asked for their mean."""
    asked = []

    def reduce(value, reduce_op):
        asked.append((value, reduce_op))
        return value

    strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
    values = [torch.tensor(value) for value in (1.0, 2.0, 6.0)]
    assert mean_over_ranks(SimpleNamespace(world_size=1, strategy=strategy), values) == 3
    assert asked == []
    assert mean_over_ranks(SimpleNamespace(world_size=2, strategy=strategy), values) == 3
    assert asked == [(torch.tensor(3.0, dtype=torch.float64), "mean")]


def test_gradients_that_are_exchanged_after_the_last_are_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DDP's hook marks: the backward pass ends with the last bucket; the exchange of earlier ones is hidden."""
    watch = SimpleNamespace(now=0.0, perf_counter=lambda: watch.now)
    monkeypatch.setattr("sslvit.train.timing.time", watch)
    monkeypatch.setattr("sslvit.train.timing.allreduce_hook", lambda group, bucket: "averaged")
    monkeypatch.setattr("sslvit.train.timing.distributed.group", SimpleNamespace(WORLD=None))
    clock = Clock()
    clock.mark("start")
    for seconds, happens in (
        (1, clock.on_train_batch_start), (2, clock.on_before_backward),
        (4, lambda: clock.mark_gradients(None, SimpleNamespace(is_last=lambda: False))),
        (8, lambda: clock.mark_gradients(None, SimpleNamespace(is_last=lambda: True))),
        (16, clock.on_after_backward), (32, clock.on_train_batch_end), (64, WaitForData(clock).on_train_batch_end),
    ):  # fmt: skip
        watch.now += seconds
        happens()
    assert clock.pop() == {"data": 1, "forward": 2, "backward": 12, "communication": 16, "optimizer": 32}
    assert Clock().mark_gradients(None, SimpleNamespace(is_last=lambda: False)) == "averaged"


def test_the_share_of_the_peak_is_the_work_over_the_time(shards: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", **{"train.peak_tflops": 0.5, "encoder.activation_checkpointing": True})
    found = forecast.plan_step(load_recipe("mae/digits", RECIPES["mae/digits"]), 30)
    for line in folder.read_metrics():
        assert line["time/mfu"] == pytest.approx(line["time/images_per_second"] * found.flops_per_image / 0.5e12)
    assert not any("mfu" in line for line in metrics(folder))  # a timing
    assert "time/mfu" not in run(shards, tmp_path / "cpu").read_metrics()[0]  # no peak is known of a CPU


def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Images:
        classes = None

        def __len__(self) -> int:
            return 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = load_recipe("mae/digits", RECIPES["mae/digits"] | {"train.accelerator": "auto"})
    found = forecast.plan_step(settings, 30)
    for name, tflops in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA GeForce RTX 4090", 165)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert forecast.mfu_per_throughput(settings, Images()) == found.flops_per_image / (tflops * 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert forecast.mfu_per_throughput(settings, Images()) is None
    given = replace(settings, train=replace(settings.train, peak_tflops=1.0))
    assert forecast.mfu_per_throughput(given, Images()) == found.flops_per_image / 1e12
    monkeypatch.setattr(
        forecast.FakeStep, "flops_per_image", property(lambda _: 1 / 0)
    )  # a task that cannot be counted
    assert forecast.mfu_per_throughput(given, Images()) is None


def test_many_moments_are_added_up_before_a_line_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100_000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    clock.mark("start")
    for _ in range(MAX_TIMESTAMPS):
        for ended in ("data", "forward", "callbacks"):
            clock.mark(ended)
    assert len(clock.timestamps) <= MAX_TIMESTAMPS
    assert clock.pop() == {part: MAX_TIMESTAMPS if part in ("data", "forward") else 0 for part in PHASES}
    assert clock.pop() == dict.fromkeys(PHASES, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_moments_are_those_of_its_stream() -> None:
    clock = Clock()
    clock.is_gpu = True
    clock.mark("start")
    torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second, which nothing here waits for
    clock.mark("forward")
    assert clock.pop()["forward"] > 0.02


def test_each_rank_counts_the_steps_between_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that is not the first: a second a step, whatever line it is."""
    watch = SimpleNamespace(now=0.0, perf_counter=lambda: watch.now, monotonic=lambda: watch.now)
    monkeypatch.setattr("sslvit.train.timing.time", watch)
    monkeypatch.setattr("sslvit.train.callbacks.run_log.time", watch)
    shared: list[torch.Tensor] = []
    mean = lambda _, values: shared.append(values[0]) or values[0]  # noqa: E731
    monkeypatch.setattr("sslvit.train.callbacks.run_log.mean_over_ranks", mean)
    clock = Clock()
    clock.mark("start")
    log = RunLog(RunFolder(tmp_path), RunPlan(9, 3, 8), 3, clock)
    rank, module = SimpleNamespace(is_global_zero=False, global_step=0), SimpleNamespace(records={})
    log.on_train_start(rank, module)
    for log.step in range(1, 10):
        watch.now += 1
        clock.mark("forward")
        log.on_step(rank, module)
    assert [times.tolist() for times in shared] == [[0, 1, 0, 0, 0]] * 3

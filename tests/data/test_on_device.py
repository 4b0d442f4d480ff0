"""What lies on the device, or travels there, is what the loader makes, and the host never waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda_fixtures import CPU, GPU, Whereabouts, on_fake_cuda, take_fake_cuda, tensors
from run_fixtures import losses, read_keys, run, same
from shard_fixtures import overwrite, smooth_images
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, SequentialSampler

from sslvit.data.array_images import array_samples
from sslvit.data.batch import Batch
from sslvit.data.index import ShardIndex, load_index
from sslvit.data.loader import Resolutions, TrainingBatches, encoder_views
from sslvit.data.module import ShardDataModule
from sslvit.data.on_device import BATCHES_AHEAD, DeviceBatches, DeviceLoader, Prefetcher
from sslvit.data.pack import pack
from sslvit.data.packed import Packed
from sslvit.data.plan import EpochPlan
from sslvit.data.reader import ShardReader
from sslvit.data.stream import StreamIndex
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings, EncoderSettings
from sslvit.settings.views import (
    AugmentSettings,
    CanvasSettings,
    CenterSettings,
    CropSettings,
    MultiCropSettings,
    SquareSettings,
)
from sslvit.tasks import task_class

COUNT, MICRO, PASSES = 60, 6, 2
VIEWS = {
    "crop": CropSettings(), "square": SquareSettings(), "center": CenterSettings(fraction=0.8),
    "whole": CenterSettings(), "canvas": CanvasSettings(flip=0.5), "augment": AugmentSettings(operations=0),
    "multi_crop": MultiCropSettings(local_crops=3, local_size=8, solarize=[0.3] * 3),
    "beyond": MultiCropSettings(global_scale=[0.5, 2.0], local_crops=1, local_size=8),
}  # fmt: skip
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}


@pytest.fixture(params=[1, 3], ids=["gray", "RGB"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> ShardIndex:
    """Labeled images, three of which cannot be read."""
    images = smooth_images(COUNT, 20, 16)[:, : request.param].permute(0, 2, 3, 1).numpy()
    images = images[..., 0] if request.param == 1 else images
    labels = np.arange(COUNT) % 5
    index = pack(array_samples(images, labels), tmp_path / "shards", list("abcde"), workers=1)
    overwrite(index, dict.fromkeys([7, 20, 41]))
    return index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12)).astype(np.uint8)
    pack(array_samples(images, np.arange(30) % 3), tmp_path / "train", ["a", "b", "c"])
    return tmp_path / "train"


def batches_of(index: ShardIndex, view: Any, rank: int = 0, **options) -> TrainingBatches:
    encoder = EncoderSettings(image_size=12, patch=4, channels=index.channels)
    plan = EpochPlan(index.shard_samples, 2 * PASSES * MICRO, seed=3)
    views = encoder_views(encoder, view, plan.seed)
    views.color_here = False
    return TrainingBatches(ShardReader(index, index.channels), views, plan, rank, MICRO, PASSES, **options)


def assert_same(there: Batch, here: Batch) -> None:
    """Pixels up to one in 255, everything else the same."""
    assert [view.shape for view in there.views] == [view.shape for view in here.views]
    for one, other in zip(there.views, here.views, strict=True):
        assert one.dtype == other.dtype
        assert (one.cpu().float() - other.float()).abs().max() <= 1
        assert other.float().std() > 10
    for name in ("samples", "valid", "epochs"):
        assert torch.equal(getattr(there, name), getattr(here, name))
        assert getattr(there, name).device == CPU
    assert torch.equal(there.labels.cpu(), here.labels)
    assert there.labels.dtype == here.labels.dtype
    assert (there.first_row, there.unreadable) == (here.first_row, here.unreadable)
    assert (there.colors is None) == (here.colors is None)
    for one, other in zip(there.colors or [], here.colors or [], strict=True):
        assert torch.equal(one.cpu(), other)


# ---- a set that lies on the device -----------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_batches_made_on_a_device_are_those_of_the_loader(index: ShardIndex, view: str) -> None:
    for rank in range(2):
        plain = batches_of(index, VIEWS[view], rank)
        numbers = range(8)  # steps of two micro-batches in two epochs
        here = [plain[number] for number in numbers]
        assert any(batch.unreadable for batch in here) or rank
        for number, expected in zip(numbers, here, strict=True):
            assert_same(DeviceBatches(plain, CPU)[number], expected)
        with on_fake_cuda():
            cached = DeviceBatches(plain, GPU)
            for number, expected in zip(numbers, here, strict=True):
                batch = cached[number]
                assert {tensor.device for tensor in [*batch.views, batch.labels]} == {GPU}
                assert_same(batch, expected)


def test_main_views_on_a_device_have_the_resolution_of_their_step(index: ShardIndex) -> None:
    plain = batches_of(index, CropSettings(), resolutions=Resolutions([8, 12, 16], None, 0))
    cached = DeviceBatches(plain, CPU)
    for number in range(8):
        assert_same(cached[number], plain[number])


def test_a_row_without_any_readable_substitute_stays_black(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth_images(24, 16, 16).permute(0, 2, 3, 1).numpy()
    index = pack(array_samples(images, np.arange(24) % 2), tmp_path, ["a", "b"], workers=1)
    overwrite(index, dict.fromkeys(range(20)))
    monkeypatch.setattr("sslvit.data.loader.MAX_SUBSTITUTES", 3)
    plain = batches_of(index, MultiCropSettings(local_crops=1, local_size=8))
    cached = DeviceBatches(plain, CPU)
    blacks = 0
    for number in range(2):
        here, there = plain[number], cached[number]
        is_black = (here.views[0] == 0).flatten(1).all(1)
        blacks += int(is_black.sum())
        assert torch.equal((there.views[0] == 0).flatten(1).all(1), is_black)
        assert there.unreadable == here.unreadable
        assert there.labels.tolist() == here.labels.tolist()
        assert all(torch.equal(a, b) for a, b in zip(there.colors, here.colors, strict=True))
    assert 0 < blacks < 2 * MICRO


def test_the_threads_batches_come_in_the_samplers_order_and_its_errors_too(index: ShardIndex) -> None:
    plain = batches_of(index, CropSettings())
    cached = DeviceBatches(plain, CPU)
    loader = DeviceLoader(cached, SequentialSampler(range(2 * BATCHES_AHEAD)))
    assert len(loader) == 2 * BATCHES_AHEAD
    for _ in range(2):
        found = list(loader)
        assert len(found) == len(loader)
        for number, batch in enumerate(found):
            assert_same(batch, plain[number])
    cached.draw = lambda number: 1 / (number - 3)
    cached.make = lambda drawn: drawn
    batches = iter(loader)
    assert [next(batches) for _ in range(3)] == [-1 / 3, -1 / 2, -1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits"])
def test_a_run_on_cached_images_is_that_of_the_loader_and_resumes_bit_for_bit(
    recipe: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)
    overwrite(load_index(shards), {4: None})
    options = {"recipe": recipe, "train.micro_batch_size": 4, "data.ledger": True, "train.steps": 6,
               "data.max_unreadable_fraction": 0.5, "train.checkpoint_every": 3}  # fmt: skip
    by_loader = run(shards, tmp_path / "loader", **options)
    options["data.cache_on_device"] = True
    cached = run(shards, tmp_path / "cached", **options)
    assert read_keys(cached) == read_keys(by_loader)
    assert cached.ledger.read_text() == by_loader.ledger.read_text()
    assert '"times"' in cached.ledger.read_text()
    found, expected = (losses(folder) for folder in (cached, by_loader))
    assert found == pytest.approx(expected, rel=1e-2)
    task = task_class(recipe.split("/")[0])
    step = task.training_step

    def stop(self, batch, batch_idx=0):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "stopped", **options)
    monkeypatch.setattr(task, "training_step", step)
    resumed = run(shards, tmp_path / "stopped", resume=True, **options)
    assert same(resumed, cached)


# ---- when it does ----------------------------------------------------------------------------------------------


def module_on(device: torch.device, index: Any, settings: DataSettings, channels: int = 3) -> ShardDataModule:
    encoder = EncoderSettings(image_size=12, patch=4, channels=channels)
    plan = EpochPlan([COUNT], 12, seed=3)
    module = ShardDataModule(index, settings, encoder, plan, RunPlan(3, 5, 12))
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=device),
        global_rank=0,
        max_epochs=1,
        max_steps=3,
        current_epoch=0,
        num_devices=1,
    )
    return module


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of some bytes."""
    about = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    return about


@pytest.mark.parametrize("index", [3], indirect=True)
def test_small_equal_images_are_kept_on_a_gpu_and_on_a_cpu_only_when_asked(
    index: ShardIndex, memory: SimpleNamespace
) -> None:  # fmt: skip
    def kind(device: torch.device, memory_limit_mb: int = 1024, **settings) -> type:
        options = DataSettings(global_batch_size=12, workers=0, memory_limit_mb=memory_limit_mb, **settings)
        with on_fake_cuda():
            return type(module_on(device, index, options).train_dataloader())

    assert kind(GPU) is DeviceLoader
    assert kind(GPU, view=MultiCropSettings()) is DeviceLoader
    assert kind(GPU, view=AugmentSettings()) is Prefetcher
    assert kind(GPU, color_on="workers") is Prefetcher
    assert kind(GPU, memory_limit_mb=0) is Prefetcher
    assert kind(GPU, cache_on_device=False) is Prefetcher
    assert kind(CPU) is DataLoader
    assert kind(CPU, cache_on_device=True) is DeviceLoader
    size = COUNT * 3 * 20 * 16
    memory.total_memory = 20 * size - 1
    assert kind(GPU) is Prefetcher
    assert kind(GPU, cache_on_device=True) is DeviceLoader
    memory.total_memory = 20 * size
    assert kind(GPU) is DeviceLoader


@pytest.mark.parametrize("index", [3], indirect=True)
def test_what_cannot_lie_on_the_device_is_refused_before_the_run(index: ShardIndex) -> None:
    def ask(of: Any = index, **settings) -> None:
        module_on(CPU, of, DataSettings(global_batch_size=12, cache_on_device=True, **settings))

    ask()
    with pytest.raises(ValueError, match=r"cache_on_device true: RandAugment .* Leave it at auto"):
        ask(view=AugmentSettings())
    with pytest.raises(ValueError, match=r"cache_on_device true: .* more than data.memory_limit_mb \(0\)"):
        ask(memory_limit_mb=0)
    with pytest.raises(ValueError, match="cache_on_device true: a stream"):
        ask(StreamIndex(["pipe:true"], 60, True, None))
    with pytest.raises(ValueError, match="Set data.color_on to auto"):
        ask(color_on="workers")


# ---- nobody waits ----------------------------------------------------------------------------------------------


class Traffic(TorchFunctionMode):
    """Copies between the devices, and what the host waits for."""

    def __init__(self, where: Whereabouts) -> None:
        super().__init__()
        self.where, self.to_device, self.waits = where, 0, list[str]()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [self.where.of(value) for value in tensors(args, kwargs)]
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        asked = torch.device(kwargs.get("device") or CPU)
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and asked.type == "cuda":
            self.waits.append(f"{name} from the host")  # not from page-locked memory
        if name in ("to", "cpu", "cuda") and given[0] != self.where.of(result):
            if self.where.of(result) == GPU:
                self.to_device += 1
            else:
                self.waits.append(name)
        if name in ("copy_", "__setitem__") and len(set(given[:2])) > 1:
            self.waits.append(name)
        if name in ("tolist", "item", "__bool__", "__float__", "__int__", "__index__") and given[0] == GPU:
            self.waits.append(name)
        return result


class _Kernels(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tensors(args, kwargs)
        if any(self.traffic.where.of(value) == GPU for value in given):
            name = function.overloadpacket.__name__
            is_by_mask = name.startswith(("index", "_index")) and any(value.dtype == torch.bool for value in given[1:])
            if name in WAITING or is_by_mask:
                frame = sys._getframe()
                while "/sslvit/" not in frame.f_code.co_filename and frame.f_back:
                    frame = frame.f_back
                self.traffic.waits.append(f"{name} in {frame.f_code.co_name}")
        return function(*args, **kwargs or {})


@contextmanager
def traffic() -> Iterator[Traffic]:
    with ExitStack() as modes:
        counted = Traffic(modes.enter_context(on_fake_cuda()))
        modes.enter_context(counted)
        modes.enter_context(_Kernels(counted))
        yield counted


def test_waits_and_copies_are_noticed() -> None:
    with traffic() as counted:
        values = torch.ones(3).to(GPU)
        assert (counted.to_device, counted.waits) == (1, [])
        for wait in (
            lambda: values.max().item(), lambda: float(values.sum()), lambda: values.cpu(), lambda: values.nonzero(),
            lambda: values[values > 0], lambda: bool(values.any()), lambda: torch.tensor([1.0], device=GPU),
            lambda: values.tolist(), lambda: torch.zeros(3).copy_(values),
        ):  # fmt: skip
            counted.waits.clear()
            wait()
            assert counted.waits


@pytest.mark.parametrize("index", [3], indirect=True)
@pytest.mark.parametrize("path", ["loader", "cached"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_batch_travels_in_one_copy_and_nobody_waits_for_the_device(index: ShardIndex, view: str, path: str) -> None:
    plain = batches_of(index, VIEWS[view])
    data = module_on(CPU, index, DataSettings(global_batch_size=12))
    with traffic() as counted:
        made = DeviceBatches(plain, GPU) if path == "cached" else plain
        for is_warm in (False, True):  # the second time, tables of weights and the constants of the mean are there
            for number in range(4):
                counted.to_device = 0
                batch = made[number]
                if path == "loader":
                    batch = batch.pin_memory().to(GPU)
                batch = data.prepare(batch)
                assert {value.device for value in batch.views} == {GPU}
                assert counted.waits == []
                assert counted.to_device == 1 or not is_warm


@pytest.mark.parametrize("index", [1, 3], indirect=True)
@pytest.mark.parametrize("view", VIEWS)
def test_prepared_on_a_gpu_a_batch_is_what_the_cpu_prepares(index: ShardIndex, view: str) -> None:
    plain, settings = batches_of(index, VIEWS[view]), DataSettings(global_batch_size=12)
    data = module_on(CPU, index, settings, index.channels)
    scale = 255 * torch.tensor(data.encoder.std[: index.channels]).view(-1, 1, 1)
    here = [data.prepare(plain[number]) for number in range(4)]
    with on_fake_cuda():
        cached = DeviceBatches(plain, GPU)
        for number, expected in enumerate(here):
            moved = data.prepare(plain[number].to(GPU))
            for one, other in zip(moved.views, expected.views, strict=True):
                difference = ((one.cpu() - other) * scale).abs()
                assert (difference > 1.01).float().mean() < 1e-3  # where 128 is solarized and 127 is not
            for one, other in zip(data.prepare(cached[number]).views, expected.views, strict=True):
                # one in 255 before colors change is up to two after brightness and contrast, and hue and gray mix it
                assert ((one.cpu() - other) * scale).abs().mean() < 0.2


# ---- travel ----------------------------------------------------------------------------------------------------


def test_packed_tensors_are_the_same_and_are_packed_once() -> None:
    values = [torch.arange(7, dtype=torch.uint8), torch.randn(2, 3, 5), torch.arange(4), torch.zeros(0, 3),
              torch.randn(4, 6).T, torch.tensor([True, False])]  # fmt: skip
    packed = Packed.of(values)
    for one, other in zip(packed.tensors(), values, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    again = Packed.of(packed.tensors())
    assert again.buffer.data_ptr() == packed.buffer.data_ptr()
    swapped = [torch.ones(2, 8), torch.zeros(2, 8)]
    turned = Packed.of(Packed.of(swapped).tensors()[::-1])  # in one buffer, but not in this order
    assert [tensor.unique().tolist() for tensor in turned.tensors()] == [[0.0], [1.0]]
    whole = torch.randn(100, 3)
    assert Packed.of([whole[:5]]).buffer.nbytes < 200  # not the storage that a part of it lies in


def test_a_batch_keeps_on_the_cpu_what_only_the_cpu_reads() -> None:
    numbers = torch.arange(4)
    batch = Batch(
        [torch.rand(4, 1, 2, 2), torch.rand(4, 1, 1, 1)], numbers % 2, numbers, numbers > 0, numbers, 3, {"a": "b"},
        [torch.rand(4, 8)] * 2,
    )  # fmt: skip
    with on_fake_cuda():
        moved = batch.to(GPU)
        assert {value.device for value in [*moved.views, moved.labels, *moved.colors]} == {GPU}
        assert {value.device for value in (moved.samples, moved.valid, moved.epochs)} == {CPU}
        assert (moved.first_row, moved.unreadable) == (3, {"a": "b"})
        kept = moved.rows(moved.valid)
        back = kept.to("cpu")
    assert kept.epochs.tolist() == kept.samples.tolist() == [1, 2, 3]
    for one, other in zip([*back.views, back.labels, *back.colors],
                          [*batch.views, batch.labels, *batch.colors], strict=True):  # fmt: skip
        assert torch.equal(one, other[1:])
    assert batch.to("cpu").views[0] is batch.views[0]
    assert replace(batch, labels=None, colors=None).to("cpu").colors is None


def test_the_next_batch_is_on_its_way_before_the_step_and_the_step_waits_for_its_own(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is asked of CUDA, in its order."""
    log: list[str] = []
    streams = iter(["side"])
    now = ["main"]

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            now.append(self.name)

        def __exit__(self, *_: object) -> None:
            now.pop()

        def wait_event(self, event: Event) -> None:
            log.append(f"{self.name} waits for {event.number}")

    class Event:
        def record(self, stream: Stream) -> None:
            self.number = sum("copied" in line for line in log) - 1
            log.append(f"event {self.number} in {stream.name}")

    main, to = Stream("main"), Batch.to

    def copy(batch: Batch, device: torch.device) -> Batch:
        log.append(f"copied in {now[-1]}")
        return to(batch, device)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(streams)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(Batch, "to", copy)
    plain = batches_of(index, CropSettings())
    loader = DataLoader(plain, batch_size=None, sampler=SequentialSampler(range(3)))
    with on_fake_cuda():
        prefetcher = Prefetcher(loader, GPU)
        assert len(prefetcher) == 3
        assert prefetcher.dataset is plain
        for number, batch in enumerate(prefetcher):
            log.append(f"step {number}")
            assert_same(batch, plain[number])
    assert log == [
        "copied in side", "event 0 in side",
        "copied in side", "event 1 in side", "main waits for 0", "kept for main", "step 0",
        "copied in side", "event 2 in side", "main waits for 1", "kept for main", "step 1",
        "main waits for 2", "kept for main", "step 2",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*device_type of 'cuda'.*", "ignore:.*no accelerator is found.*")
def test_a_run_whose_views_are_made_on_a_gpu_is_that_of_the_cpu(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslvit.train.run.plot_pictures", lambda *_: None)
    options = {"recipe": "dino/digits", "train.steps": 2, "train.micro_batch_size": 4}
    on_cpu = run(shards, tmp_path / "cpu", **options)
    take_fake_cuda(monkeypatch)
    with on_fake_cuda():
        on_gpu = run(shards, tmp_path / "gpu", **options, **{"data.cache_on_device": True})
    found, expected = (losses(folder) for folder in (on_gpu, on_cpu))
    assert found == pytest.approx(expected, rel=1e-2)

"""Any sample is one read by offset; what cannot be read is replaced and named."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded, image_folder, numbered_shards, numbers_of, photograph

from sslvit.data.array_images import array_samples
from sslvit.data.decode import decode
from sslvit.data.header import BadImage
from sslvit.data.loader import Resolutions, TrainingBatches, evaluation_loader, make_batch, view_samples
from sslvit.data.mixture import JoinedIndex, MixturePlan
from sslvit.data.pack import pack, pack_source
from sslvit.data.plan import EpochPlan
from sslvit.data.reader import ReadError, ShardReader
from sslvit.data.store import PackSettings
from sslvit.data.views import Views
from sslvit.files import REMEDIES
from sslvit.settings import EncoderSettings
from sslvit.settings.views import CenterSettings, CropSettings, MultiCropSettings

WHOLE = Views(CenterSettings(), [8, 8], "bilinear")


def seen(reader: ShardReader, samples: list[int], views: Views = WHOLE):
    chosen = np.array(samples)
    (view,), bad = view_samples(reader, views, chosen, np.zeros_like(chosen))
    return view, bad


def damage(index, sample: int) -> None:
    shard, offset, size = index.locate(sample)
    with open(index.shard_path(shard), "r+b") as file:
        file.seek(offset + 8)
        file.write(bytes(size - 8))


def test_small_equal_images_are_kept_decoded_and_equal_to_reading(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 30)
    kept, read = ShardReader(index), ShardReader(index, memory_limit_mb=0)
    assert kept.decoded is not None
    assert read.decoded is None
    for views in (WHOLE, Views(CropSettings(), [6, 6], "bicubic", seed=1)):
        assert torch.equal(seen(kept, [3, 17, 3], views)[0], seen(read, [3, 17, 3], views)[0])


@pytest.mark.parametrize("limit", [1024, 0])
def test_a_damaged_sample_is_named_and_the_next_of_the_global_batch_shown(tmp_path: Path, limit: int) -> None:
    index = numbered_shards(tmp_path, 24)
    plan = EpochPlan(index.shard_samples, 8, 3)
    order, numbers_before = plan.batch(1)[0], numbers_of(index)
    for row in (2, 3, 7):
        damage(index, int(order[row]))
    numbers = numbers_of(index)
    expected = [numbers[order[row]] for row in (0, 1, 4, 4, 4, 5, 6, 0)]
    assert [number % 2 for number in expected] != [numbers_before[order[row]] % 2 for row in range(8)]
    for ranks, micro in [(1, 8), (2, 4), (4, 1)]:
        batches = []
        for rank in range(ranks):
            reader = ShardReader(index, 1, memory_limit_mb=limit)
            accumulation_steps = 8 // ranks // micro
            own = TrainingBatches(reader, WHOLE, plan, rank, micro, accumulation_steps)
            batches += [own[accumulation_steps + part] for part in range(accumulation_steps)]
        shown = torch.cat([batch.views[0][:, 0, 0, 0] for batch in batches]).tolist()
        assert shown == expected
        assert torch.cat([batch.labels for batch in batches]).tolist() == [number % 2 for number in expected]
        assert torch.cat([batch.valid for batch in batches]).tolist() == [row not in (2, 3, 7) for row in range(8)]
        assert {key for batch in batches for key in batch.unreadable} == {
            index.key(int(order[row])) for row in (2, 3, 7)
        }


def test_where_nothing_can_be_read_the_view_is_black(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 20)
    damage(index, 4)
    batch = make_batch(ShardReader(index, 1), WHOLE, np.array([3, 4]), np.zeros(2, int))
    assert batch.valid.tolist() == [True, False]
    assert (batch.views[0][1] == 0).all()
    assert batch.labels.tolist() == index.labels_of(np.array([3, 4])).tolist()


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_samples_of_a_harmed_shard_are_bad_and_others_are_not(tmp_path: Path, harm: str) -> None:
    index = numbered_shards(tmp_path, 30, shard_mb=0.01)
    assert len(index.shards) >= 3
    path = index.shard_path(1)
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:600])
    numbers = numbers_of(index)
    first, last = index.first_of_shard[1:3]
    assert min(numbers[:first] + numbers[last:]) >= 0
    assert set(numbers[first + 1 : last]) == {-1}
    with pytest.raises(BadImage, match=f"^{harm} shard$"):
        ShardReader(index, memory_limit_mb=0).read(int(last) - 1)
    assert list(index.missing_shards()) == [1]


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslvit.data.reader.MAX_OPEN_SHARDS", 2)
    index = numbered_shards(tmp_path, 20, shard_mb=0.004)
    assert len(index.shards) > 5
    reader = ShardReader(index, memory_limit_mb=0)
    for samples in (range(20), reversed(range(20))):
        for sample in samples:
            reader.read(sample)
        assert len(reader.files) == 2
    assert ShardReader(index, 1).decoded[:, 0, 0, 0].tolist() == numbers_of(index)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_reader_that_nobody_holds_has_closed_its_files(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 20, shard_mb=0.004)
    gc.collect()
    before = open_descriptors()
    for _ in range(3):
        reader = ShardReader(index, memory_limit_mb=0)
        for sample in range(20):
            reader.read(sample)
        assert open_descriptors() == before + len(index.shards)
        copy = pickle.loads(pickle.dumps(reader))
        assert copy.read(7) == reader.read(7)
        assert open_descriptors() == before + len(index.shards) + 1
        del copy
        assert open_descriptors() == before + len(index.shards)
        del reader
        assert open_descriptors() == before
    kept = ShardReader(index, 1)
    assert kept.decoded is not None
    assert open_descriptors() == before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["open", "pread"])
def test_a_fault_of_the_machine_passes_or_stops_the_run_and_is_no_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    index = numbered_shards(tmp_path, 20, shard_mb=0.004)
    numbers, reader = numbers_of(index), ShardReader(index, 1, memory_limit_mb=0)
    reader.read(0)
    last, failures, original = len(index) - 1, [True], getattr(os, where)

    def failing(target, *more):
        name = target if where == "open" else os.readlink(f"/proc/self/fd/{target}")
        if str(name) == str(index.shard_path(len(index.shards) - 1)) and failures:
            failures.pop()
            raise OSError(code, os.strerror(code))
        return original(target, *more)

    monkeypatch.setattr(os, where, failing)
    assert decode(reader.read(last), 1)[0, 0, 0] == numbers[last]
    assert not failures
    assert len(reader.files) == 1  # the others made room
    reader.close()
    failures += [True] * 2
    with pytest.raises(ReadError, match=f"{index.shards[-1].name}: could not be read .{os.strerror(code)}") as error:
        view_samples(reader, WHOLE, np.array([0, last]), np.zeros(2, int))
    assert REMEDIES[code] in str(error.value)
    assert not reader.unreadable_shards
    assert decode(reader.read(last), 1)[0, 0, 0] == numbers[last]  # and it is not remembered


def test_passes_with_few_descriptors_see_every_image(tmp_path: Path) -> None:
    """Readers of earlier passes, which somebody still holds, do not take descriptors from later ones for ever."""
    index = numbered_shards(tmp_path, 100, shard_mb=0.004)
    assert len(index.shards) > 30
    gc.collect()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 45, limit[1]))
    try:
        found = [numbers_of(index) for _ in range(6)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert all(sorted(numbers) == list(range(100)) for numbers in found)


def test_bytes_that_a_shard_does_not_have_are_a_truncated_shard(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 6)
    _, offset, size = index.locate(5)
    os.truncate(index.shard_path(0), offset + size - 1)  # a byte is missing
    reader = ShardReader(index, 1, memory_limit_mb=0)
    with pytest.raises(BadImage, match="truncated shard"):
        reader.read(5)
    assert len(reader.read(4)) == index.locate(4)[2]


def test_the_least_recently_used_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslvit.data.reader.MAX_OPEN_SHARDS", 2)
    index = numbered_shards(tmp_path, 20, shard_mb=0.004)
    reader = ShardReader(index, 1, memory_limit_mb=0)
    for shard, kept in ((0, {0}), (1, {0, 1}), (0, {0, 1}), (2, {0, 2}), (1, {1, 2})):
        reader.read(int(index.first_of_shard[shard]))
        assert set(reader.files) == kept


def test_statistics_of_a_mixture_are_those_of_its_batches(tmp_path: Path) -> None:
    """Of a dark source and a bright one, three quarters of each batch from the bright one."""
    dark, bright = numbered_shards(tmp_path / "a", 40), numbered_shards(tmp_path / "b", 30, first=200)
    joined = JoinedIndex([dark, bright], [16, 48])
    pixels = np.concatenate([np.repeat(np.arange(40), 16 * 30), np.repeat(np.arange(200, 230), 48 * 40)]) / 255
    assert joined.mean[0] == pytest.approx(pixels.mean(), abs=2e-4)
    assert joined.std[0] == pytest.approx(pixels.std(), abs=2e-4)
    other = numbered_shards(tmp_path / "c", 30, first=100)
    assert JoinedIndex([dark, other], [1, 1]).fingerprint() != JoinedIndex([dark, bright], [1, 1]).fingerprint()
    assert JoinedIndex([dark, bright], [1, 1]).fingerprint() == joined.fingerprint()


def test_images_are_turned_or_left_as_their_index_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its first row is the right side of what is seen
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png", exif=exif)
    for orientation, expected in (("upright", np.rot90(pixels, -1)), ("stored", pixels)):
        settings = PackSettings(orientation=orientation)
        (index,) = pack_source(tmp_path / "in", tmp_path / orientation, settings, workers=1)
        reader = ShardReader(index, 1, memory_limit_mb=0)
        content = reader.read(0)
        assert np.array_equal(decode(content, 1, header=reader.header(content))[0].numpy(), expected)
        assert np.array_equal(ShardReader(index, 1).decoded[0, 0].numpy(), expected)


def test_a_missing_shard_is_looked_for_once_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = numbered_shards(tmp_path, 20, shard_mb=0.004)
    index.shard_path(1).unlink()
    reader, tried, original = ShardReader(index, 1, 0), [], os.open
    monkeypatch.setattr(os, "open", lambda path, *more: tried.append(path) or original(path, *more))
    for sample in range(index.first_of_shard[1], index.first_of_shard[2]):
        with pytest.raises(BadImage, match="missing shard"):
            reader.read(sample)
    assert len(tried) == 2  # once more, as a cache may just have made room


def test_an_image_is_decoded_once_for_all_of_its_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encoded(photograph(900, 1200, i), "JPEG"))
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", workers=1)
    decoded = []
    original = __import__("sslvit.data.loader", fromlist=["decode"]).decode
    monkeypatch.setattr("sslvit.data.loader.decode", lambda *a: decoded.append(a[3]) or original(*a))
    settings = MultiCropSettings(local_crops=6, local_size=32)
    views = Views(settings, [64, 64], "bicubic", seed=2)
    batch = make_batch(ShardReader(index), views, np.arange(3), np.zeros(3, int))
    assert len(decoded) == 3
    assert [tuple(v.shape) for v in batch.views] == [(3, 3, 64, 64)] * 2 + [(3, 3, 32, 32)] * 6
    assert max(decoded) > 1  # large images are decoded at a reduced scale
    monkeypatch.setattr("sslvit.data.loader.reduction_for", lambda zoom, header: 1)
    full = make_batch(ShardReader(index), views, np.arange(3), np.zeros(3, int))
    difference = np.mean([(a.float() - b.float()).abs().mean() for a, b in zip(batch.views, full.views, strict=True)])
    assert difference < 2.5


def test_colors_change_alike_in_workers_and_on_the_device(tmp_path: Path) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in"), tmp_path / "out", workers=1)
    from sslvit.data.views import jitter_views

    settings, samples = MultiCropSettings(local_crops=2, local_size=12), np.arange(6)
    here, there = (Views(settings, [24, 24], "bicubic", seed=2, color_here=place) for place in (True, False))
    one, other = (make_batch(ShardReader(index), views, samples, np.zeros(6, int)) for views in (here, there))
    assert one.colors is None
    assert all(view.dtype == torch.uint8 for view in one.views + other.views)
    for a, b in zip(one.views, jitter_views(other.views, other.colors), strict=True):
        assert torch.equal(a.float(), b)


def training_rows(index, views: Views, plan, ranks: int, workers: int, steps: range, micro: int) -> torch.Tensor:
    """The global batches of some steps, as that many ranks and loader workers make them."""
    accumulation_steps = plan.global_batch_size // ranks // micro
    parts = []
    for rank in range(ranks):
        batches = TrainingBatches(ShardReader(index, 1), views, plan, rank, micro, accumulation_steps)
        wanted = [step * accumulation_steps + part for step in steps for part in range(accumulation_steps)]
        loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=wanted, num_workers=workers)
        parts.append(torch.cat([batch.views[0] for batch in loader]).unflatten(0, (len(steps), -1)))
    return torch.cat(parts, 1)


def test_the_global_batch_is_the_same_for_any_ranks_and_workers(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 203, shard_mb=0.05)
    plan = EpochPlan(index.shard_samples, 12, 5, lanes=4, window_shards=1)
    views = Views(CropSettings(), [6, 6], "bicubic", seed=5)
    steps = range(14, 20)  # over the border of an epoch
    base = training_rows(index, views, plan, 1, 0, steps, 12)
    for ranks, workers, micro in [(1, 3, 12), (2, 1, 6), (4, 0, 1), (2, 3, 3)]:
        assert torch.equal(training_rows(index, views, plan, ranks, workers, steps, micro), base), (ranks, workers)


def test_evaluation_reads_every_sample_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 103)
    encoder = EncoderSettings(image_size=8, patch=4, channels=1, mean=[0.5], std=[0.5])
    for ranks, workers in [(1, 0), (3, 2)]:
        found = []
        for rank in range(ranks):
            for batch in evaluation_loader(ShardReader(index, 1), encoder, 7, workers, rank, ranks):
                found += batch.samples[batch.valid].tolist()
                assert len(batch) == 7
        assert sorted(found) == list(range(103))


def test_a_mixture_reads_from_each_source(tmp_path: Path) -> None:
    one, other = numbered_shards(tmp_path / "a", 20), numbered_shards(tmp_path / "b", 30)
    joined = JoinedIndex([one, other], [1, 3])
    plan = MixturePlan([EpochPlan(one.shard_samples, 2, 1), EpochPlan(other.shard_samples, 6, 2)])
    assert len(joined) == 50
    assert numbers_of(joined) == numbers_of(one) + numbers_of(other)
    assert joined.key(25).startswith(str(tmp_path / "b"))
    assert joined.mean[0] == pytest.approx(0.25 * one.mean[0] + 0.75 * other.mean[0], abs=1e-4)
    batch = TrainingBatches(ShardReader(joined, 1), WHOLE, plan, 0, 8, 1)[3]
    numbers = np.array(numbers_of(joined))
    assert batch.views[0][:, 0, 0, 0].tolist() == numbers[batch.samples].tolist()
    assert (batch.samples < 20).sum() == 2
    assert batch.labels is None


def test_sources_of_other_channels_are_not_mixed(tmp_path: Path) -> None:
    six = pack(array_samples(np.zeros((4, 8, 8, 6), np.uint8)), tmp_path / "six", workers=1)
    gray = numbered_shards(tmp_path / "gray", 4)
    with pytest.raises(ValueError, match="six: 6, .*gray: 1. cannot be mixed"):
        JoinedIndex([six, gray], [1, 1])


def test_the_resolution_of_a_step_is_the_same_everywhere_and_all_occur(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 40)
    plan = EpochPlan(index.shard_samples, 8, 3)
    resolutions = Resolutions([4, 6, 8], None, 3)
    drawn = [resolutions.size_at(step)[0] for step in range(60)]
    assert set(drawn) == {4, 6, 8}
    for rank in (0, 1):
        batches = TrainingBatches(ShardReader(index, 1), WHOLE, plan, rank, 4, 1, resolutions)
        assert [batches[step].views[0].shape[2] for step in range(10)] == drawn[:10]


def test_sixteen_bit_sets_keep_their_depth_up_to_the_encoder(tmp_path: Path) -> None:
    images = (np.arange(12 * 64).reshape(12, 8, 8) * 80).astype(np.uint16)
    index = pack(array_samples(images), tmp_path, workers=1)
    assert (index.bits, index.channels) == (16, 1)
    order = [int(index.key(i).split("/")[1].split(".")[0]) for i in range(12)]
    for limit in (1024, 0):
        view, _ = seen(ShardReader(index, 1, memory_limit_mb=limit), list(range(12)))
        assert view.dtype == torch.float32
        torch.testing.assert_close(
            view[:, 0], torch.from_numpy(images[order].astype(np.float32)) / 257, atol=1e-3, rtol=0
        )
    assert index.mean[0] == pytest.approx(images.mean() / 65535, abs=1e-4)


@pytest.mark.parametrize(
    ("channels", "kind"), [(6, np.uint8), (4, np.uint8), (4, np.uint16), (2, np.uint16), (1, np.uint8)]
)
def test_images_of_any_number_of_channels_pass_through(tmp_path: Path, channels: int, kind: type) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, channels)).astype(kind)
    index = pack(array_samples(images), tmp_path, workers=1)
    assert (index.channels, index.bits) == (channels, 8 * kind().itemsize)
    images = images / np.float32(257) if kind == np.uint16 else images
    order = [int(index.key(i).split("/")[1].split(".")[0]) for i in range(9)]
    view, bad = seen(ShardReader(index, channels), list(range(9)))
    assert not bad
    torch.testing.assert_close(view, torch.from_numpy(images[order]).permute(0, 3, 1, 2), atol=1e-3, rtol=0)


def test_a_photograph_among_gray_images_is_bad_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photograph(40, 50).save(tmp_path / "in" / "a.png")
    Image.new("L", (30, 60), 9).save(tmp_path / "in" / "b.png")
    (index,) = pack_source(tmp_path / "in", tmp_path / "out", workers=1)
    assert index.channels == 3
    assert seen(ShardReader(index), [0, 1])[1] == {}


def test_a_sample_that_fills_up_a_batch_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index,) = pack_source(image_folder(tmp_path / "in", count=3), tmp_path / "out", workers=1)
    decoded = []

    def count(content, *more):
        decoded.append(content)
        return decode(content, *more)

    monkeypatch.setattr("sslvit.data.loader.decode", count)
    reader = ShardReader(index, memory_limit_mb=0)
    batch = make_batch(reader, WHOLE, np.array([0, 4, 4, 4]), np.zeros(4, int))
    assert len(decoded) == 2
    assert all(torch.equal(batch.views[0][1], batch.views[0][i]) for i in (2, 3))
    assert not torch.equal(batch.views[0][0], batch.views[0][1])
    decoded.clear()
    make_batch(reader, WHOLE, np.array([4, 4]), np.array([0, 1]))
    assert len(decoded) == 2  # of another epoch, so another view

"""What a batch says is what it shows: image, label, epoch, size, and whether a row counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import encoded, numbered_shards, photograph

from sslvit.data.array_images import array_samples
from sslvit.data.loader import (
    Resolutions,
    TrainingBatches,
    center_view,
    evaluation_loader,
    make_batch,
    normalized_view,
    view_of_image,
)
from sslvit.data.module import ShardDataModule
from sslvit.data.pack import pack
from sslvit.data.plan import EpochPlan
from sslvit.data.reader import MemoryReader, ShardReader
from sslvit.data.views import Views
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings, EncoderSettings
from sslvit.settings.views import AugmentSettings, CenterSettings, CropSettings, MultiCropSettings

NAMES = [f"class {number}" for number in range(24)]
GRAY = EncoderSettings(image_size=8, patch=4, channels=1)


def photographs(count: int = 24, side: int = 20) -> MemoryReader:
    return MemoryReader({n: (f"im{n}", encoded(photograph(side, side + 4, n), "PNG")) for n in range(count)}, 3)


def broken(reader: MemoryReader, *samples: int) -> MemoryReader:
    for sample in samples:
        reader.contents[sample] = (reader.contents[sample][0], b"nonsense")
    return reader


@pytest.mark.parametrize("limit", [1024, 0])
def test_a_substitute_brings_its_label_its_epoch_and_its_colors(tmp_path: Path, limit: int) -> None:
    """The row keeps the number of the sample that it stands in for, which is the one that is named."""
    rng = np.random.default_rng(0)
    index = pack(
        array_samples(rng.integers(0, 256, (24, 20, 20, 3)).astype(np.uint8), np.arange(24)), tmp_path / "s", NAMES
    )
    shard, offset, size = index.locate(5)
    with open(index.shard_path(shard), "r+b") as file:
        file.seek(offset + 8)
        file.write(bytes(size - 8))
    reader = ShardReader(index, memory_limit_mb=limit)
    settings = MultiCropSettings(local_crops=1, local_size=8)
    views = Views(settings, [16, 16], "bicubic", seed=3)
    samples, epochs = np.array([4, 5, 6]), np.array([2, 2, 2])
    batch = make_batch(reader, views, samples, epochs, first_row=7, substitutes=lambda row: [(5, 2), (11, 3), (12, 3)])
    assert batch.valid.tolist() == [True, False, True]
    assert batch.samples.tolist() == [4, 5, 6]
    assert batch.epochs.tolist() == [2, 2, 2]
    assert batch.first_row == 7
    assert list(batch.unreadable) == [index.key(5)]
    assert batch.labels.tolist() == index.labels_of(np.array([4, 11, 6])).tolist()
    alone = make_batch(reader, views, np.array([11]), np.array([3]))
    for view, expected in zip(batch.views, alone.views, strict=True):
        assert torch.equal(view[1], expected[0])
    elsewhere = make_batch(reader, Views(settings, [16, 16], "bicubic", 3, False), samples, epochs,
                           substitutes=lambda row: [(11, 3)])  # fmt: skip
    for drawn, expected in zip(elsewhere.colors, views.sample_colors(np.array([11]), np.array([3])), strict=True):
        assert torch.equal(drawn[1], expected[0])


def test_rows_that_fill_up_and_rows_that_cannot_be_read_do_not_count() -> None:
    reader = broken(photographs(6), 1, 4)
    views = Views(CropSettings(), [8, 8], "bicubic")
    given = np.array([True, True, True, False, False])
    batch = make_batch(reader, views, np.array([0, 1, 2, 3, 4]), np.zeros(5, int), given)
    assert batch.valid.tolist() == [True, False, True, False, False]
    assert given.tolist() == [True, True, True, False, False]
    assert set(batch.unreadable) == {"im1", "im4"}
    assert not batch.views[0][[1, 4]].any()
    assert batch.views[0][3].any()
    repeated = make_batch(reader, views, np.array([1, 1, 2, 2]), np.zeros(4, int))
    assert repeated.valid.tolist() == [False, False, True, True]


def test_a_sample_of_two_epochs_is_seen_in_two_ways_and_its_neighbors_do_not_matter() -> None:
    reader, views = photographs(), Views(CropSettings(), [16, 16], "bicubic", seed=2)
    both = make_batch(reader, views, np.array([3, 3, 8]), np.array([0, 1, 1])).views[0]
    for row, (sample, epoch) in enumerate([(3, 0), (3, 1), (8, 1)]):
        alone = make_batch(reader, views, np.array([sample]), np.array([epoch])).views[0][0]
        assert torch.equal(both[row], alone)
    assert not torch.equal(both[0], both[1])


def test_the_place_of_a_micro_batch_is_that_of_its_rows_in_the_global_batch(tmp_path: Path) -> None:
    index = numbered_shards(tmp_path, 40)
    plan = EpochPlan(index.shard_samples, 12, 3)
    for rank in range(2):
        batches = TrainingBatches(ShardReader(index, 1), Views(CenterSettings(), [8, 8], "bilinear"), plan, rank, 3, 2)
        for number in range(6):
            step, part = divmod(number, 2)
            batch, first = batches[number], rank * 6 + part * 3
            expected, epochs = plan.batch(step)
            assert batch.first_row == first
            assert batch.samples.tolist() == expected[first : first + 3].tolist()
            assert batch.epochs.tolist() == epochs[first : first + 3].tolist()
            assert batch.labels.tolist() == index.labels_of(expected[first : first + 3]).tolist()


def test_the_resolution_depends_on_seed_and_step_and_each_is_as_likely() -> None:
    drawn = np.array(
        [[Resolutions([4, 8, 12, 16], None, seed).size_at(step)[0] for step in range(1000)] for seed in range(3)]
    )
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.12
    assert abs(np.corrcoef(drawn[0, 1:], drawn[0, :-1])[0, 1]) < 0.12
    for row in drawn:
        assert np.unique(row, return_counts=True)[1] / 1000 == pytest.approx(0.25, abs=0.05)
    assert Resolutions([8], None, 0).size_at(0) == [8, 8]


def test_evaluation_shows_the_chosen_samples_in_their_order_through_the_encoders_own_crop(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 30, 40)).astype(np.uint8)
    index = pack(array_samples(pixels, np.arange(11)), tmp_path, NAMES, workers=1)
    encoder = replace(GRAY, crop_fraction=0.6, interpolation="bilinear")
    for reader in (ShardReader(index, 1), ShardReader(index, 1, memory_limit_mb=0)):
        chosen = np.array([9, 2, 7, 0, 4])
        batches = list(evaluation_loader(reader, encoder, batch=3, subset=chosen))
        assert [batch.samples[batch.valid].tolist() for batch in batches] == [[9, 2, 7], [0, 4]]
        assert [len(batch) for batch in batches] == [3, 3]
        for batch in batches:
            assert batch.labels.tolist() == index.labels_of(batch.samples.numpy()).tolist()
            for view, sample in zip(batch.views[0], batch.samples.tolist(), strict=True):
                source = Image.fromarray(pixels[int(index.key(sample).split("/")[1].split(".")[0])])
                box = (20 - 9, 15 - 9, 20 + 9, 15 + 9)  # 0.6 of 30, in the middle
                expected = torch.from_numpy(np.array(source.resize((8, 8), Image.Resampling.BILINEAR, box=box)))
                assert (view[0].int() - expected.int()).abs().max() <= 1
        again = list(evaluation_loader(reader, encoder, batch=3, subset=chosen, seed=5, epoch=7))
        assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(batches, again, strict=True))


def test_random_views_of_evaluation_draw_from_seed_epoch_and_sample(tmp_path: Path) -> None:
    index = pack(array_samples(np.random.default_rng(0).integers(0, 256, (9, 16, 16)).astype(np.uint8)), tmp_path)
    reader = ShardReader(index, 1)

    def seen(**options) -> torch.Tensor:
        loader = evaluation_loader(reader, GRAY, batch=4, view=CropSettings(), **options)
        return torch.cat([batch.views[0][batch.valid] for batch in loader])

    first = seen(seed=1, epoch=2)
    views = Views(CropSettings(), [8, 8], "bicubic", 1)
    assert torch.equal(first, make_batch(reader, views, np.arange(9), np.full(9, 2)).views[0])
    assert not torch.equal(seen(seed=1, epoch=3), first)
    assert not torch.equal(seen(seed=2, epoch=2), first)
    assert torch.equal(seen(seed=1, epoch=2, subset=np.array([5, 3])), first[[5, 3]])


def test_another_fraction_takes_the_place_of_the_encoders_and_its_mode_stays() -> None:
    encoder = replace(GRAY, crop_fraction=0.7, crop_mode="squash")
    assert center_view(encoder) == CenterSettings(fraction=0.7, mode="squash")
    assert center_view(encoder, 0.9) == CenterSettings(fraction=0.9, mode="squash")
    assert center_view(GRAY) == CenterSettings(fraction=1.0, mode="center")


def test_one_images_view_is_the_one_that_evaluation_makes(tmp_path: Path) -> None:
    pixels = np.stack([np.array(photograph(150, 210, n)) for n in range(3)])
    index = pack(array_samples(pixels), tmp_path, workers=1)
    encoder = EncoderSettings(image_size=48, patch=16, crop_fraction=0.9)
    reader = ShardReader(index, memory_limit_mb=0)
    (batch,) = evaluation_loader(reader, encoder, batch=3)
    for view, sample in zip(batch.views[0], range(3), strict=True):
        assert torch.equal(view, view_of_image(reader.read(sample), encoder))
    normal = normalized_view(batch, encoder, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    torch.testing.assert_close(normal * std + mean, batch.views[0] / 255)


def test_the_data_module_hands_out_the_views_that_its_settings_name(tmp_path: Path) -> None:
    index = pack(array_samples(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)), tmp_path)
    encoder = EncoderSettings(image_size=12, patch=4, mean=[0.1, 0.5, 0.8], std=[0.5, 0.2, 0.3])
    settings = DataSettings(global_batch_size=4, view=MultiCropSettings(local_crops=1, local_size=8))
    plan = EpochPlan(index.shard_samples, 4, seed=9)
    module = ShardDataModule(index, settings, encoder, plan, RunPlan(3, 3, 4))
    batch = module.examples(5)
    expected = make_batch(
        ShardReader(index), Views(settings.view, [12, 12], "bicubic", 9), np.arange(5), np.zeros(5, int)
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    for view, pixels in zip(batch.views, expected.views, strict=True):
        torch.testing.assert_close(view, (pixels / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    module.views.color_here = False  # then changed here, to the same, but not rounded to bytes first
    for view, pixels in zip(module.examples(5).views, batch.views, strict=True):
        assert ((view - pixels) * std * 255).abs().max() < 0.51
    whole = module.whole_images(3, scale=2)
    assert whole.shape == (3, 3, 24, 24)
    assert len(module.examples(100)) == 12


def test_the_data_module_fills_what_moves_in_with_the_encoders_mean(tmp_path: Path) -> None:
    index = pack(array_samples(np.full((60, 16, 16, 3), 255, np.uint8)), tmp_path, workers=1)
    encoder = EncoderSettings(image_size=16, patch=4, mean=[0.2, 0.4, 0.6], std=[1.0, 1.0, 1.0])
    settings = DataSettings(global_batch_size=4, view=AugmentSettings(scale=[1.0, 1.0], operations=1, probability=1.0))
    plan = EpochPlan(index.shard_samples, 4, seed=1)
    batch = ShardDataModule(index, settings, encoder, plan, RunPlan(3, 15, 4)).examples(60)
    corners = batch.views[0][:, :, [0, 0, -1, -1], [0, -1, 0, -1]].abs().amax(1)  # 0: the mean itself
    assert 5 < int((corners < 0.5 / 255).any(1).sum()) < 40


def test_statistics_are_of_images_from_all_over_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard whose images grow brighter: dark ones come first, as sorted folders have them."""
    from sslvit.data import measure

    monkeypatch.setattr(measure, "STATISTICS_SAMPLES", 50)
    count = 240
    images = np.repeat(np.arange(count, dtype=np.uint8), 16).reshape(count, 4, 4)
    index = pack(array_samples(images), tmp_path, workers=1)
    assert index.mean[0] == pytest.approx(images.mean() / 255, abs=0.03)
    assert index.std[0] == pytest.approx(images.std() / 255, abs=0.03)


def test_statistics_are_means_over_pixels_of_numbers_from_zero_to_one(tmp_path: Path) -> None:
    images = (np.random.default_rng(0).random((30, 6, 10, 3)) ** [1, 2, 4] * 255).astype(np.uint8)
    index = pack(array_samples(images), tmp_path, workers=1)
    assert index.mean == pytest.approx((images / 255).mean((0, 1, 2)).tolist(), abs=1e-4)
    assert index.std == pytest.approx((images / 255).std((0, 1, 2)).tolist(), abs=1e-4)

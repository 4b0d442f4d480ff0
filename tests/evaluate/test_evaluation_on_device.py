"""Evaluation on a GPU: everything is computed there, in full float32 or in bf16 as asked, and the host rarely waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda_fixtures import GPU, Whereabouts, on_fake_cuda, take_fake_cuda
from PIL import Image
from run_fixtures import metrics, run
from shard_fixtures import labeled_shards

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.index import load_index
from sslvit.environment import pick_workers
from sslvit.evaluate import features as features_module
from sslvit.evaluate import health, knn, likelihood, linear, samples, sources
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.classify import accuracy
from sslvit.evaluate.dense import PatchMaps, segment
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.masks import MaskedImages
from sslvit.evaluate.probe import probe
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet, RawPixels, full_float32
from sslvit.models import ViTEncoder
from sslvit.models.igpt import IGPTModel
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, IGPTSettings, OptimSettings, ProbeSettings
from sslvit.settings.sample import SampleSettings
from sslvit.tasks.igpt import IGPT

pytestmark = pytest.mark.filterwarnings("ignore:.*device_type of 'cuda'.*", "ignore:.*no accelerator is found.*")
READOUTS = [(1, "class"), (2, "mean")]
BF16_ERROR = 0.013  # of features, relative: what the help of --precision states


def make(**changes: Any) -> ViTEncoder:
    torch.manual_seed(0)
    usual = {"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 2, "heads": 2}
    return ViTEncoder(EncoderSettings(**usual | changes)).eval()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Whereabouts]:
    take_fake_cuda(monkeypatch)
    with on_fake_cuda() as where:
        yield where


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.device]]:
    """Devices on which features are made, neighbors searched, heads fitted and spectra measured."""
    found: dict[str, set[torch.device]] = {}

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            values = next(value for value in args if isinstance(value, torch.Tensor))
            found.setdefault(name, set()).add(values.device)
            return call(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(knn, "nearest")
    watch(linear, "fit_logistic")
    for source in (FrozenEncoder, RawPixels):
        watch(source, "features_at")
    for name in ("rankme", "alpha_of_spectrum", "uniformity"):
        watch(health, name)
    return found


def test_online_scores_are_computed_on_the_modules_device(
    shards: Path, tmp_path: Path, fake_cuda: Whereabouts, devices: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslvit.train.run._finish", lambda *_: None)  # pictures take longer than all the rest
    online = {"online.train": str(shards / "train"), "online.val": str(shards / "val"), "online.images": 9}
    folder = run(shards / "train", tmp_path / "run", recipe="mae/digits", **online, **{"train.steps": 1})
    assert {"probe/knn", "probe/linear", "probe/rankme", "probe/alignment"} <= metrics(folder)[-1].keys()
    assert devices.keys() == {"nearest", "fit_logistic", "features_at", "rankme", "alpha_of_spectrum", "uniformity"}
    on_cpu = {torch.device("cpu")}  # where the health check takes a spectrum
    assert set.union(*devices.values()) - on_cpu == {GPU}
    assert {name for name, of in devices.items() if of & on_cpu} == {"rankme", "alpha_of_spectrum", "uniformity"}


def test_a_probe_computes_on_its_device_also_few_labels_and_raw_pixels(
    shards: Path, fake_cuda: Whereabouts, devices: dict
) -> None:
    settings = ProbeSettings(
        str(shards / "train"),
        str(shards / "val"),
        neighbors=[3],
        labels_per_class=4,
        draws=1,
        device="cuda",
        cache=None,
    )
    rows = probe({"mine": make()}, settings).rows
    assert set(rows) == {"raw pixels", "untrained encoder", "mine"}
    assert all({"linear, all labels", "linear, 4 per class", "kNN, k = 3"} == set(row) for row in rows.values())
    assert devices.keys() == {"nearest", "fit_logistic", "features_at"}
    assert set.union(*devices.values()) == {GPU}


def test_a_pass_waits_for_no_batch(shards: Path, fake_cuda: Whereabouts) -> None:
    data = LabeledSet(load_index(shards / "val"), 1)
    source = FrozenEncoder(make().to(GPU))
    on_cpu = FeatureExtractor(4).run(
        FrozenEncoder(make()), data, READOUTS, features_module.center_view(source.settings)
    )
    fake_cuda.waits.clear()
    found = FeatureExtractor(4).run(source, data, READOUTS, features_module.center_view(source.settings))
    assert fake_cuda.waits.total() == 1  # mean and standard deviation go to the device once
    fake_cuda.waits.clear()
    FeatureExtractor(4).run(source, data, READOUTS, features_module.center_view(source.settings))
    assert not fake_cuda.waits
    assert all(torch.equal(found.columns[one], on_cpu.columns[one]) for one in READOUTS)
    assert torch.equal(found.samples, torch.arange(21))


def test_a_pass_on_a_cpu_takes_a_batch_in_pieces_and_on_a_gpu_at_once(
    shards: Path, fake_cuda: Whereabouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sizes, features_at = LabeledSet(load_index(shards / "val"), 1), [], FrozenEncoder.features_at

    def record(source: FrozenEncoder, images: torch.Tensor, readouts: list) -> list[torch.Tensor]:
        sizes.append(len(images))
        return features_at(source, images, readouts)

    kept = []
    monkeypatch.setattr(sources, "keep_freed_memory", lambda: kept.append("memory"))

    def columns_of(device: str) -> dict:
        sizes.clear()
        kept.clear()
        source = FrozenEncoder(make().to(device))
        return FeatureExtractor(10).run(source, data, READOUTS, features_module.center_view(source.settings)).columns

    monkeypatch.setattr(FrozenEncoder, "features_at", record)
    whole = columns_of("cpu")
    assert sizes == [7, 7, 7]
    monkeypatch.setattr(sources, "CPU_ACTIVATION", 3 * 4 * 64 + 1)  # 2 x 2 patches, and an MLP of width 64
    in_pieces = columns_of("cpu")
    assert sizes == [3, 3, 1] * 3
    assert kept
    for readout in READOUTS:
        torch.testing.assert_close(in_pieces[readout], whole[readout])
    columns_of(GPU)
    assert sizes == [7, 7, 7]
    assert not kept


def test_one_image_is_never_too_large_for_a_pass() -> None:
    source = FrozenEncoder(make(width=64, patch=1, image_size=256))
    assert source.largest_activation(256, 512) == 256 * 512 * 256 > sources.CPU_ACTIVATION
    assert [len(one) for one in sources.in_pieces(torch.empty(3, 1, 2, 2), 2**30)] == [1, 1, 1]
    assert RawPixels(source.settings).largest_activation(224, 224) == 64 * 112 * 112


def test_pieces_of_a_batch_give_its_accuracy_maps_and_likelihood(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, encoder, sizes = LabeledSet(load_index(shards / "val"), 1), make(), []
    model = IGPTModel(IGPTSettings(), make(tokens="pixel", patch=1, causal=True, class_token=False, pooling="mean",
                                           palette=[[0.0], [0.5], [1.0]]).settings)  # fmt: skip
    colors = torch.randint(3, (7, 64), generator=torch.Generator().manual_seed(0))
    images = torch.randint(256, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    maps = PatchMaps(encoder, encoder.settings, 7, "cpu")

    def logits(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return encoder.features(images)[:, :3]

    def found() -> list:
        with torch.no_grad():
            return [accuracy(logits, data, encoder.settings, torch.device("cpu"), 21), maps.features_of(images),
                    likelihood.model_nats(model, colors, 5)]  # fmt: skip

    whole = found()
    monkeypatch.setattr(sources, "CPU_ACTIVATION", 8 * 4 * 64)
    in_pieces = found()
    assert sizes == [21, 8, 8, 5]
    assert in_pieces[0] == whole[0]
    torch.testing.assert_close(in_pieces[1], whole[1])
    assert in_pieces[2] == pytest.approx(whole[2], rel=1e-6)


def test_each_batch_is_read_once_the_next_one_is_under_way() -> None:
    made = []
    behind = features_module.one_behind(made.append(i) or i for i in range(3))
    assert [(i, len(made)) for i in behind] == [(0, 2), (1, 3), (2, 3)]
    assert list(features_module.one_behind([])) == []


def test_a_classifier_is_counted_on_its_device_and_the_host_asks_at_the_end(
    shards: Path, fake_cuda: Whereabouts
) -> None:
    waits = []
    for batch in (21, 3, 21):  # the first sends mean and standard deviation to the device
        data, encoder = LabeledSet(load_index(shards / "val"), 1), make(width=16).to(GPU)
        fake_cuda.waits.clear()
        found = accuracy(lambda images, of=encoder: of.features(images)[:, :3], data, encoder.settings, GPU, batch)
        waits.append(fake_cuda.waits.total())
        assert found.images == 21
    assert waits[1] == waits[2]


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32() -> Iterator[None]:
    """A process in which float32 may be computed in TF32, as in one that trains in bf16 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


def test_float32_is_float32_also_where_training_takes_tf32(
    shards: Path, tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch, (ViTEncoder, "intermediates"), (knn, "nearest"), (linear, "fit_logistic"))
    settings = ProbeSettings(str(shards / "train"), str(shards / "val"), neighbors=[3], cache=None)
    probe({"mine": make()}, settings)
    assert set(seen) == {"intermediates", "nearest", "fit_logistic"}
    assert all(set(states) == {("highest", False)} for states in seen.values())
    with pytest.raises(ValueError, match="broken"), full_float32():
        raise ValueError("broken")  # and the fixture sees that TF32 is allowed again


def test_pixel_models_are_sampled_and_scored_in_float32(
    shards: Path, tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pixel_model()
    seen = watch(monkeypatch, (samples, "complete"), (likelihood, "model_nats"))
    samples.sample_images(model, 2, SampleSettings())
    samples.complete_images(model, str(shards / "val"), 1, 0.5, 1, SampleSettings())
    likelihood.likelihood(model, *(LabeledSet(load_index(shards / name), 1) for name in ("train", "val")))
    assert seen == {"complete": [("highest", False)] * 2, "model_nats": [("highest", False)]}


def pixel_model() -> IGPTModel:
    encoder = EncoderSettings(
        image_size=8, channels=1, mean=[0.5], std=[0.5], tokens="pixel", patch=1, width=16, depth=1, heads=2,
        causal=True, class_token=False, prefix_positions="none", pooling="mean", palette=[[-1.0], [0.0], [1.0]],
    )  # fmt: skip
    return IGPT(IGPTSettings(), encoder, OptimSettings(), RunPlan(1, 1, 8)).model


def watch(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> dict[str, list[tuple[str, bool]]]:
    """Record the precision of float32 at each call of functions of modules or classes."""
    seen: dict[str, list[tuple[str, bool]]] = {}

    def wrap(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            state = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            seen.setdefault(name, []).append(state)
            return call(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in places:
        wrap(owner, name)
    return seen


@pytest.mark.parametrize("pos_embed", ["sincos_2d", "rotary_2d", "rotary_2d_normalized"])
def test_features_in_bf16_are_as_near_to_float32_as_is_stated(pos_embed: str) -> None:
    encoder = make(image_size=32, channels=3, patch=8, width=96, depth=12, heads=3, pos_embed=pos_embed)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    readouts = [(12, "class"), (12, "mean"), (6, "mean")]
    with torch.no_grad():
        exact, rough = (FrozenEncoder(encoder, of).features_at(images, readouts) for of in ("float32", "bf16"))
        again = encoder.features(images)
    assert torch.equal(exact[0], again)  # float32 is what the encoder itself computes
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32
        error = (other - one).norm(dim=1) / one.norm(dim=1)
        assert 1e-4 < error.max() < BF16_ERROR


def test_the_cache_keeps_precisions_apart(shards: Path) -> None:
    cache, data = FeatureCache(shards / "cache"), LabeledSet(load_index(shards / "val"), 1)

    def features(precision: str) -> torch.Tensor:
        return (
            FeatureExtractor(cache=cache).features(FrozenEncoder(make(), precision), data, READOUTS).at(READOUTS).values
        )

    first = {precision: features(precision) for precision in ("float32", "bf16")}
    assert not torch.equal(first["float32"], first["bf16"])
    for precision, values in first.items():
        assert torch.equal(features(precision), values)
    assert len(list(cache.folder.iterdir())) == 2
    pixels = RawPixels(make().settings)
    assert pixels.precision == "float32"


def test_the_precision_of_features_is_said_beside_the_scores(shards: Path, capsys: pytest.CaptureFixture) -> None:
    save_encoder(make(), shards / "encoder")
    words = ["knn", str(shards / "encoder"), "--train", str(shards / "train"), "--val", str(shards / "val"),
             "--neighbors", "3", "--cache", "none"]  # fmt: skip
    assert main(words) == 0
    assert "features computed in" not in capsys.readouterr().out
    assert main([*words, "--precision", "bf16"]) == 0
    assert "; features computed in bf16\n" in capsys.readouterr().out
    assert main([*words, "--precision", "bf17"]) == 1
    assert "--precision: 'bf17' is not one of float32, bf16" in capsys.readouterr().err


# ---- processes that load -------------------------------------------------------------------------------------------


def test_a_gpu_has_loader_processes_and_a_cpu_has_none_unless_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = 16
    monkeypatch.setattr("sslvit.environment.cpu_cores", lambda: cores)
    assert [pick_workers(None, device) for device in ("cpu", "cuda")] == [0, 15]
    assert [pick_workers(3, device) for device in ("cpu", "cuda")] == [3, 3]
    assert pick_workers(0, "cuda") == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes share the cores
    assert pick_workers(None, "cuda") == 3
    cores = 96
    assert pick_workers(None, "cuda") == 16
    cores = 2
    assert pick_workers(None, "cuda") == 1


def test_images_in_memory_are_loaded_by_no_other_process(shards: Path) -> None:
    index = load_index(shards / "val")
    assert LabeledSet(index, 1).workers(4) == 0
    assert LabeledSet(index, 1, memory_limit_mb=0).workers(4) == 4


@pytest.mark.slow
def test_segmentation_is_the_same_with_loader_processes(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(6):
        mask = source.integers(0, 2, (8, 8), np.uint8)
        Image.fromarray(mask * 100 + source.integers(0, 90, (8, 8), np.uint8)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    data = MaskedImages.open(tmp_path)
    one, other = (segment({"mine": make()}, data, data, 4, device="cpu", workers=workers) for workers in (0, 2))
    assert one.scores == other.scores
    assert (one.predictions["mine"] == other.predictions["mine"]).all()

"""Nats per pixel: the counts against hand-made and known processes, the model against its own loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_fixtures import image_folder

import sslvit
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.folders import folder_source
from sslvit.data.index import load_index
from sslvit.data.pack import pack
from sslvit.evaluate import likelihood as module
from sslvit.evaluate.likelihood import NGramTable, count_ngrams, likelihood, model_nats, palette_images
from sslvit.evaluate.sources import LabeledSet
from sslvit.models.igpt import IGPTModel, pixel_nll
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, IGPTSettings, OptimSettings
from sslvit.tasks.igpt import IGPT


def noise(count: int, colors: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, colors, (count, 6, 5)).astype(np.int16)


def tune_smoothing(images: np.ndarray, colors: int) -> tuple[float, float, float]:
    return count_ngrams([images], colors)[1]


def ngram_nats(train: np.ndarray, val: np.ndarray, colors: int) -> float:
    table, smoothing = count_ngrams([train], colors)
    return table.nats(val, [smoothing])[0]


def test_probabilities_of_all_colors_sum_to_one_in_any_context() -> None:
    table = NGramTable(noise(4, 5) // 2, 5)  # colors 3 and 4 never occur
    for left in range(6):
        for upper in range(6):
            context = np.full(5, left), np.full(5, upper)
            found = [table.by_left.look_up(context[0], np.arange(5)), table.by_upper.look_up(context[1], np.arange(5))]
            mixed = 0.3 * found[0].probs(0.7, table.unigram) + 0.7 * found[1].probs(0.7, table.unigram)
            both = table.by_both.look_up(context[0] * 6 + context[1], np.arange(5)).probs(0.8, mixed)
            assert both.sum() == pytest.approx(1)
            assert (both > 0).all()


def test_discounting_by_hand() -> None:
    # one image of 1 x 4: the left neighbors of 0, 0, 1, 0 are edge, 0, 0, 1; above all of them is the edge
    table = NGramTable(np.array([[[0, 0, 1, 0]]], dtype=np.int16), 2)
    assert table.unigram.tolist() == [4 / 6, 2 / 6]
    after_zero = table.by_left.look_up(np.array([0, 0]), np.array([0, 1])).probs(0.5, table.unigram)
    np.testing.assert_allclose(after_zero, [0.5 / 2 + 0.5 * 2 / 2 * 4 / 6, 0.5 / 2 + 0.5 * 2 / 2 * 2 / 6])
    unknown = table.by_upper.look_up(np.array([1]), np.array([1])).probs(0.5, table.unigram[1:])
    assert unknown.tolist() == [2 / 6]


def test_neighbors_predict_what_depends_on_them_and_nothing_else() -> None:
    rows = np.repeat(noise(300, 4)[:, :, :1], 5, axis=2)  # each pixel is its left neighbor
    assert ngram_nats(rows[:200], rows[200:], 4) == pytest.approx(math.log(4) / 5, rel=0.03)
    columns = np.repeat(noise(300, 4)[:, :1], 6, axis=1)  # each pixel is its upper neighbor
    assert ngram_nats(columns[:200], columns[200:], 4) == pytest.approx(math.log(4) / 6, rel=0.03)
    pure = noise(3000, 4)
    assert ngram_nats(pure[:2000], pure[2000:], 4) == pytest.approx(math.log(4), rel=0.01)


def test_the_upper_right_neighbor_is_not_looked_at() -> None:
    images = noise(400, 4)
    images[:, 1:, :-1] = images[:, :-1, 1:]  # each pixel is its upper right neighbor
    assert ngram_nats(images[:300], images[300:], 4) > 0.95 * math.log(4)


def test_smoothing_is_tuned_on_images_that_were_not_counted() -> None:
    # noise in few images: pairs that were counted say nothing, so nearly all must be taken off them; on images that
    # were counted too, taking off nothing would look best
    assert tune_smoothing(noise(40, 12), 12)[1] == 0.9
    copies = np.tile(noise(1, 12), (40, 1, 1))  # all alike: what was counted says all
    assert tune_smoothing(copies, 12)[1] == 0.1
    rows = np.repeat(noise(300, 4)[:, :, :1], 5, axis=2)  # the left neighbor says all, the upper one nothing
    assert tune_smoothing(rows, 4)[2] == 0.7


def test_the_final_table_counts_all_training_images() -> None:
    train, val = noise(40, 4), noise(10, 4, seed=1)
    expected = NGramTable(train, 4).nats(val, [tune_smoothing(train, 4)])[0]
    assert ngram_nats(train, val, 4) == expected


def test_single_colors_by_how_often_they_are() -> None:
    train = np.zeros((1, 2, 50), np.int16)
    train[0, 0, :25] = 1
    shares = np.array([76, 26]) / 102
    val = np.array([[[0, 1]]], np.int16)
    assert -np.log(NGramTable(train, 2).unigram[val]).mean() == pytest.approx(-np.log(shares).mean())


def counted_by_hand(train: np.ndarray, val: np.ndarray, colors: int, single: float, both: float, left: float) -> float:
    """Nats per pixel of `val` by the neighbors' table, pixel by pixel."""
    occurred: dict[tuple, int] = {}
    frequency = [1] * colors  # one added to each

    def readouts(images: np.ndarray):
        for image in images:
            for row in range(image.shape[0]):
                for column in range(image.shape[1]):
                    before = int(image[row, column - 1]) if column else "edge"
                    above = int(image[row - 1, column]) if row else "edge"
                    yield ("left", before), ("upper", above), ("both", before, above), int(image[row, column])

    for *contexts, color in readouts(train):
        frequency[color] += 1
        for context in contexts:
            occurred[*context, color] = occurred.get((*context, color), 0) + 1

    def discounted(context: tuple, color: int, discount: float, lower: float) -> float:
        counts = [occurred.get((*context, other), 0) for other in range(colors)]
        if not sum(counts):
            return lower
        taken = discount * sum(count > 0 for count in counts)
        return (max(counts[color] - discount, 0) + taken * lower) / sum(counts)

    total, number = 0.0, 0
    for before, above, pair, color in readouts(val):
        alone = frequency[color] / sum(frequency)
        mixed = left * discounted(before, color, single, alone)
        mixed += (1 - left) * discounted(above, color, single, alone)
        total -= math.log(discounted(pair, color, both, mixed))
        number += 1
    return total / number


def test_the_table_of_neighbors_is_what_counting_pixel_by_pixel_gives() -> None:
    train, val = noise(3, 4), noise(2, 5, seed=1).clip(0, 4)
    train[0, 2:] = 1
    trials = [(0.5, 0.7, 0.3), (0.1, 0.9, 0.7), (0.9, 0.1, 0.5)]
    expected = [counted_by_hand(train, val, 5, *trial) for trial in trials]
    assert NGramTable(train, 5).nats(val, trials) == pytest.approx(expected, rel=1e-12)


def test_the_smoothing_is_the_best_of_all_on_every_tenth_image() -> None:
    images = noise(12, 3)
    images[:, :, 1:][:, ::2] = images[:, :, :-1][:, ::2]  # the left neighbor says something
    found = tune_smoothing(images, 3)
    counted, held = np.delete(images, [0, 10], axis=0), images[[0, 10]]
    trials = [
        (single, both, left) for single in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9) for both in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
        for left in (0.3, 0.4, 0.5, 0.6, 0.7)
    ]  # fmt: skip
    nats = [counted_by_hand(counted, held, 3, *trial) for trial in trials]
    assert found == trials[int(np.argmin(nats))]


@pytest.fixture
def model() -> IGPTModel:
    encoder = EncoderSettings(
        image_size=6, channels=1, mean=[0.5], std=[0.5], tokens="pixel", patch=1, width=16, depth=1, heads=2,
        class_token=False, prefix_positions="none", pooling="mean", causal=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = IGPTModel(IGPTSettings(), encoder)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@torch.no_grad()
def test_the_models_nats_are_its_loss_whatever_the_batch(model: IGPTModel) -> None:
    colors = torch.randint(0, 8, (7, 36))
    images = model.encoder.patch_embed.images_of(colors, (6, 6))
    loss = float(pixel_nll(model.head(model.encoder(images)), colors))
    assert model_nats(model, colors, 3) == pytest.approx(loss, rel=1e-6)
    assert model_nats(model, colors, 7) == pytest.approx(loss, rel=1e-6)


@torch.no_grad()
def by_model(model: IGPTModel, scored: np.ndarray) -> float:
    """Minus the mean logarithm of each pixel's probability, one pixel after the other, from those before it."""
    total = 0.0
    for image in torch.from_numpy(scored).flatten(1):
        for position in range(len(image)):
            told = image.clone()
            told[position:] = 0  # nothing that the model must not see
            pixels = (told.view(1, 1, 6, 6) * 32 + 15.5) / 127.5 - 1  # the middles of the boxes in [-1, 1]
            logits = model.head(model.encoder(pixels))[0, position].double()
            total -= float(logits.log_softmax(0)[image[position]])
    return total / scored.size


def in_palette(model: IGPTModel, data: LabeledSet) -> np.ndarray:
    return np.concatenate(list(palette_images(model, data, "reading")))


def test_a_large_data_set_is_counted_and_scored_a_few_images_at_a_time(
    model: IGPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("train", 40), ("val", 11)):
        pack(
            array_samples(np.random.default_rng(count).integers(0, 256, (count, 6, 6)).astype(np.uint8)),
            tmp_path / name,
        )
    train, val = (LabeledSet(load_index(tmp_path / name), 1) for name in ("train", "val"))
    whole, sizes = likelihood(model, train, val), {"counted": set(), "scored": set()}
    contexts, scored = NGramTable.contexts_of, module.model_nats

    def count(self: NGramTable, images: np.ndarray) -> tuple:
        sizes["counted"].add(len(images))
        return contexts(self, images)

    def score(model: IGPTModel, colors: torch.Tensor, batch: int) -> float:
        sizes["scored"].add(len(colors))
        return scored(model, colors, batch)

    monkeypatch.setattr(NGramTable, "contexts_of", count)
    monkeypatch.setattr(module, "model_nats", score)
    monkeypatch.setattr(module, "MAX_COUNTED_PIXELS", 7 * 36, raising=False)
    monkeypatch.setattr(module, "MAX_SCORED", 5, raising=False)
    found = likelihood(model, train, val, batch=2)
    for row, nats in whole.items():
        assert found[row] == pytest.approx(nats, rel=1e-6)
    # four images are held out of 40 to tune the smoothing; of 11 images in groups of whole batches, three remain
    assert max(sizes["counted"]) <= 7
    assert sizes["scored"] == {4, 3}


def test_unreadable_images_are_left_out(model: IGPTModel, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", count=3)
    found = folder_source(folder)
    index = pack(found.samples, tmp_path / "shards", found.classes)
    path = tmp_path / "shards" / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"IHDR", b"XXXX", 1))
    assert in_palette(model, LabeledSet(index, 1, max_unreadable_fraction=0.2)).shape == (5, 6, 6)
    with pytest.raises(ValueError, match="1 of 6 images cannot be read"):
        in_palette(model, LabeledSet(index, 1))


def test_a_warning_says_that_scored_images_are_counted_too(
    model: IGPTModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grays = np.random.default_rng(0).integers(0, 256, (24, 6, 6)).astype(np.uint8)
    for name, part in (("train", grays[:16]), ("val", grays[16:]), ("both", grays)):
        pack(array_samples(part), tmp_path / name)
    said = {}
    for name in ("train", "val", "both"):
        sslvit.likelihood(model, tmp_path / "train", tmp_path / name, device="cpu")
        said[name] = capsys.readouterr().out
    assert "the same images, so these scores say nothing of others" in said["train"]
    assert "warning" not in said["val"]
    assert "16 of 24 images to be scored that were compared are in both" in said["both"]


def test_a_model_that_sees_the_pixels_that_it_predicts_has_no_likelihood(tmp_path: Path) -> None:
    encoder = EncoderSettings(
        image_size=6, channels=1, mean=[0.5], std=[0.5], tokens="pixel", patch=1, width=16, depth=1, heads=2,
        class_token=False, prefix_positions="none", pooling="mean", mask_token=True,
    )  # fmt: skip
    model = IGPTModel(IGPTSettings(objective="bert"), encoder)
    with pytest.raises(ValueError, match="attends both ways"):
        sslvit.likelihood(model, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="attends both ways"):
        sslvit.sample(model)


def test_arguments_from_python_are_checked_as_those_of_the_commands_are(model: IGPTModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device.*gpu"):
        sslvit.likelihood(model, tmp_path, tmp_path, device="gpu")
    with pytest.raises(ValueError, match="device.*gpu"):
        sslvit.sample(model, device="gpu")
    with pytest.raises(ValueError, match=r"max_unreadable_fraction=1.*: must be in \[0, 1\)"):
        sslvit.likelihood(model, tmp_path, tmp_path, max_unreadable_fraction=1.0)


def test_the_table_and_its_command(model: IGPTModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, grays = np.random.default_rng(0), {}
    for name, count, most in (("train", 40, 64), ("val", 10, 96)):
        grays[name] = source.integers(0, most, (count, 6, 6)).astype(np.uint8)
        pack(array_samples(grays[name]), tmp_path / name)
    train, val = (LabeledSet(load_index(tmp_path / name), 1) for name in ("train", "val"))
    rows = likelihood(model, train, val)
    names = ["uniform over 8 colors", "unigram", "n-gram of left and upper neighbor", "iGPT"]
    assert list(rows) == names
    assert rows[names[0]] == {"nats per pixel": math.log(8), "bits per pixel": 3.0}
    counted, scored = in_palette(model, train), in_palette(model, val)
    for name, found in (("train", counted), ("val", scored)):  # packing shuffles
        boxes = grays[name] // 32  # eight equal ones
        assert sorted(found.reshape(-1, 36).tolist()) == sorted(boxes.reshape(-1, 36).tolist())
    often = (np.bincount(counted.ravel(), minlength=8) + 1) / (counted.size + 8)
    smoothing = tune_smoothing(counted, 8)
    neighbors = counted_by_hand(counted, scored, 8, *smoothing)
    expected = [math.log(8), -np.log(often[scored]).mean(), neighbors, by_model(model, scored)]
    assert [row["nats per pixel"] for row in rows.values()] == pytest.approx(expected, rel=1e-5)
    assert [row["bits per pixel"] for row in rows.values()] == pytest.approx(np.array(expected) / math.log(2), rel=1e-5)
    in_pieces = likelihood(model, train, val, batch=3)  # of 10 images, so the last piece is a smaller one
    assert [row["nats per pixel"] for row in in_pieces.values()] == pytest.approx(expected, rel=1e-5)
    assert expected[1] > 2 * math.log(2)  # a third of the pixels has a gray that is not in the training images
    task = IGPT(IGPTSettings(), model.encoder.settings, OptimSettings(), RunPlan(1, 1, 8))
    task.model.load_state_dict(model.state_dict())
    saved: dict = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(saved)
    torch.save(saved, tmp_path / "igpt.ckpt")
    words = ["likelihood", str(tmp_path / "igpt.ckpt"), "--train", str(tmp_path / "train"), "--val",
             str(tmp_path / "val"), "-o", str(tmp_path / "n.json")]  # fmt: skip
    assert main(words) == 0
    written = json.loads((tmp_path / "n.json").read_text())
    assert written["rows"] == rows
    assert (written["about"]["data"], written["about"]["images"]) == (val.index.location, val.images)
    assert "2.0794" in capsys.readouterr().out
    assert main(words) == 1
    assert "n.json: already exists" in capsys.readouterr().err

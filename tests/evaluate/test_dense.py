"""Linear segmentation on patch tokens: what is counted, what is learned, what is refused."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.evaluate import dense
from sslvit.evaluate.dense import measures, segment
from sslvit.evaluate.linear import L2_GRID
from sslvit.evaluate.masks import IGNORED, MaskedImages
from sslvit.models import ViTEncoder
from sslvit.reports.show import mask_colors
from sslvit.settings import EncoderSettings


def make() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2)).eval()


def write(folder: Path, count: int, seed: int, classes: tuple[int, int] = (0, 7)) -> Path:
    """A bright square on a dark ground; the mask says which is which, and its border is without a label."""
    source = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(count):
        image, mask = source.integers(0, 90, (16, 16, 3)), np.full((16, 16), classes[0])
        top, left = source.integers(0, 8, 2)
        image[top : top + 8, left : left + 8] += 150
        mask[top : top + 8, left : left + 8] = classes[1]
        mask[:, 0] = 255
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{i:02d}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{i:02d}.png")
    return folder


def test_mean_iou_by_hand() -> None:
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])  # the third class does not occur
    found = measures(confusion, np.array([0, 5, 9]))
    assert found["class 0"] == pytest.approx(100 * 3 / 6)
    assert found["class 5"] == pytest.approx(100 * 4 / 7)
    assert found["mean IoU"] == pytest.approx((50 + 400 / 7) / 2)
    assert found["pixel accuracy"] == pytest.approx(70)
    assert "class 9" not in found


def test_a_class_that_is_guessed_and_does_not_occur_counts_as_zero_and_one_that_is_neither_does_not() -> None:
    confusion = torch.tensor([[2, 0, 1, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = measures(confusion, np.array([0, 5, 9, 11]))
    assert found["mean IoU"] == pytest.approx((200 / 3 + 100 + 0) / 3)
    assert found["class 9"] == 0
    assert "class 11" not in found
    assert found["pixel accuracy"] == pytest.approx(100 * 5 / 6)


def test_masks_of_another_size_keep_their_numbers(tmp_path: Path) -> None:
    data = MaskedImages.open(write(tmp_path / "set", 1, 0, (3, 200)))
    for side in (8, 12, 40):
        settings = EncoderSettings(image_size=side, patch=4, width=16, depth=1, heads=2)
        image, mask = data.read(0, settings)
        assert image.shape == (3, side, side)
        assert mask.shape == (side, side)
        assert set(np.unique(mask)) <= {3, 200, 255}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("is_palette", [True, False])
def test_class_numbers_are_those_of_the_file_however_many_bits_a_pixel_has(
    tmp_path: Path, bits: int, is_palette: bool
) -> None:
    folder = write(tmp_path / "set", 1, 0)
    numbers = np.arange(16 * 16).reshape(16, 16) % 2**bits
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in (numbers[..., None] >> np.arange(bits)[::-1]) & 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, 3 if is_palette else 0, 0, 0, 0))]
    chunks += [(b"PLTE", bytes(3 * 2**bits))] * is_palette + [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    with open(folder / "masks" / "00.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in chunks:
            file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))
    settings = EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2)
    _, mask = MaskedImages.open(folder).read(0, settings)
    assert np.array_equal(mask, numbers)


def test_the_strength_is_chosen_on_images_that_the_trials_were_not_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    fit = dense.fit_logistic
    monkeypatch.setattr(dense, "fit_logistic", lambda *given: fits.append(given) or fit(*given))
    held, counts = torch.arange(40) % 5 == 0, torch.rand(40) + 0.5
    dense.fit_head(torch.randn(40, 6), torch.eye(2)[torch.arange(40) % 2], counts, held)
    trials, final = (given[4] for given in fits)
    assert len(trials) == len(L2_GRID)
    for weight in trials:
        torch.testing.assert_close(weight, torch.where(held, 0, counts).double())
    torch.testing.assert_close(final[0], counts.double())


def test_the_mean_is_over_the_data_set_not_over_images(tmp_path: Path) -> None:
    train, val = (MaskedImages.open(write(tmp_path / name, n, i)) for i, (name, n) in enumerate([("t", 12), ("v", 6)]))
    one, other = (segment({"e": make()}, train, val, batch) for batch in (1, 5))
    for name, value in one.scores["e"].items():
        assert other.scores["e"][name] == pytest.approx(value, abs=1e-6)


def test_the_command_learns_an_easy_task_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, val = write(tmp_path / "train", 24, 0), write(tmp_path / "val", 8, 1)
    save_encoder(make(), tmp_path / "encoder")
    words = ["segment", str(tmp_path / "encoder"), "--train", str(train), "--val", str(val)]
    words += ["--figure", str(tmp_path / "guesses.png"), "-o", str(tmp_path / "scores.json")]
    assert main(words) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert list(rows) == ["raw pixels", "untrained encoder", "encoder"]
    assert rows["raw pixels"]["mean IoU"][0] > 60
    assert rows["encoder"]["mean IoU"][0] > 60  # all ground would be 37
    assert "mean IoU" in said
    with Image.open(tmp_path / "guesses.png") as picture:
        assert picture.size[0] > 300
    assert main(words) == 1
    assert "already exists" in capsys.readouterr().err


def test_images_that_are_both_fitted_on_and_scored_are_refused_or_said(tmp_path: Path, capsys) -> None:
    train, val = write(tmp_path / "train", 12, 0), write(tmp_path / "val", 12, 0)  # of one seed
    save_encoder(make(), tmp_path / "encoder")
    words = ["segment", str(tmp_path / "encoder"), "--train", str(train), "--val", str(val), "--no-baselines"]
    assert main(words) == 1
    assert "val: the same images. Scores of" in capsys.readouterr().err
    assert main([*words, "--allow-same-data"]) == 0
    assert "these scores say nothing of others" in capsys.readouterr().out.splitlines()[-1]
    (val / "images" / "00.png").write_bytes((val / "images" / "01.png").read_bytes())
    (val / "images" / "02.png").unlink()
    assert main(words) == 0
    assert "val: 11 of 11 images to be scored that were compared are in both" in capsys.readouterr().out


def test_reported_masks_choose_nothing(tmp_path: Path) -> None:
    train, val = (MaskedImages.open(write(tmp_path / name, n, i)) for i, (name, n) in enumerate([("t", 12), ("v", 4)]))
    table = segment({"e": make()}, train, val)
    for file in val.masks:
        mask = np.array(Image.open(file))
        Image.fromarray(np.where(mask == 255, 255, 7 - mask).astype(np.uint8)).save(file)  # the classes exchanged
    other = segment({"e": make()}, train, val)
    assert np.array_equal(table.predictions["e"], other.predictions["e"])
    accuracies = [one.scores["e"]["pixel accuracy"][0] for one in (table, other)]
    assert sum(accuracies) == pytest.approx(100)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="images: no such folder. Put NAME.jpg in images/"):
        MaskedImages.open(tmp_path)
    train = write(tmp_path / "train", 3, 0)
    (train / "masks" / "01.png").unlink()
    with pytest.raises(ValueError, match="1 masks are missing, the first: 01.png"):
        MaskedImages.open(train)
    good, other = write(tmp_path / "good", 3, 0), write(tmp_path / "other", 3, 0, (0, 9))
    with pytest.raises(
        ValueError, match="class 9 is in no training mask, as the encoder sees them. Add .* label its pixels 255"
    ):
        segment({"e": make()}, MaskedImages.open(good), MaskedImages.open(other))
    flat = write(tmp_path / "flat", 3, 0, (0, 0))
    with pytest.raises(ValueError, match="its masks hold 1 classes"):
        segment({"e": make()}, MaskedImages.open(flat), MaskedImages.open(good))
    one = write(tmp_path / "one", 1, 0)
    with pytest.raises(ValueError, match="one: 1 of 1 images have labeled pixels in the encoder.s view. Two or more"):
        segment({"e": make()}, MaskedImages.open(one), MaskedImages.open(good))
    for mask in (flat / "masks").iterdir():
        Image.new("L", (16, 16), 255).save(mask)
    with pytest.raises(ValueError, match="flat: its masks label no pixel"):
        segment({"e": make()}, MaskedImages.open(good), MaskedImages.open(flat))
    Image.new("RGB", (16, 16)).save(good / "masks" / "00.png")
    with pytest.raises(ValueError, match=r"00.png: a mask of mode RGB. Expected one number per pixel"):
        segment({"e": make()}, MaskedImages.open(good), MaskedImages.open(good))
    Image.new("L", (8, 8)).save(good / "masks" / "00.png")
    with pytest.raises(ValueError, match=r"00.png: \(8, 8\) pixels, but its image has \(16, 16\)"):
        segment({"e": make()}, MaskedImages.open(good), MaskedImages.open(good))
    (good / "masks" / "00.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"masks.00.png: unreadable"):
        segment({"e": make()}, MaskedImages.open(good), MaskedImages.open(good))


def test_masks_without_an_image_are_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "set", 3, 0)
    (folder / "images" / "01.png").rename(folder / "images" / "01.tif")
    assert len(MaskedImages.open(folder)) == 2
    assert "masks: 1 masks have no image in images/" in (said := "".join(capsys.readouterr()))
    assert "and are left out, the first: 01.png" in said


@pytest.mark.parametrize("is_upright", [True, False])
def test_a_photograph_is_turned_as_its_mask_was_drawn(tmp_path: Path, is_upright: bool) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 250
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    mask = Image.fromarray((pixels[:, :, 0] > 99).astype(np.uint8))
    (mask.transpose(Image.Transpose.ROTATE_270) if is_upright else mask).save(tmp_path / "masks" / "a.png")
    shape = (32, 16) if is_upright else (16, 32)
    settings = EncoderSettings(image_size=list(shape), patch=4, width=16, depth=1, heads=2)
    image, classes = MaskedImages.open(tmp_path).read(0, settings)
    assert image.shape[1:] == classes.shape == shape
    assert ((image[0].numpy() > 99) == (classes == 1)).all()


def test_a_program_in_the_place_of_an_image_is_not_started(tmp_path: Path) -> None:
    write(tmp_path, 1, 0)
    (tmp_path / "images" / "00.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n")
    with pytest.raises(ValueError, match="00.png: unreadable .not an image"):
        MaskedImages.open(tmp_path).read(0, make().settings)


def test_images_without_labels_choose_no_penalty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image of the training folder but two has an empty mask: the two are split, and one of them chooses."""
    train = MaskedImages.open(write(tmp_path / "train", 10, 0, (3, 200)))
    for mask in [mask for number, mask in enumerate(train.masks) if number not in (4, 7)]:
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(mask)
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / "images" / f"{mask.stem}.png")
    held = []
    fit = dense.fit_head
    monkeypatch.setattr(dense, "fit_head", lambda v, t, counts, h: held.append((counts, h)) or fit(v, t, counts, h))
    encoder = ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2))
    segment({"e": encoder}, train, train)
    ((counts, is_held),) = held
    assert counts[is_held].sum() > 0
    assert counts[~is_held].sum() > 0
    Image.fromarray(np.full(np.array(Image.open(train.masks[7])).shape, 255, np.uint8)).save(train.masks[7])
    with pytest.raises(ValueError, match="1 of 10 images have labeled pixels"):
        segment({"e": encoder}, train, train)


@pytest.mark.parametrize(
    ("mode", "fraction", "share"), [("center", 1.0, 0.5), ("center", 0.5, 0.125), ("squash", 1.0, 1.0)]
)
def test_what_share_of_the_labels_is_scored_is_said(tmp_path: Path, mode: str, fraction: float, share: float) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for name in ("a", "b"):
        mask = np.zeros((20, 40), np.uint8)
        mask[:, 20:] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(np.stack([mask * 200] * 3, 2)).save(tmp_path / "images" / f"{name}.png")
    settings = EncoderSettings(
        image_size=8, patch=4, width=16, depth=1, heads=2, crop_mode=mode, crop_fraction=fraction
    )
    data = MaskedImages.open(tmp_path)
    table = segment({"e": ViTEncoder(settings)}, data, data)
    assert table.about["labeled_pixels_seen_percent"] == pytest.approx(100 * share)
    image, seen = data.read(0, settings)
    assert (seen[:, :4] == 0).all()
    assert (seen[:, 4:] == 1).all()
    assert (image[:, :, :3] < 10).all()
    assert (image[:, :, 5:] > 190).all()


def test_a_large_data_set_fits_its_map_on_random_patches_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = write(tmp_path / "train", 30, 0), write(tmp_path / "val", 4, 1)
    encoder, fitted, fit = make(), [], dense.fit_head
    monkeypatch.setattr(dense, "fit_head", lambda *given: fitted.append(given) or fit(*given))
    whole = sslvit.segment(encoder, train, val, device="cpu", baselines=False)
    assert "random" not in str(whole)
    patches = 30 * 16
    monkeypatch.setattr(dense, "MAX_FITTED", patches * (16 + 2) // 2, raising=False)  # half of width and classes
    table = sslvit.segment(encoder, train, val, device="cpu", baselines=False)
    again = sslvit.segment(encoder, train, val, device="cpu", baselines=False, batch=7)
    other = sslvit.segment(encoder, train, val, device="cpu", baselines=False, seed=1)
    every, half, batched, seeded = (given[0] for given in fitted)
    assert len(every) == patches
    assert 0.4 * patches < len(half) < 0.6 * patches
    torch.testing.assert_close(half, batched)  # whatever the batches
    assert not torch.equal(half[:40], seeded[:40])
    number = torch.cdist(half, every).argmin(1)
    for kept, whole_column in zip(fitted[1][1:], fitted[0][1:], strict=True):  # target, weight and is_held_out
        torch.testing.assert_close(kept, whole_column[number])
    assert table.about["fitted_patches_percent"] == {"encoder": pytest.approx(50)}
    assert "maps fitted on random patches of the training images: 50 % of them (encoder)" in str(table)
    assert again.about == table.about
    assert other.about["fitted_patches_percent"] == table.about["fitted_patches_percent"]
    assert table.scores["encoder"]["mean IoU"] != whole.scores["encoder"]["mean IoU"]


def test_segmentation_from_python_gives_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, val = write(tmp_path / "train", 10, 0), write(tmp_path / "val", 4, 1)
    encoder = make()
    table = sslvit.segment(encoder, train, val, device="cpu", figure=tmp_path / "python.png")
    save_encoder(encoder, tmp_path / "encoder")
    words = [str(tmp_path / "encoder"), "--train", str(train), "--val", str(val), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main(["segment", *words, "--figure", str(tmp_path / "command.png")]) == 0
    assert table.to_dict() == json.loads(capsys.readouterr().out)
    assert list(table.scores) == ["raw pixels", "untrained encoder", "encoder"]
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "command.png").read_bytes()
    assert table.figure == tmp_path / "python.png"
    assert "<td>encoder</td>" in table._repr_html_()
    assert "of the masks' labeled pixels, 100.0 % are in these views" in repr(table)
    with pytest.raises(ValueError, match=r"allow_same_data=True"):
        sslvit.segment(encoder, train, train)


@pytest.mark.parametrize("count", [3, 20, 21, 255])
def test_each_class_has_a_color_of_its_own_in_pictures(count: int) -> None:
    masks = np.append(np.arange(count), IGNORED).reshape(1, 1, -1)
    colors = mask_colors(masks, list(range(count)))[0, :, 0].T
    assert len({tuple(color) for color in colors}) == count + 1
    assert colors[-1].tolist() == [1, 1, 1]  # without a label

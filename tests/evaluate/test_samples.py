"""`sslvit sample`: pictures from nothing and completed ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_fixtures import image_folder

from sslvit.cli import main
from sslvit.evaluate import samples
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, IGPTSettings, OptimSettings
from sslvit.settings.sample import SampleSettings
from sslvit.tasks.igpt import IGPT
from sslvit.tasks.released import load_igpt


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoint of a tiny model of 6 x 6 pixels in color."""
    encoder = EncoderSettings(
        image_size=6, mean=[0.5] * 3, std=[0.5] * 3, tokens="pixel", patch=1, width=16, depth=1, heads=2, causal=True,
        class_token=False, prefix_positions="none", pooling="mean", palette=[[-1.0] * 3, [0.0] * 3, [1.0] * 3],
    )  # fmt: skip
    torch.manual_seed(0)
    task = IGPT(IGPTSettings(), encoder, OptimSettings(), RunPlan(1, 1, 8))
    torch.nn.init.normal_(task.model.head.weight)
    saved: dict = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(saved)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(saved, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was handed to the drawing: rows and titles."""
    kept: list = []
    draw = samples.plot_images

    def keep(path, rows, titles, title=""):
        kept.append((rows, titles))
        return draw(path, rows, titles, title)

    monkeypatch.setattr(samples, "plot_images", keep)
    return kept


def test_images_from_nothing_by_seed(run: Path, drawn: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", str(run), "--count", "11", "--batch", "4"]) == 0
    assert Image.open(run / "figures" / "samples.png").width > 100
    assert main(["sample", str(run), "--count", "11", "-o", str(tmp_path / "again.png")]) == 0
    assert main(["sample", str(run), "--count", "11", "--seed", "1", "-o", str(tmp_path / "other.png")]) == 0
    one, again, other = (np.concatenate(rows) for rows, _ in drawn)
    assert [len(row) for row in drawn[0][0]] == [8, 3]
    assert one.shape == (11, 3, 6, 6)
    assert set(np.unique(one)) <= {0.0, 0.5, 1.0}
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    capsys.readouterr()
    assert main(["sample", str(run)]) == 1
    assert "samples.png: already exists" in capsys.readouterr().err


def test_completions_stand_between_input_and_original(run: Path, drawn: list, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", count=4)
    (folder / "cat" / "im.001.png").write_bytes(b"no picture")
    words = ["sample", str(run), "--complete", str(folder), "--count", "8", "--draws", "2", "--given", "0.4"]
    assert main(words) == 0
    assert (run / "figures" / "completions.png").exists()
    ((rows, titles),) = drawn
    assert titles == ["input", "completion 1", "completion 2", "original"]
    assert {row.shape for row in rows} == {(7, 3, 6, 6)}  # one of eight cannot be read
    seen, *completed, original = (row.reshape(7, 3, 36) for row in rows)
    known = 14  # 0.4 of 36
    assert all(np.array_equal(row[:, :, :known], original[:, :, :known]) for row in (seen, *completed))
    assert (seen[:, :, known:] == 0.5).all()
    assert not np.array_equal(*completed)


def test_a_completion_does_not_depend_on_how_many_are_made(run: Path, tmp_path: Path) -> None:
    model, folder = load_igpt(run), image_folder(tmp_path / "images", count=4)
    many = samples.complete_images(model, str(folder), 4, 0.4, 3, SampleSettings())
    few = samples.complete_images(model, str(folder), 2, 0.4, 2, SampleSettings())
    assert all(np.array_equal(many.rows[1 + draw][:2], few.rows[1 + draw]) for draw in range(2))


def test_images_are_completed_as_evaluation_sees_them(run: Path, tmp_path: Path) -> None:
    """The encoder's own crop: here the whole image at another aspect ratio, and not its middle."""
    folder = tmp_path / "images"
    folder.mkdir()
    wide = np.zeros((6, 12, 3), np.uint8)
    wide[:, 3:9] = 255  # the middle of the image is white, and its sides are black
    Image.fromarray(wide).save(folder / "wide.png")
    model = load_igpt(run)
    model.encoder.settings = replace(model.encoder.settings, crop_mode="squash")
    original = samples.complete_images(model, str(folder), 1, 0.5, 1, SampleSettings()).rows[-1]
    assert original.min() == 0
    assert original.max() == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--complete", "IMAGES", "--given", "1"], "--given 1.0: that is 36 of 36 pixels"),
        (["--complete", "IMAGES", "--given", "-0.1"], "--given -0.1"),
        (["--complete", "missing"], "missing is not a folder"),
        (["--count", "0"], "--count 0: must be 1 or more"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["-o", "nowhere/x.png"], "nowhere/x.png: its folder does not exist"),
    ],
)
def test_what_cannot_be_sampled_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    folder = image_folder(tmp_path / "images", count=1)
    assert main(["sample", str(run), *(str(folder) if word == "IMAGES" else word for word in words)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_where_no_picture_can_be_written_nothing_is_sampled(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(samples, "complete", lambda *_: pytest.fail("sampled"))
    (run / "figures").write_text("")
    assert main(["sample", str(run)]) == 1
    assert str(run / "figures") in capsys.readouterr().err


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", str(tmp_path / "none")]) == 1
    assert "no such file or folder" in capsys.readouterr().err

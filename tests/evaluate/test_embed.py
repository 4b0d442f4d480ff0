"""Features as a file: the right ones, by name, of the images that can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from disk_fixtures import files_up_to
from PIL import Image

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

SMALL = {"image_size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_encoder(ViTEncoder(EncoderSettings(**SMALL)), tmp_path / "encoder")
    source = np.random.default_rng(0)
    for number in range(5):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "photos" / "dog" / "2.png").write_bytes(b"no picture")
    return tmp_path


def test_features_of_a_folder_by_name(here: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["embed", str(here / "encoder"), str(here / "photos"), "-o", str(here / "out.npz"), "--batch", "2"]
    assert main([*words, "--blocks", "2"]) == 0
    assert "features, keys, labels and classes of 4 images, 32 numbers each" in capsys.readouterr().out
    made = np.load(here / "out.npz")
    assert made["features"].dtype == np.float32
    encoder = load_encoder(here / "encoder")
    assert made["labels"].dtype == np.int64  # torch's losses take no other
    for key, row, label in zip(made["keys"], made["features"], made["labels"], strict=True):
        (file,) = (here / "photos").glob(f"*/{Path(key).name}")
        assert made["classes"][label] == file.parent.name
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.settings.mean, encoder.settings.std))
        with torch.no_grad():
            expected = [encoder.features((pixels - mean) / std, layer, "class") for layer in (1, 2)]
        assert np.allclose(row, torch.cat(expected, 1)[0], atol=1e-5)
    assert sorted(Path(key).stem for key in made["keys"]) == ["0", "1", "3", "4"]
    assert main(words) == 1  # nothing is overwritten
    assert "out.npz: already exists" in capsys.readouterr().err


def test_what_cannot_be_embedded_is_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["embed", str(here / "encoder"), str(here / "photos"), "-o"]
    for more, reason in (
        ([str(here / "out.csv")], "ends in .npz"),
        ([str(here / "no" / "out.npz")], "its folder does not exist"),
        ([str(here / "out.npz"), "--crop-fraction", "1.5"], "--crop-fraction 1.5"),
        ([str(here / "out.npz"), "--layer", "3"], "blocks 1 to 2"),
    ):
        assert main([*words, *more]) == 1
        assert reason in capsys.readouterr().err
    assert not (here / "out.npz").exists()


def test_a_disk_that_takes_no_more_and_a_killed_embedding_leave_nothing(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    (here / f"out.npz.{2**22 + 1}.part").write_text("half")  # of a process that is no more
    words = ["embed", str(here / "encoder"), str(here / "photos"), "-o", str(here / "out.npz")]
    main(words)
    (here / "out.npz").unlink()
    with files_up_to(100):
        assert main(words) == 1
    assert "out.npz: could not be written (File too large)" in capsys.readouterr().err
    assert not list(here.glob("*.npz*"))

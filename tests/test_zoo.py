"""Released encoders by name: from the package, a folder or an address, and only the files that were released."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from server_fixtures import Server

import sslvit
from sslvit import zoo
from sslvit.checkpoint import fingerprint, save_encoder
from sslvit.cli import main
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with toys/tiny/, which the list knows and the package does not hold."""
    torch.manual_seed(0)
    encoder = ViTEncoder(EncoderSettings(16, patch=4, width=16, depth=1, heads=2))
    folder = save_encoder(encoder, tmp_path / "zoo" / "toys" / "tiny", {"task": "mae"})
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setattr(zoo, "encoders", lambda: {"toys/tiny": files})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(zoo.LOCATION, raising=False)
    return tmp_path / "zoo"


def test_an_encoder_is_found_in_a_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="zoo:toys/tiny: does not come with the package. Set SSLVIT_ZOO"):
        sslvit.load_encoder("zoo:toys/tiny")
    monkeypatch.setenv(zoo.LOCATION, str(elsewhere))
    encoder = sslvit.load_encoder("zoo:toys/tiny")
    assert fingerprint(encoder) == fingerprint(sslvit.load_encoder(elsewhere / "toys" / "tiny"))
    with pytest.raises(ValueError, match="zoo:toys/tinny: no such encoder.* the nearest is zoo:toys/tiny"):
        sslvit.load_encoder("zoo:toys/tinny")
    monkeypatch.setenv(zoo.LOCATION, str(elsewhere / "toys"))
    with pytest.raises(FileNotFoundError, match="no such file. SSLVIT_ZOO names the folder that holds toys/tiny/"):
        sslvit.load_encoder("zoo:toys/tiny")


def test_another_file_than_the_one_released_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(zoo.LOCATION, str(elsewhere))
    file = elsewhere / "toys" / "tiny" / "encoder.json"
    file.write_text(file.read_text().replace('"gelu"', '"quick_gelu"'))
    with pytest.raises(ValueError, match="not the file that was released as zoo:toys/tiny"):
        sslvit.load_encoder("zoo:toys/tiny")


def test_an_encoder_is_downloaded_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server(elsewhere)
    monkeypatch.setenv(zoo.LOCATION, server.address)
    try:
        first = sslvit.load_encoder("zoo:toys/tiny")
        assert server.requests == {"toys/tiny/encoder.json": 1, "toys/tiny/encoder.safetensors": 1}
        assert fingerprint(sslvit.load_encoder("zoo:toys/tiny")) == fingerprint(first)
        assert sum(server.requests.values()) == 2
        cached = tmp_path / "cache" / "sslvit" / "zoo" / "toys" / "tiny"
        (cached / "encoder.safetensors").unlink()
        weights = elsewhere / "toys" / "tiny" / "encoder.safetensors"
        first_bytes = weights.read_bytes()
        weights.write_bytes(first_bytes[:-4] + b"\0\0\0\1")
        with pytest.raises(ValueError, match=r"encoder.safetensors: not the file that was released .*Check SSLVIT_ZOO"):
            sslvit.load_encoder("zoo:toys/tiny")
        assert not (cached / "encoder.safetensors").exists()
        weights.write_bytes(weights.read_bytes()[:-4] + first_bytes[-4:])
        (cached / "encoder.json").write_text("of an earlier release")  # which is taken again
        assert fingerprint(sslvit.load_encoder("zoo:toys/tiny")) == fingerprint(first)
    finally:
        server.stop()
    monkeypatch.delenv(zoo.LOCATION)  # what is in the cache needs no address
    assert fingerprint(sslvit.load_encoder("zoo:toys/tiny")) == fingerprint(first)
    monkeypatch.setenv(zoo.LOCATION, server.address)
    (cached / "encoder.json").unlink()
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        sslvit.load_encoder("zoo:toys/tiny")


def test_whatever_lies_in_the_package_is_listed_and_small() -> None:
    known = zoo.encoders()
    inside = {str(file.parent.relative_to(zoo.FOLDER)) for file in zoo.FOLDER.rglob("encoder.json")}
    assert inside
    assert inside <= set(known)
    for name in inside:
        folder = zoo.find(zoo.ZOO + name)
        assert {file.name for file in folder.iterdir()} == set(known[name])
        assert (folder / "encoder.safetensors").stat().st_size < 3_000_000
        card = json.loads((folder / "card.json").read_text())
        assert card["fingerprint"] == fingerprint(sslvit.load_encoder(folder))
        assert card["scores"]["probe.json"]["rows"]["encoder"]
        assert not Path(card["recipe"]["data"]["shards"]).is_absolute()  # no place on its author's machine


@pytest.mark.parametrize("task", ["mae", "dino", "igpt"])
def test_a_released_encoder_scores_what_its_card_says(task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sslvit.reports.demo import pack_digits

    pack_digits(tmp_path)
    card = json.loads((zoo.find(f"zoo:digits/{task}") / "card.json").read_text())
    said = card["scores"]["probe.json"]["rows"]["encoder"]["kNN, k = 20"]
    words = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "test"), "--neighbors", "20", "--no-baselines"]
    capsys.readouterr()
    assert main(["knn", f"zoo:digits/{task}", *words, "--json", "--cache", "none"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]["encoder"]["kNN, k = 20"]
    assert found == pytest.approx(said, abs=0.6)  # two images, as machines round differently


def test_the_example_runs_on_what_is_installed(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "docs" / "examples" / "digits_by_neighbors.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("encoder ")]
    assert [float(row[1]) for row in rows] == pytest.approx([74.4, 69.4], abs=0.6)
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_no_model_of_pixels() -> None:
    with pytest.raises(FileNotFoundError, match="An encoder alone cannot predict pixels"):
        sslvit.sample("zoo:digits/igpt")

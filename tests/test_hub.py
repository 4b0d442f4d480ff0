"""Models of the Hugging Face hub by name, from a cache as the library keeps it; nothing is downloaded."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import sslvit
from sslvit import progress
from sslvit.checkpoint import provenance_of
from sslvit.cli import main
from sslvit.layouts import hub

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "1" * 40


def encoder(seed: int) -> sslvit.ViTEncoder:
    torch.manual_seed(seed)
    return sslvit.ViTEncoder(sslvit.EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2)).eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of one model, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "cache" / "models--own--vit"
    for seed, commit in enumerate([COMMIT, OLDER]):
        sslvit.save_encoder(encoder(seed), tmp_path / "made")
        pytest.importorskip("timm")
        sslvit.export(tmp_path / "made", model / "snapshots" / commit, "timm", outputs="tokens", overwrite=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return model


def test_a_model_is_opened_by_its_name_and_by_a_revision(cache: Path, capsys: pytest.CaptureFixture) -> None:
    images = torch.randn(2, 3, 16, 16)
    for name, seed in (("hf:own/vit", 0), (f"hf:own/vit@{OLDER}", 1), ("hf:own/vit@main", 0)):
        torch.testing.assert_close(sslvit.load_encoder(name)(images), encoder(seed)(images))
    assert provenance_of("hf:own/vit@main") == {"imported_from": f"hf:own/vit@{COMMIT}"}
    assert f"hf:own/vit: snapshot {COMMIT}" in capsys.readouterr().out


def test_what_is_downloaded_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Of files that are being written in the hub's cache; what an earlier attempt left there does not count."""
    monkeypatch.setattr(progress, "FIRST_REPORT_SECONDS", 0.05)
    blobs = cache / "blobs"
    blobs.mkdir()
    left, written = blobs / "left.incomplete", blobs / "new.incomplete"
    left.write_bytes(b"0" * 5_000_000)
    os.utime(left, (1e9, 1e9))

    def download(repo: str, **_) -> str:
        written.write_bytes(b"0" * 2_000_000)
        time.sleep(0.2)
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with caplog.at_level(logging.INFO, "sslvit.progress"):
        hub.snapshot("hf:own/vit")
    assert [record.getMessage() for record in caplog.records] == ["downloading hf:own/vit: 2 MB"]


def test_pickled_weights_are_read_where_there_are_no_others(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(cache / "snapshots" / COMMIT / "config.json", bare)

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(bare)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.snapshot("hf:own/vit@v1.0") == bare
    assert asked == [("own/vit", "v1.0", hub.SAFE), ("own/vit", "v1.0", hub.PICKLED)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:own/other", "hf:own/other: neither in the hub's cache nor to be had from it ("),
        ("hf:own/vit@9999", "hf:own/vit@9999: neither in the hub's cache nor to be had from it ("),
        ("hf:own/vit/more", "hf:own/vit/more: expected hf:ORG/NAME, or hf:ORG/NAME@REVISION."),
        ("hf:", "hf:: expected hf:ORG/NAME, or hf:ORG/NAME@REVISION."),
        ("hf:../../etc@x", "hf:../../etc@x: expected hf:ORG/NAME, or hf:ORG/NAME@REVISION."),
    ],
)
def test_what_cannot_be_had_is_one_line(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, said: str
) -> None:
    assert main(["import", name, str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1

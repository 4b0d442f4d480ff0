"""No file that a user is handed runs code: at every door that takes one, it is refused and nothing is created."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import run

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.arrays import array_samples
from sslvit.data.pack import pack
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.tasks.dino import DINO
from sslvit.tasks.igpt import IGPT
from sslvit.tasks.mae import MAE

SMALL = {"image_size": 8, "patch": 2, "width": 16, "depth": 1, "heads": 2, "channels": 1}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
       "patch_size": 2, "intermediate_size": 64, "layer_norm_eps": 1e-6, "num_channels": 3}  # fmt: skip
TIMM = {"architecture": "vit_base_patch16_224", "num_classes": 0, "pretrained_cfg": {"num_classes": 0},
        "model_args": {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}}  # fmt: skip


class Hostile:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with shards and an encoder of our own; torch is asked to read pickles whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    labels = np.arange(20) % 2
    for name in ("train", "val"):
        pack(array_samples(np.zeros((20, 8, 8), np.uint8), labels), tmp_path / name, ["a", "b"])
    torch.manual_seed(0)
    save_encoder(ViTEncoder(EncoderSettings(**SMALL)), tmp_path / "own")
    return tmp_path


def folder_of(config: dict) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        pickle_at(here / "theirs" / "pytorch_model.bin", here)
        (here / "theirs" / "config.json").write_text(json.dumps(config))
        return "theirs"

    return make


def pickle_at(file: Path, here: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"cls_token": torch.zeros(1, 1, 16), "extra": Hostile(here / "trace")}, file)


def released(here: Path) -> str:
    pickle_at(here / "released.pth", here)
    return "released.pth"


def own_checkpoint(here: Path) -> str:
    pickle_at(here / "run" / "checkpoints" / "last.ckpt", here)
    return "run"


def in_parts(here: Path) -> str:
    pickle_at(here / "theirs" / "part-1.bin", here)
    (here / "theirs" / "config.json").write_text(json.dumps(VIT))
    index = {"weight_map": {"embeddings.cls_token": "part-1.bin"}}
    (here / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    return "theirs"


def arrays(here: Path) -> str:
    np.savez(here / "arrays.npz", wte=np.array([Hostile(here / "trace")], dtype=object))
    return "arrays.npz"


SPLIT = ["--train", "train", "--val", "val"]
DOORS = {
    "import": lambda source: ["import", source, "out"],
    "export": lambda source: ["export", source, "out", "--format", "safetensors"],
    "probe": lambda source: ["probe", source, *SPLIT, "--cache", "none"],
    "knn": lambda source: ["knn", source, *SPLIT, "--cache", "none"],
    "health": lambda source: ["health", source, "train"],
    "embed": lambda source: ["embed", source, "train", "-o", "out.npz"],
    "finetune": lambda source: ["finetune", source, *SPLIT, "--out", "out"],
    "show": lambda source: ["show", "attention", source, "train"],
    "init": lambda source: [
        "pretrain",
        "--config",
        "mae/digits",
        "--data",
        "train",
        "--out",
        "out",
        "--init",
        source,
        "--data.global_batch",
        "8",
    ],
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("make", [released, own_checkpoint], ids=["file", "run"])
def test_every_command_that_takes_an_encoder(here: Path, door: str, make, capsys: pytest.CaptureFixture) -> None:
    assert main(DOORS[door](make(here))) == 1
    assert "refused, because it holds objects besides tensors" in capsys.readouterr().err
    assert not (here / "trace").exists()
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (folder_of(VIT), "refused, because it holds objects besides tensors"),
        (folder_of(TIMM), "Unsupported globals: posix.mkdir"),
        (in_parts, "refused, because it holds objects besides tensors"),
        (arrays, "allow_pickle=False"),
    ],
    ids=["transformers", "timm", "parts", "npz"],
)
def test_every_form_of_an_encoder(here: Path, make, reason: str, capsys: pytest.CaptureFixture) -> None:
    assert main(DOORS["import"](make(here))) == 1
    assert reason in capsys.readouterr().err
    assert not (here / "trace").exists()
    assert not (here / "out").exists()


def test_a_run_that_is_gone_on_with(here: Path) -> None:
    settings = {"data.shards": "train", "encoder.channels": 1}
    folder = run(here / "train", here / "run", **settings)
    pickle_at(folder.checkpoint, here)
    with pytest.raises(ValueError, match="refused, because it holds objects besides tensors"):
        run(here / "train", here / "run", resume=True, **settings)
    assert not (here / "trace").exists()


def test_models_of_pixels_and_palettes(here: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(here / "palette.npy", np.array([Hostile(here / "trace")], dtype=object))
    for words in (
        ["sample", own_checkpoint(here)],
        ["likelihood", "run", *SPLIT],
        ["likelihood", released(here), *SPLIT, "--palette", "uniform"],
        ["import", "own", "out", "--palette", "palette.npy"],
    ):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith("sslvit: error: ")
        assert not (here / "trace").exists()


def test_released_tasks(here: Path) -> None:
    released(here)
    for load in (
        lambda: MAE.from_official("released.pth", heads=2, decoder_heads=2),
        lambda: DINO.from_official("released.pth", heads=2),
        lambda: IGPT.from_official("released.pth", "uniform"),
    ):
        with pytest.raises(ValueError, match="refused, because it holds objects besides tensors"):
            load()
        assert not (here / "trace").exists()


def test_an_index_cannot_name_files_elsewhere(here: Path, capsys: pytest.CaptureFixture) -> None:
    in_parts(here)
    index = {"weight_map": {"embeddings.cls_token": "../own/encoder.safetensors"}}
    (here / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["import", "theirs", "out"]) == 1
    assert "which is outside its folder" in capsys.readouterr().err


def test_the_trace_is_left_where_nothing_guards(here: Path) -> None:
    """The file is hostile indeed: read carelessly, it does what it is refused for."""
    released(here)
    torch.load(here / "released.pth", weights_only=False)
    assert (here / "trace").exists()

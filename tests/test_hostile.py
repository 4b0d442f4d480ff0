"""No file that a user is handed runs code: at every door that takes one, it is refused and nothing is created."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fixtures import run
from safetensors.torch import save_file

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks.released import load_dino, load_igpt, load_mae

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


def sharded(here: Path) -> str:
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
        "--data.global_batch_size",
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
        (folder_of(TIMM), "refused, because it holds objects besides tensors"),
        (sharded, "refused, because it holds objects besides tensors"),
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


def test_released_models(here: Path) -> None:
    released(here)
    for load in (
        lambda: load_mae("released.pth", heads=2, decoder_heads=2),
        lambda: load_dino("released.pth", heads=2),
        lambda: load_igpt("released.pth", palette="uniform"),
    ):
        with pytest.raises(ValueError, match="refused, because it holds objects besides tensors"):
            load()
        assert not (here / "trace").exists()


def test_an_index_cannot_name_files_elsewhere(here: Path, capsys: pytest.CaptureFixture) -> None:
    sharded(here)
    index = {"weight_map": {"embeddings.cls_token": "../own/encoder.safetensors"}}
    (here / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["import", "theirs", "out"]) == 1
    assert "which is outside its folder" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["depth", "width", "registers", "image_size", "mlp_ratio", "channels", "heads"])
@pytest.mark.parametrize("value", [1_000_000, 10**15])
def test_a_description_of_a_huge_network_is_refused_before_it_is_built(
    here: Path, key: str, value: int, capsys: pytest.CaptureFixture
) -> None:
    file = here / "own" / "encoder.json"
    about = json.loads(file.read_text())
    changes = {key: value, "width": value} if key == "heads" else {key: value}
    about["encoder"] |= {"channels": 1, "mean": None, "std": None} | changes
    file.write_text(json.dumps(about))
    start = time.process_time()
    assert main(["import", "own", "out"]) == 1
    assert time.process_time() - start < 5  # also where the machine is busy
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 600
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"depth": 10**7}, "states a depth of 10000000, but its weights have 1 blocks"),
        ({"embed_dim": 10**6}, "states .* for cls_token, which is .* among its weights"),
        ({"img_size": 10**6}, "states .* for pos_embed|cannot be|Storage size"),
        ({"reg_tokens": 10**9}, "for reg_token, which is missing among its weights|for pos_embed"),
        ({"depth": "many"}, "states a depth of many"),
    ],
)
def test_a_folder_of_timms_with_a_huge_network_is_refused_before_it_is_built(
    here: Path, changes: dict, reason: str, capsys: pytest.CaptureFixture
) -> None:
    (here / "theirs").mkdir()
    config = TIMM | {"model_args": TIMM["model_args"] | changes}
    (here / "theirs" / "config.json").write_text(json.dumps(config))
    save_file(ViTEncoder(EncoderSettings(**SMALL | {"channels": 3})).state_dict(), here / "theirs/model.safetensors")
    start = time.process_time()
    assert main(["import", "theirs", "out"]) == 1
    assert time.process_time() - start < 10  # timm itself is imported meanwhile
    said = capsys.readouterr().err
    assert re.search(reason, said), said
    assert said.count("\n") == 1


def test_a_folder_of_timms_with_another_model_is_refused_before_it_is_built(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    (here / "theirs").mkdir()
    config = TIMM | {"architecture": "resnet18", "model_args": {"layers": [10**8] * 4}}
    (here / "theirs" / "config.json").write_text(json.dumps(config))
    save_file({"conv1.weight": torch.zeros(3)}, here / "theirs" / "model.safetensors")
    assert main(["import", "theirs", "out"]) == 1
    assert "a resnet18, and only plain vision transformers can be probed" in capsys.readouterr().err


def test_the_trace_is_left_where_nothing_guards(here: Path) -> None:
    """The file is hostile indeed: read carelessly, it does what it is refused for."""
    released(here)
    torch.load(here / "released.pth", weights_only=False)
    assert (here / "trace").exists()


# ---- damaged descriptions end in one line that names the file ----------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "\x00", '{"a": 1e999999}'])
def test_json_of_any_depth_is_an_error_that_names_its_file(tmp_path: Path, text: str) -> None:
    save_encoder(ViTEncoder(EncoderSettings(**SMALL)), tmp_path / "own")
    (tmp_path / "own" / "encoder.json").write_text(text)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(text)
    for folder in ("own", "theirs"):
        with pytest.raises(ValueError, match=folder) as error:
            load_encoder(tmp_path / folder)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["width", "channels", "causal", "pos_embed", "mlp_ratio"])
def test_a_setting_that_is_null_and_must_not_be_is_named(tmp_path: Path, key: str) -> None:
    file = save_encoder(ViTEncoder(EncoderSettings(**SMALL)), tmp_path) / "encoder.json"
    about = json.loads(file.read_text())
    about["encoder"][key] = None
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"encoder.json: {key}: (expected .*, got null|null is not one of)"):
        load_encoder(tmp_path)


def test_values_in_the_place_of_weights_are_named(tmp_path: Path) -> None:
    encoder = ViTEncoder(EncoderSettings(**SMALL))
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()} | {"encoder.cls_token": [1, 2]}
    record = {"encoder": dataclasses.asdict(encoder.settings), "prefix": "encoder."}
    torch.save({"sslvit": record, "state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt: cls_token is a list, not a tensor"):
        load_encoder(tmp_path / "a.ckpt")


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: !!timestamp x", "a: !!int x", "? [1]\n: 2", "a: !!float [1]"])
def test_yaml_that_its_reader_stumbles_over_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a.yaml: not readable as YAML \(") as error:
        load_recipe(tmp_path / "a.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_of_half_a_million_shards_is_refused_at_the_first_that_is_missing(tmp_path: Path) -> None:
    torch.save({"shards": {"folder": "x", "ranks": 500_000}}, tmp_path / "last.ckpt")
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="rank-00000.pt: a shard of .* is missing"):
        load_encoder(tmp_path / "last.ckpt")
    assert time.monotonic() - start < 5


def test_a_model_type_of_any_length_is_named_in_few_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["x" * 100] * 1000}))
    with pytest.raises(ValueError, match="a transformers folder of another model") as error:
        load_encoder(tmp_path)
    assert len(str(error.value)) < 400

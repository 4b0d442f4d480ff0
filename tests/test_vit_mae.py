"""transformers' ViTMAE: encoder and decoder come in, go on in a run, and go back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from run_fixtures import TINY
from safetensors.torch import load_file, save_file
from shard_fixtures import labeled_shards

import sslvit
from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.cli import main
from sslvit.exporters import export_encoder, transformers_kinds
from sslvit.exporters.exported import with_outputs
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, MAESettings, OptimSettings, SupervisedSettings
from sslvit.tasks.mae import MAE
from sslvit.tasks.released import load_mae
from sslvit.tasks.supervised import Supervised

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 16,
         "patch_size": 4, "layer_norm_eps": 1e-3, "decoder_hidden_size": 12, "decoder_num_hidden_layers": 2,
         "decoder_num_attention_heads": 3, "decoder_intermediate_size": 20, "mask_ratio": 0.6}  # fmt: skip
RUN = RunPlan(total_steps=1, steps_per_epoch=1, global_batch_size=4)


def folder_of(folder: Path, kind: str = "ForPreTraining", names: str = "as written", **options):
    """A model with every parameter random, position tables included, in its folder."""
    torch.manual_seed(0)
    model = getattr(transformers, f"ViTMAE{kind}")(transformers.ViTMAEConfig(**SHAPE | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if names == "in memory":
        save_file(model.state_dict(), file)
    elif names == "of version 4":
        old = {key.replace("decoder_encoder.layer", "decoder_layers"): value for key, value in load_file(file).items()}
        save_file(old, file)
    return model


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return labeled_shards(tmp_path / "images") / "train"


def tokens_of(model, images: torch.Tensor) -> torch.Tensor:
    """All tokens: nothing is masked."""
    vit = getattr(model, "vit", model)
    vit.embeddings.config.mask_ratio = 0.0
    rows = torch.arange(images.shape[2] * images.shape[3] // 16).float().expand(len(images), -1)
    return vit(images, noise=rows, interpolate_pos_encoding=True).last_hidden_state


# ---- import ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("names", ["as written", "in memory", "of version 4"])
@pytest.mark.parametrize("kind", ["Model", "ForPreTraining"])
def test_the_encoder_gives_the_tokens_of_transformers(tmp_path: Path, kind: str, names: str) -> None:
    model = folder_of(tmp_path, kind, names)
    encoder = load_encoder(tmp_path)
    for size in ((16, 16), (24, 16), (8, 8)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(encoder(images), tokens_of(model, images), atol=1e-5, rtol=1e-5)
    assert encoder.settings.pos_embed == "sincos_2d"
    assert (encoder.settings.norm_eps, encoder.settings.mlp_ratio) == (1e-3, 2.5)


@torch.no_grad()
@pytest.mark.parametrize("names", ["as written", "in memory", "of version 4"])
@pytest.mark.parametrize("options", [{"norm_pix_loss": True}, {"norm_pix_loss": False}, {"qkv_bias": False}])
def test_the_complete_model_has_the_loss_of_transformers(tmp_path: Path, options: dict, names: str) -> None:
    model, ours = folder_of(tmp_path, names=names, **options), load_mae(tmp_path)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    theirs = model(images, noise=noise)
    torch.testing.assert_close(ours.loss(images, noise).loss, theirs.loss, atol=1e-5, rtol=1e-5)
    visible, _ = ours.mask(noise)
    predicted = ours.decoder(ours.encoder(images, visible), visible).pixels
    torch.testing.assert_close(predicted, theirs.logits, atol=1e-5, rtol=1e-5)
    assert load_mae(tmp_path, mask_ratio=0.5).settings.mask_ratio == 0.5


def test_preprocessing_is_the_processors_or_that_of_maes_authors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder_of(tmp_path)
    found = load_encoder(tmp_path).settings
    assert (found.mean[0], found.interpolation, found.crop_fraction) == (0.485, "bicubic", 0.875)
    assert "no preprocessor_config.json there; as in MAE's own evaluation" in capsys.readouterr().out
    content = {"image_processor_type": "ViTFeatureExtractor", "size": 16, "image_mean": [0.1] * 3, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = load_encoder(tmp_path).settings
    assert (found.mean, found.interpolation, found.crop_mode) == ([0.1] * 3, "bilinear", "squash")


@torch.no_grad()
def test_weights_without_their_folder_are_known_by_their_decoder(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "folder", layer_norm_eps=1e-12)
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    encoder = load_encoder(tmp_path / "alone.safetensors", heads=2)
    images = torch.randn(2, 3, 24, 16)
    torch.testing.assert_close(encoder(images), tokens_of(model, images), atol=1e-5, rtol=1e-5)
    assert (encoder.settings.mean[0], encoder.settings.pos_embed) == (0.485, "sincos_2d")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (r"decoder.*layer\.1\.", "states decoder_depth 2, and its weights have 1"),
        (r"decoder_pred", "missing: decoder.pred"), (r"mask_token", "missing: decoder.mask_token"),
        (r"decoder.*layer\.0\..*key\.bias", r"decoder or its settings are damaged \(.key of blocks.0.attn.qkv.bias"),
        (r"decoder", "this checkpoint has an encoder only"), (r"vit.*key\.weight", "are damaged"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_a_part_is_refused_in_a_line(tmp_path: Path, lost: str, said: str) -> None:
    folder_of(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if not re.search(lost, key)}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said) as refused:
        load_mae(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder_hidden_size": 12 * 10**8}, "mae: states decoder_width 1200000000, and its weights have 12"),
        ({"decoder_num_hidden_layers": 10**9}, "decoder_depth"), ({"decoder_intermediate_size": 21}, "mlp_ratio"),
        ({"decoder_hidden_size": "12"}, "damaged"),
        ({"decoder_num_attention_heads": 5}, "mae: task.decoder_heads: 5 heads do not divide"),
        ({"mask_ratio": 2}, "mask_ratio: 2.0 must be in"), ({"hidden_act": "relu"}, "hidden_act relu is none of gelu"),
    ],
)  # fmt: skip
def test_a_config_that_states_another_model_is_refused_in_a_line(tmp_path: Path, change: dict, said: str) -> None:
    folder_of(tmp_path / "mae")
    config = json.loads((tmp_path / "mae/config.json").read_text())
    (tmp_path / "mae/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        load_mae(tmp_path / "mae")


def test_only_what_a_source_does_not_state_is_to_be_said(tmp_path: Path) -> None:
    folder_of(tmp_path / "mae")
    with pytest.raises(ValueError, match="mae: already stores its settings; remove what is for released files .heads"):
        load_mae(tmp_path / "mae", heads=2)
    torch.save({}, tmp_path / "released.pth")
    with pytest.raises(ValueError, match=r"released.pth: a released file does not state its decoder_heads\. Give"):
        load_mae(tmp_path / "released.pth", heads=2)
    with pytest.raises(ValueError, match=r"--outputs reconstruction: .*released.pth is a released file, .* Give a run"):
        with_outputs(load_mae(tmp_path / "mae").encoder, tmp_path / "released.pth", "reconstruction")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="vit: a vit, which has no decoder of MAE. Give a ViTMAEForPreTraining"):
        load_mae(tmp_path / "vit")


# ---- a run that begins with it ---------------------------------------------------------------------------------------


def task_of(encoder: EncoderSettings, **changes) -> MAE:
    like_folder = {"decoder_width": 12, "decoder_depth": 2, "decoder_heads": 3, "decoder_mlp_ratio": 20 / 12}
    return MAE(MAESettings(**{"target": "raw"} | like_folder | changes), encoder, OptimSettings(), RUN)


def test_a_run_takes_the_decoder_over_where_its_settings_agree(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder_of(tmp_path)
    start, expected = load_encoder(tmp_path), load_mae(tmp_path).state_dict()
    task = task_of(start.settings)
    task.start_from(start, str(tmp_path))
    assert "decoder: taken over, too" in capsys.readouterr().out
    assert all(torch.equal(value, expected[key]) for key, value in task.model.state_dict().items())


def test_a_decoder_on_another_grid_keeps_the_runs_own_positions(tmp_path: Path) -> None:
    folder_of(tmp_path)
    start, expected = load_encoder(tmp_path), load_mae(tmp_path).decoder
    settings = EncoderSettings(**vars(start.settings) | {"image_size": [24, 24]})
    task = task_of(settings)
    own = task.model.decoder.pos_embed.clone()
    task.start_from(start, str(tmp_path))
    assert torch.equal(task.model.decoder.pos_embed, own)
    assert torch.equal(task.model.decoder.pred.weight, expected.pred.weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "normalized"}, "task.target raw -> normalized"),
        ({"decoder_heads": 2}, "task.decoder_heads 3 -> 2"),
        ({"decoder_depth": 1, "decoder_width": 24}, "task.decoder_width 12 -> 24, task.decoder_depth 2 -> 1"),
        ({"decoder_mlp_ratio": None}, "task.decoder_mlp_ratio 1.66.* -> 2.5"),
    ],
)  # fmt: skip
def test_another_decoder_is_new_and_that_is_said(
    tmp_path: Path, changes: dict, said: str, capsys: pytest.CaptureFixture
) -> None:
    folder_of(tmp_path)
    start = load_encoder(tmp_path)
    task = task_of(start.settings, **changes)
    before = {key: value.clone() for key, value in task.model.decoder.state_dict().items()}
    capsys.readouterr()
    task.start_from(start, str(tmp_path))
    assert re.search(rf"decoder: new, as other settings were those of the weights \({said}\)", capsys.readouterr().out)
    assert all(torch.equal(value, before[key]) for key, value in task.model.decoder.state_dict().items())
    assert torch.equal(task.model.encoder.cls_token, start.cls_token)


def test_pretraining_goes_on_from_a_folder(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sslvit.train.run._finish", lambda *_: None)  # no pictures
    model = folder_of(tmp_path / "mae", num_channels=1, image_size=8, patch_size=2, norm_pix_loss=True)
    words = ["pretrain", "--config", "mae/continue", "--init", str(tmp_path / "mae"), "--data", str(shards)]
    short = {key: TINY[key] for key in TINY if key.startswith(("data.", "train."))} | {"train.steps": 2}
    decoder = {"task.decoder_width": 12, "task.decoder_depth": 2, "task.decoder_heads": 3,
               "task.decoder_mlp_ratio": 20 / 12}  # fmt: skip
    options = [f"--{key}={json.dumps(value)}" for key, value in (short | decoder).items()]
    assert main([*words, "--out", str(tmp_path / "run"), *options]) == 0
    assert "decoder: taken over, too" in capsys.readouterr().out
    assert load_encoder(tmp_path / "run").settings.norm_eps == 1e-3
    assert len(load_mae(tmp_path / "run").decoder.blocks) == len(model.decoder.decoder_layers)


# ---- export ----------------------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path, task) -> Path:
    """A run folder with nothing but a checkpoint."""
    checkpoint = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "global_step": 3}
    task.on_save_checkpoint(checkpoint)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("target", ["normalized", "raw"])
def test_a_run_of_mae_goes_to_transformers_with_its_decoder(tmp_path: Path, target: str) -> None:
    encoder = EncoderSettings(image_size=16, patch=4, width=16, depth=2, heads=2, pos_embed="sincos_2d", norm_eps=1e-3)
    task = task_of(encoder, target=target, mask_ratio=0.5)
    for parameter in task.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    checkpoint_of(tmp_path / "run", task)
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "transformers"]
    assert main([*words, "--outputs", "reconstruction"]) == 0
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    loss = theirs(images, noise=noise).loss
    torch.testing.assert_close(task.model.loss(images, noise).loss, loss, atol=1e-5, rtol=1e-5)
    assert "ViTMAEForPreTraining.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    again = load_mae(tmp_path / "out")
    assert again.settings == task.settings
    assert all(torch.equal(value, task.model.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_folder_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "mae", names="of version 4")
    verdict = export_encoder(tmp_path / "mae", tmp_path / "out", "transformers", outputs="reconstruction")
    assert (verdict["image_sizes"], verdict["weights"]["differing"]) == ("fixed", [])
    again = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    shared = {key for key in SHAPE if getattr(again.config, key) != getattr(model.config, key)}
    assert not shared


def test_a_wrong_decoder_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "mae")
    tensors = transformers_kinds.tensors_of

    def swapped(kind, exported):
        found = tensors(kind, exported)
        names = {key: re.sub(r"layers\.(.)", lambda number: f"layers.{1 - int(number[1])}", key) for key in found}
        return {names[key] if key.startswith("decoder.") else key: value for key, value in found.items()}

    monkeypatch.setattr(transformers_kinds, "tensors_of", swapped)
    with pytest.raises(RuntimeError, match="not written, because the reopened encoder differs"):
        export_encoder(tmp_path / "mae", tmp_path / "out", "transformers", outputs="reconstruction")


def test_a_decoder_that_is_not_there_or_not_held_is_refused_with_the_remedy(tmp_path: Path) -> None:
    encoder = EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2, registers=1)
    checkpoint_of(tmp_path / "run", task_of(encoder))
    save_encoder(task_of(encoder).encoder, tmp_path / "encoder")
    checkpoint_of(tmp_path / "finetuned", Supervised(SupervisedSettings(classes=2), encoder, OptimSettings(), RUN))
    cases = [
        ("run", "timm", "outputs=.reconstruction.: timm has no decoder of MAE. Use format=.transformers"),
        ("run", "transformers", r"vit_mae cannot hold this encoder .*registers: 1.*\)\. Use outputs=.features"),
        ("encoder", "transformers", "holds an encoder alone, without MAE's decoder. Give the run or its checkpoint"),
        ("finetuned", "transformers", "no run of MAE, which has a decoder"),
    ]  # fmt: skip
    for source, kind, said in cases:
        with pytest.raises(ValueError, match=said):
            sslvit.export(tmp_path / source, tmp_path / "out", kind, outputs="reconstruction")

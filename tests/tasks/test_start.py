"""A run that begins with trained weights: what is not as it was is adapted and said, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslvit.models import ViTEncoder
from sslvit.models.resize import convert_channels, resize_patches
from sslvit.run_plan import RunPlan
from sslvit.settings import DINOSettings, EncoderSettings, MAESettings, OptimSettings, SupervisedSettings
from sslvit.tasks.base import Task
from sslvit.tasks.dino import DINO
from sslvit.tasks.mae import MAE
from sslvit.tasks.supervised import Supervised

SMALL = {"image_size": 16, "patch": 4, "width": 32, "depth": 1, "heads": 2}
RUN = RunPlan(total_steps=1, steps_per_epoch=1, global_batch_size=4)


def trained(**changes) -> ViTEncoder:
    torch.manual_seed(1)
    encoder = ViTEncoder(EncoderSettings(**SMALL | changes))
    with torch.no_grad():
        encoder.cls_token.add_(1)
    return encoder


def task_of(kind: str, **changes) -> Task:
    torch.manual_seed(0)
    encoder = EncoderSettings(**SMALL | changes)
    if kind == "mae":
        return MAE(MAESettings(decoder_width=8, decoder_depth=1, decoder_heads=1), encoder, OptimSettings(), RUN)
    if kind == "dino":
        return DINO(DINOSettings(out_dim=8, bottleneck=4, head_width=8), encoder, OptimSettings(), RUN)
    return Supervised(SupervisedSettings(classes=2), encoder, OptimSettings(), RUN)


@pytest.mark.parametrize("kind", ["mae", "dino", "supervised"])
def test_weights_that_fit_are_taken_without_a_word(kind: str, capsys: pytest.CaptureFixture) -> None:
    task, start = task_of(kind, drop_path=0.1), trained()
    task.start_from(start, "encoders/mine")
    assert all(torch.equal(value, start.state_dict()[key]) for key, value in task.trained_encoder.state_dict().items())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["mae", "dino", "supervised"])
@pytest.mark.parametrize("fixed", ["sincos_1d", "sincos_2d"])
def test_learned_positions_do_not_pass_for_fixed_ones(kind: str, fixed: str) -> None:
    task = task_of(kind, pos_embed=fixed)
    before = task.encoder.pos_embed.clone()
    with pytest.raises(
        ValueError, match="encoders/mine: its positions .learned_1d.*Set encoder.pos_embed to learned_1d"
    ):
        task.start_from(trained(), "encoders/mine")
    assert torch.equal(task.encoder.pos_embed, before)
    other = {"sincos_1d": "sincos_2d", "sincos_2d": "sincos_1d"}[fixed]
    with pytest.raises(ValueError, match=f"its positions .{other}. are another table"):
        task.start_from(trained(pos_embed=other), "encoders/mine")


@pytest.mark.parametrize("kind", ["mae", "dino", "supervised"])
def test_a_learned_table_that_is_the_fixed_one_fits_and_is_said(kind: str, capsys: pytest.CaptureFixture) -> None:
    """As of MAE's released encoders, which do not say that their table is fixed."""
    start = trained()
    with torch.no_grad():
        start.pos_embed.copy_(trained(pos_embed="sincos_2d").pos_embed + 1e-6)
    task = task_of(kind, pos_embed="sincos_2d")
    expected = task.encoder.pos_embed.clone()
    task.start_from(start, "encoders/mine")
    assert "starting from encoders/mine: pos_embed: learned_1d in the weights, and the same table as sincos_2d" in (
        capsys.readouterr().out
    )
    assert torch.equal(task.encoder.pos_embed, expected)
    assert torch.equal(task.encoder.cls_token, start.cls_token)


@pytest.mark.parametrize("kind", ["mae", "dino", "supervised"])
def test_a_fixed_table_is_learned_on_and_that_is_said(kind: str, capsys: pytest.CaptureFixture) -> None:
    start, task = trained(pos_embed="sincos_2d"), task_of(kind)
    task.start_from(start, "encoders/mine")
    assert "pos_embed: a table of sincos_2d, learned from here on" in capsys.readouterr().out
    assert torch.equal(task.encoder.pos_embed, start.pos_embed)
    assert task.encoder.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": [0.5] * 3}, "the run's settings hold: mean [0.485, 0.456, 0.406] -> [0.5, 0.5, 0.5]"),
        ({"interpolation": "bilinear"}, "the run's settings hold: interpolation bicubic -> bilinear"),
        ({"pooling": "mean"}, "the run's settings hold: pooling class -> mean"),
        ({"interpolate_offset": 0.1}, "the run's settings hold: interpolate_offset 0.0 -> 0.1"),
    ],
)
def test_other_readings_of_the_weights_are_said(changes: dict, said: str, capsys: pytest.CaptureFixture) -> None:
    task_of("mae", **changes).start_from(trained(), "encoders/mine")
    assert capsys.readouterr().out == f"starting from encoders/mine: {said}\n"


def test_what_fine_tuning_adds_leaves_out_and_stretches_is_said(capsys: pytest.CaptureFixture) -> None:
    task = task_of("supervised", image_size=32, pooling="mean", fc_norm=True, final_norm=False)
    task.start_from(trained(mask_token=True), "encoders/mine")
    said = capsys.readouterr().out
    for part in ("positions interpolated from 4 x 4 to 8 x 8 patches", "new: fc_norm.weight, fc_norm.bias",
                 "left out: mask_token, norm.weight, norm.bias", "pooling class -> mean"):  # fmt: skip
        assert part in said


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="encoders/mine: an encoder of another architecture.*registers: 2 and 0"):
        task_of("mae").start_from(trained(registers=2), "encoders/mine")


@pytest.mark.parametrize("patch", [6, 8])
def test_larger_patches_see_an_enlarged_image_as_before(patch: int) -> None:
    weight, patches = torch.randn(5, 3, 4, 4), torch.randn(7, 3, 4, 4)
    enlarged = F.interpolate(patches, size=(patch, patch), mode="bilinear")
    before, after = (
        torch.einsum("ncpq,dcpq->nd", images, kernel)
        for images, kernel in ((patches, weight), (enlarged, resize_patches(weight, patch)))
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_smaller_patches_have_the_nearest_tokens_that_a_linear_map_can_give() -> None:
    """Nearest over patches of noise: no other weights come nearer, so the error has no slope."""
    weight = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    shrunk = F.interpolate(torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6), size=(3, 3), mode="bilinear",
                           antialias=True).flatten(1)  # fmt: skip
    kernel = resize_patches(weight, 3).requires_grad_()
    error = (kernel.flatten(1) @ shrunk.T - weight.flatten(1)).square().sum()
    error.backward()
    assert float(error.detach()) > 0.1
    torch.testing.assert_close(kernel.grad, torch.zeros_like(kernel), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 5), (1, 3), (12, 4)])
def test_an_image_whose_channels_are_alike_keeps_its_tokens(old: int, new: int) -> None:
    weight, gray = torch.randn(5, old, 4, 4), torch.randn(2, 1, 4, 4)
    before, after = (
        torch.einsum("ncpq,dcpq->nd", gray.expand(-1, channels, -1, -1), kernel)
        for channels, kernel in ((old, weight), (new, convert_channels(weight, new)))
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mae", "dino", "supervised"])
def test_another_size_patch_and_number_of_channels_are_adapted_and_said(
    kind: str, capsys: pytest.CaptureFixture
) -> None:
    task, start = task_of(kind, image_size=32, patch=8, channels=1, mean=[0.5], std=[0.2]), trained()
    task.start_from(start, "encoders/mine")
    said = capsys.readouterr().out
    assert "patch embedding averaged from 3 to 1 channels" in said
    assert "patch embedding resized from 4 x 4 to 8 x 8 pixels" in said
    gray = torch.randn(2, 1, 4, 4)
    small = start.patch_embed(F.pad(gray, (0, 12, 0, 12)).expand(-1, 3, -1, -1))[:, 0]
    large = F.interpolate(gray, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(task.trained_encoder.patch_embed(F.pad(large, (0, 24, 0, 24)))[:, 0], small,
                               atol=1e-4, rtol=1e-4)  # fmt: skip


def test_patches_of_another_tokenizer_are_not_adapted() -> None:
    with pytest.raises(ValueError, match="an encoder of another architecture .*patch: 4 and 8"):
        task_of("dino", patch=8, tokens="shifted_patch").start_from(trained(tokens="shifted_patch"), "there")

"""A run that begins with trained weights: what is not as it was is adapted and said, or refused."""

from __future__ import annotations

import pytest
import torch

from sslvit.models import ViTEncoder
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
    for part in ("positions stretched from 4 x 4 to 8 x 8 patches", "new: fc_norm.weight, fc_norm.bias",
                 "left out: mask_token, norm.weight, norm.bias", "pooling class -> mean"):  # fmt: skip
        assert part in said


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="encoders/mine: an encoder of another architecture.*registers: 2 and 0"):
        task_of("mae").start_from(trained(registers=2), "encoders/mine")

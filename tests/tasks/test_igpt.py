"""iGPT's behavior beyond the fixtures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_mae import batch_of

from sslvit.models.igpt import IGPTModel, pixel_nll, random_mask
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, IGPTSettings, OptimSettings
from sslvit.settings.palette import check_palette
from sslvit.tasks.igpt import IGPT
from sslvit.tasks.released import load_igpt
from sslvit.train.callbacks.health import measure

PIXELS = {
    "image_size": 4, "channels": 1, "mean": [0.5], "std": [0.5], "tokens": "pixel", "patch": 1, "width": 32, "depth": 2,
    "heads": 2, "class_token": False, "prefix_positions": "none", "pooling": "mean", "feature_norm": "next",
    "causal": True,
}  # fmt: skip
BERT = {"causal": False, "mask_token": True}


def make(objective: str = "autoregressive", **changes) -> IGPT:
    torch.manual_seed(0)
    task = IGPT(
        IGPTSettings(objective=objective), EncoderSettings(**PIXELS | changes), OptimSettings(),
        RunPlan(10, 5, 256),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in task.parameters():  # no term is silently zero or one
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return task


def gray(count: int = 2, side: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize(
    "positions", ["none", "learned_1d", "sincos_2d", "rotary_2d", "rotary_2d_normalized", "relative_bias"]
)
def test_each_pixels_prediction_depends_on_the_pixels_before_it_only(positions: str) -> None:
    task = make(pos_embed=positions).eval()
    images = gray(1)
    before = task.model.head(task.encoder(images))[0]  # n colors
    for changed in range(16):
        other = images.clone()
        other.view(-1)[changed] *= -1  # another color
        after = task.model.head(task.encoder(other))[0]
        assert torch.equal(after[: changed + 1], before[: changed + 1])  # its own prediction has not seen it
        moved = (after[changed + 1 :] - before[changed + 1 :]).abs().amax(1)
        assert (moved > 1e-4).all()  # and every later one has


def test_loss_is_the_mean_over_all_pixels_in_nats_and_bits() -> None:
    task = make()
    task.model.head.weight.data.zero_()
    metrics = task.compute(batch_of(gray()), 0).metrics
    torch.testing.assert_close(float(metrics["loss"].detach()), math.log(8))
    torch.testing.assert_close(float(metrics["bits"].detach()), 3.0)
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    colors = torch.tensor([[0, 0]])
    parts = [-math.log(math.exp(2) / (math.exp(2) + 1)), -math.log(1 / (1 + math.e))]
    torch.testing.assert_close(float(pixel_nll(logits, colors)), sum(parts) / 2)
    torch.testing.assert_close(float(pixel_nll(logits, colors, torch.tensor([[False, True]]))), parts[1])


def test_the_loss_is_computed_in_float32_and_keeps_float64() -> None:
    logits = torch.randn(2, 5, 8) * 20
    colors = torch.randint(0, 8, (2, 5))
    loss = pixel_nll(logits.bfloat16(), colors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pixel_nll(logits.bfloat16().float(), colors), rtol=0, atol=0)
    assert pixel_nll(logits.double(), colors).dtype == torch.float64


def test_a_new_model_finds_all_colors_alike() -> None:
    torch.manual_seed(0)
    model = IGPTModel(IGPTSettings(), EncoderSettings(**PIXELS))
    assert float(model.loss(gray()).loss.detach()) == pytest.approx(math.log(8), abs=1e-6)
    assert model.encoder.patch_embed.start_token.detach().std() == pytest.approx(0.02, rel=0.5)


def test_bert_sees_around_a_hidden_pixel_but_not_the_pixel() -> None:
    task = make("bert", **BERT).eval()
    images = gray(1)
    is_hidden = torch.zeros(1, 16, dtype=torch.bool)
    is_hidden[0, 5] = True
    with torch.no_grad():
        before = task.encoder(images, hidden=is_hidden)[0, 5]
        for changed, is_seen in ((5, False), (3, True), (11, True)):
            other = images.clone()
            other.view(-1)[changed] *= -1
            after = task.encoder(other, hidden=is_hidden)[0, 5]
            assert torch.equal(after, before) != is_seen


@pytest.mark.parametrize(("ratio", "hidden"), [(0.15, 2), (0.5, 8), (0.8, 13)])
def test_bert_hides_its_ratio_of_the_pixels_those_with_the_lowest_noise(ratio: float, hidden: int) -> None:
    model = IGPTModel(IGPTSettings(objective="bert", mask_ratio=ratio), EncoderSettings(**PIXELS | BERT))
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    _, _, is_hidden = model.predict(gray(4), noise)
    for row, mask in zip(noise.tolist(), is_hidden.tolist(), strict=True):
        order = sorted(range(16), key=row.__getitem__)
        assert {place for place, is_out in enumerate(mask) if is_out} == set(order[:hidden])


def test_pictures_are_drawn_by_the_runs_seed() -> None:
    task = make().eval()
    shown = []
    for seed in (0, 0, 1):
        task.run = replace(task.run, seed=seed)
        shown.append(np.stack(task.figures(batch_of(gray(3)))["generated"][1]))
    assert np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[0], shown[2])


def test_bert_counts_hidden_pixels_only_and_hides_as_many_in_every_image() -> None:
    task = make("bert", **BERT)
    batch = batch_of(gray(6))
    is_hidden = random_mask(task.uniform("mask", batch, 16, 3), 2)  # 15 % of 16
    assert is_hidden.sum(1).tolist() == [2] * 6
    assert len({tuple(row) for row in is_hidden.tolist()}) > 1
    tokens = task.encoder(batch.views[0], hidden=is_hidden)
    colors = task.encoder.patch_embed.quantize(batch.views[0])
    expected = torch.nn.functional.cross_entropy(task.model.head(tokens)[is_hidden], colors[is_hidden])
    output = task.compute(batch, 3)
    torch.testing.assert_close(output.objective, expected)
    torch.testing.assert_close(task.model.loss(batch.views[0], task.mask_noise(batch, 3)).loss, expected)
    torch.testing.assert_close(output.features, tokens.mean(1))
    noise = torch.tensor([[0.5, 0.1, 0.1, 0.9]])
    assert random_mask(noise, 1).tolist() == [[False, True, False, False]]


def test_the_health_check_compares_with_the_entropy_of_the_colors() -> None:
    task, batch = make(), batch_of(gray(4))
    assert task.compute(batch, 0).references == {}
    task.logs_features = True
    counts = torch.bincount(task.encoder.pixel_tokens.quantize(batch.views[0]).flatten()).double()
    expected = sum(-count / 64 * math.log(count / 64) for count in counts.tolist() if count)
    found = task.compute(batch, 0).references["color_counts"]
    assert measure({"color_counts": found[None]})["unigram_entropy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "options"),
    [("autoregressive", {}), ("autoregressive", {"mask_token": True, "fc_norm": True, "pos_embed": "rotary_2d"}),
     ("bert", BERT)],
)  # fmt: skip
def test_every_trained_parameter_gets_a_gradient(objective: str, options: dict) -> None:
    task = make(objective, **options)
    task.compute(batch_of(gray(4)), 0).objective.backward()
    idle = [name for name, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_a_few_steps_lower_the_loss_on_one_batch() -> None:
    model, images = make().model, gray(4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = model.loss(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("objective", "encoder", "message"),
    [
        ("autoregressive", {"causal": False}, "iGPT predicts each pixel from earlier ones"),
        ("autoregressive", {"tokens": "patch", "causal": False}, "Set encoder.tokens to pixel"),
        ("bert", {}, "Set encoder.causal to false and encoder.mask_token to true"),
        ("bert", {"causal": False}, "encoder.mask_token to true"),
        ("autoregressive", {"pooling": "attention"}, "Set encoder.pooling to mean"),
        ("bert", BERT | {"image_size": 1}, "task.mask_ratio: 0.15 of 1 pixels hides 0"),
    ],
)
def test_encoders_that_cannot_learn_it_are_refused(objective: str, encoder: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(objective, **encoder)


@pytest.mark.parametrize(
    ("palette", "channels", "message"),
    [
        ("uniform", 4, "uniform is for 1 or 3 channels, not 4"),
        ("gray", 1, "neither uniform nor a list"),
        ([[0.5]], 1, "A palette has two or more"),
        ([[0.5], [0.1]], 3, "numbers for 3 channels"),
        ([[0.5], [255.0]], 1, "255 is outside \\[-1, 1\\]"),
    ],
)
def test_palettes_that_cannot_work_are_refused(palette, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_palette(palette, channels)


def test_pictures_show_images_from_nothing_and_completed_halves() -> None:
    task = make().eval()
    figures = task.figures(batch_of(gray(3)))
    titles, rows = figures["completed"]
    assert titles == ["input", "completion 1", "completion 2", "original"]
    original = rows[-1]
    assert all(np.array_equal(row[:, :, :2], original[:, :, :2]) for row in rows)
    assert (rows[0][:, :, 2:] == 0.5).all()
    assert not np.array_equal(rows[1], rows[2])
    assert [row.shape for row in figures["generated"][1]] == [(3, 1, 4, 4)] * 2
    titles, rows = make("bert", **BERT).eval().figures(batch_of(gray(3)))["filled"]
    is_seen = rows[0] != 0.5
    assert np.array_equal(rows[1][is_seen], rows[2][is_seen])


def test_a_file_without_pixels_to_predict_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoints/last.ckpt there"):
        load_igpt(tmp_path)
    task = make("bert", **BERT)
    saved: dict = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(saved)
    torch.save(saved, tmp_path / "bert.ckpt")
    with pytest.raises(ValueError, match="does not predict the next pixel, which sampling and likelihoods need"):
        load_igpt(tmp_path / "bert.ckpt")

"""MAE's behavior beyond the fixtures."""

from __future__ import annotations

import pytest
import torch

from sslvit.data.batch import Batch
from sslvit.models.mae import MAEDecoder, MAEModel, mask_of, patchify
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, MAESettings, OptimSettings
from sslvit.tasks.mae import MAE
from sslvit.tasks.released import load_mae, mae_from_state, mae_to_state
from sslvit.train.callbacks.health import measure


def settings_of(**changes) -> tuple[MAESettings, EncoderSettings]:
    encoder = {"image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2, "channels": 1}
    return (
        MAESettings(mask_ratio=0.5, decoder_width=16, decoder_depth=1, decoder_heads=2),
        EncoderSettings(**encoder | changes),
    )


def make(**changes) -> MAEModel:
    torch.manual_seed(0)
    return MAEModel(*settings_of(**changes))


def task_of(seed: int = 0, **changes) -> MAE:
    torch.manual_seed(0)
    return MAE(*settings_of(**changes), OptimSettings(), RunPlan(10, 5, 256, seed=seed))


def batch_of(images: torch.Tensor, first_row: int = 0) -> Batch:
    count = len(images)
    return Batch(
        [images], None, torch.arange(count), torch.ones(count, dtype=torch.bool), torch.zeros(count), first_row
    )


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.3, 11), (0.9, 1)])
def test_the_encoder_sees_the_patches_that_the_mask_ratio_leaves_and_the_loss_is_of_the_others(
    ratio: float, visible: int
) -> None:
    model = make()
    model.settings.mask_ratio = ratio
    images, noise, seen = torch.randn(3, 1, 16, 16), torch.rand(3, 16), []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output)))
    loss = model.loss(images, noise).loss
    places, latent = seen[0]
    assert latent.shape[1] == 1 + visible
    expected = []
    predicted = model.decoder(latent, places).pixels
    for image in range(3):
        order = sorted(range(16), key=lambda place: float(noise[image, place]))
        assert places[image].tolist() == order[:visible]  # the lowest noise
        for place in order[visible:]:
            row, column = divmod(place, 4)
            patch = images[image, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
            deviation = ((patch - patch.mean()).square().sum() / 15 + 1e-6).sqrt()
            expected.append((predicted[image, place] - (patch - patch.mean()) / deviation).square().mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_rows_of_a_global_batch_draw_the_same_masks_however_it_is_cut() -> None:
    task = task_of()
    images = torch.randn(8, 1, 16, 16)
    whole = task.uniform("mask", batch_of(images), 16, 0)
    parts = [task.uniform("mask", batch_of(images[i : i + 2], first_row=i), 16, 0) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(task.uniform("drop path", batch_of(images), 16, 0), whole)
    assert len({tuple(row) for row in whole.argsort(1).tolist()}) == 8


def test_masks_differ_from_step_to_step_and_from_seed_to_seed() -> None:
    batch, drawn = batch_of(torch.randn(4, 1, 16, 16)), []
    for seed, step in ((0, 0), (0, 1), (0, 2), (1, 0)):
        task = task_of(seed)
        drawn.append(task.uniform("mask", batch, 16, step))
        assert torch.equal(task.uniform("mask", batch, 16, step), drawn[-1])
    every = torch.stack(drawn)
    assert len(every.flatten().unique()) == every.numel()


def test_each_use_of_chance_in_a_step_has_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and skipped branches from the same numbers would go together."""
    task, drawn, uniform = task_of(drop_path=0.5), [], MAE.uniform
    monkeypatch.setattr(MAE, "uniform", lambda *key: drawn.append(uniform(*key)) or drawn[-1])
    task.compute(batch_of(torch.randn(4, 1, 16, 16)), 0)
    assert [numbers.shape for numbers in drawn] == [(4, 16), (4, 2 * 2)]  # patches; two branches of two blocks
    assert len(torch.cat(drawn, 1).unique()) == 4 * (16 + 4)


def test_a_steps_loss_is_the_models_under_the_steps_numbers() -> None:
    task, batch = task_of(drop_path=0.5), batch_of(torch.randn(4, 1, 16, 16))
    task.logs_features = True
    output = task.compute(batch, 3)
    noise, path_noise = task.uniform("mask", batch, 16, 3), task.path_noise(batch, 3)
    assert torch.equal(output.objective, task.model.loss(batch.views[0], noise, path_noise).loss)
    visible, hidden = task.model.mask(noise)
    latent = task.model.encoder(batch.views[0], visible, path_noise=path_noise)
    assert torch.equal(output.features, latent.mean(1))
    target = task.model.target(patchify(batch.views[0], 4))
    hidden, guess = target[mask_of(hidden, 16)], target.mean((0, 1))
    found = measure({"target_moments": output.references["target_moments"][None]})["target_variance"]
    assert found == pytest.approx(float((hidden - guess).square().mean()), rel=1e-5)


def test_a_decoder_starts_with_a_small_random_mask_token_and_xavier_maps() -> None:
    encoder = EncoderSettings(image_size=16, patch=4, width=64, depth=1, heads=2)
    decoder = MAEDecoder(encoder, MAESettings(decoder_width=512, decoder_depth=1, decoder_heads=2))
    assert float(decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    bound = (6 / (64 + 512)) ** 0.5
    assert 0.98 * bound < float(decoder.embed.weight.abs().max()) <= bound
    assert not decoder.embed.bias.any()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_checkpointing_keeps_one_tensor_per_block_of_encoder_and_decoder(stack: str) -> None:
    def kept(depth: int, checkpointing: bool) -> int:
        """Bytes that the backward pass needs."""
        torch.manual_seed(0)
        depths = {"encoder": 1, "decoder": 1} | {stack: depth}
        encoder = EncoderSettings(
            image_size=16, patch=4, width=32, depth=depths["encoder"], heads=2, channels=1,
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        settings = MAESettings(mask_ratio=0.5, decoder_width=32, decoder_depth=depths["decoder"], decoder_heads=2)
        model = MAEModel(settings, encoder)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss(torch.randn(4, 1, 16, 16), torch.rand(4, 16)).loss
        loss.backward()
        return sum(seen.values())

    tokens = {"encoder": 1 + 8, "decoder": 1 + 16}[stack]
    assert kept(5, True) - kept(1, True) <= 4 * (4 * tokens * 32 * 4)  # four blocks' inputs in float32, and no more
    assert kept(5, False) - kept(1, False) > 4 * 8 * (4 * tokens * 32 * 4)


def test_checkpointing_changes_no_gradient_of_the_decoder() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make(activation_checkpointing=checkpointing)
        model.loss(torch.ones(2, 1, 16, 16), torch.arange(32.0).view(2, 16)).loss.backward()
        gradients.append([p.grad for p in model.decoder.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_reconstruction_keeps_visible_pixels_and_fills_the_others() -> None:
    model = make().eval()
    images = torch.randn(3, 1, 16, 16)
    noise = torch.rand(3, 16)
    filled, area = model.reconstruct(images, noise)
    is_hidden = area.bool().expand_as(images)
    assert torch.equal(filled[~is_hidden], images[~is_hidden])
    assert (filled[is_hidden] != images[is_hidden]).all()
    assert patchify(area, 4).mean(2).sum(1).tolist() == [8, 8, 8]


def test_a_reconstruction_is_in_units_of_each_patchs_deviation() -> None:
    model = make().eval()
    images, noise = torch.randn(2, 1, 16, 16) * 3 + 1, torch.rand(2, 16)
    model.decoder.pred.weight.data.zero_()
    model.decoder.pred.bias.data.fill_(2.0)  # predicts two deviations above each patch's mean
    filled, area = model.reconstruct(images, noise)
    patches, hidden = patchify(filled, 4), patchify(area, 4)[:, :, 0].bool()
    originals = patchify(images, 4)
    expected = originals.mean(2, keepdim=True) + 2 * originals.std(2, keepdim=True)
    torch.testing.assert_close(patches[hidden], expected.expand_as(patches)[hidden], atol=1e-4, rtol=1e-4)


def test_reconstruction_undoes_the_normalization_of_each_patch() -> None:
    model = make().eval()
    images = torch.randn(2, 1, 16, 16) * 5 + 3
    model.decoder.pred.weight.data.zero_()
    model.decoder.pred.bias.data.zero_()  # predicts zero deviations from each patch's mean
    filled, area = model.reconstruct(images, torch.rand(2, 16))
    patches, hidden = patchify(filled, 4), patchify(area, 4)[:, :, 0].bool()
    expected = patchify(images, 4).mean(2, keepdim=True).expand_as(patches)
    torch.testing.assert_close(patches[hidden], expected[hidden])


@pytest.mark.parametrize(
    "options",
    [
        {"registers": 2},
        {"class_token": False, "pooling": "mean"},
        {"pos_embed": "rotary_2d"},
        {"pos_embed": "rotary_2d_normalized", "key_bias": False},
        {"pos_embed": "relative_bias"},
        {"fc_norm": True, "mask_token": True},
        {"image_size": [8, 16]},
    ],
)
def test_every_trained_parameter_gets_a_gradient(options: dict) -> None:
    task = task_of(**options)
    height, width = task.encoder.settings.image_size
    task.model.loss(torch.randn(4, 1, height, width), torch.rand(4, height * width // 16)).loss.backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_a_few_steps_lower_the_loss_on_one_batch() -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, noise = torch.randn(8, 1, 16, 16), torch.rand(8, 16)
    losses = []
    for _ in range(60):
        loss = model.loss(images, noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"causal": True}, "Set encoder.causal to false"),
        ({"tokens": "conv_stem"}, "tokens: conv_stem"),
        ({"tokens": "shifted_patch"}, "tokens: shifted_patch"),
        ({"pooling": "attention"}, "Set encoder.pooling"),
        ({"patch": 16}, r"0.5 of 1 patches leaves 0 visible"),
    ],
)
def test_encoders_that_cannot_be_masked_are_refused(encoder: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**encoder)


def test_an_encoder_alone_is_no_mae(tmp_path) -> None:
    model = make(channels=3)
    official = mae_to_state(model)
    weights = {key: value for key, value in official.items() if "decoder" not in key and key != "mask_token"}
    torch.save({"model": weights}, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="needs one with its decoder"):
        load_mae(tmp_path / "encoder.pth", heads=2, decoder_heads=2)
    torch.save({"model": official}, tmp_path / "full.pth")
    again = load_mae(tmp_path / "full.pth", heads=2, decoder_heads=2, mask_ratio=model.settings.mask_ratio)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    torch.testing.assert_close(again.loss(images, noise).loss, model.loss(images, noise).loss)


@pytest.mark.parametrize("side", [8, 16, 24])
def test_other_resolutions_train_and_the_own_one_is_as_it_was(side: int) -> None:
    encoder = EncoderSettings(image_size=16, patch=4, width=16, depth=1, heads=2, channels=1, mean=[0.5], std=[0.5])
    torch.manual_seed(0)
    model = MAEModel(MAESettings(decoder_width=16, decoder_depth=1, decoder_heads=2), encoder)
    images, patches = torch.randn(4, 1, side, side), (side // 4) ** 2
    model.loss(images, torch.rand(4, patches)).loss.backward()
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    table = model.decoder.pos_embed
    assert torch.equal(model.decoder.positions((4, 4)), table)
    cells = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    stretched = torch.nn.functional.interpolate(cells, (side // 4, side // 4), mode="bicubic", antialias=True)
    expected = torch.cat([table[:, :1], stretched.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(model.decoder.positions((side // 4, side // 4)), expected)
    filled, _ = model.reconstruct(images, torch.rand(4, patches))
    assert filled.shape == images.shape
    task = MAE(model.settings, encoder, OptimSettings(), RunPlan(4, 2, 4))
    assert task.compute(batch_of(images), 0).objective.isfinite()  # one number per patch of this size


def released(ratio: float, decoder_ratio: float | None, width: int = 24) -> dict[str, torch.Tensor]:
    """A full checkpoint whose MLPs have these ratios, under the official names."""
    encoder = EncoderSettings(image_size=16, patch=8, width=width, depth=1, heads=1, mlp_ratio=ratio)
    settings = MAESettings(decoder_width=24, decoder_depth=1, decoder_heads=2, decoder_mlp_ratio=decoder_ratio)
    return mae_to_state(MAEModel(settings, encoder))


@pytest.mark.parametrize(("ratio", "decoder_ratio"), [(3.0, None), (4.0, 3.0), (2.5, 4.1), (4.1, 2.0)])
def test_a_released_file_says_the_mlp_ratios_of_encoder_and_decoder(ratio: float, decoder_ratio: float | None) -> None:
    official = released(ratio, decoder_ratio)
    again = mae_from_state(official, heads=1, decoder_heads=2)
    assert again.decoder.blocks[0].mlp.fc1.weight.shape[0] == round(24 * (decoder_ratio or ratio))
    back = mae_to_state(again)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], value) for key, value in official.items())


def test_the_decoder_has_the_ratio_of_the_encoder_as_in_the_papers_code() -> None:
    assert make(mlp_ratio=3.0).decoder.blocks[0].mlp.fc1.weight.shape == (48, 16)


def test_a_released_file_whose_parts_do_not_fit_is_refused_in_a_line() -> None:
    official = released(4.0, None)
    official["decoder_blocks.0.mlp.fc2.weight"] = torch.zeros(24, 95)
    with pytest.raises(
        ValueError, match=r"other shape: decoder.blocks.0.mlp.fc2.weight is \(24, 95\), here \(24, 96\)"
    ):
        mae_from_state(official, heads=1, decoder_heads=2)

"""MAE against numbers of its released code."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from golden_fixtures import Golden

from sslvit.data.batch import Batch
from sslvit.models.transformer import Block
from sslvit.optim import decay_groups, layer_decay_groups, layer_of, warmup_cosine
from sslvit.settings import MAESettings, OptimSettings
from sslvit.tasks.mae import MAE, normalise_patches, patchify, split_by_noise, unpatchify, visible_count


def mae_of(golden: Golden, **settings) -> MAE:
    config = golden.config
    return MAE.from_state(
        golden.under("param/"), config["num_heads"], config["decoder_num_heads"],
        mask_ratio=config["mask_ratio"], **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("mae_model")


def test_patches_are_cut_and_put_together(golden: Golden) -> None:
    patches = patchify(golden["input/imgs"][:2], 8)
    golden.check("output/patchify", patchify(golden["input/imgs"], 8))
    golden.check("output/unpatchify", unpatchify(golden["input/patch_tokens"], 8, (4, 4)))
    assert torch.equal(unpatchify(patches, 8, (4, 4)), golden["input/imgs"][:2])


def test_masks_follow_the_noise(golden: Golden) -> None:
    visible, is_hidden = split_by_noise(golden["input/noise"], 4)
    golden.check("output/mask", is_hidden.float())
    order = golden["output/ids_restore"].argsort(1)
    assert torch.equal(visible, order[:, :4])
    for patches, ratio, kept in golden["output/len_keep_table"].tolist():
        assert visible_count(int(patches), ratio / 1000) == kept


@torch.no_grad()
def test_encoder_and_decoder(golden: Golden) -> None:
    task = mae_of(golden, target="raw").eval()
    images = golden["input/imgs"]
    visible, _ = split_by_noise(golden["input/noise"], 4)
    latent = task.encoder(images, visible)
    golden.check("output/latent", latent)
    golden.check("output/pred", task.decoder(latent, visible))
    golden.check("output/latent_full", task.encoder(images))
    golden.check("output/probe_block0", task.encoder.blocks[0](golden["input/probe_tokens"]))
    golden.check("output/probe_norm", task.encoder.norm(golden["input/probe_tokens"]))
    block: Block = task.decoder.blocks[0]
    golden.check("output/probe_decoder_block0", block(golden["input/probe_decoder_tokens"]))


@pytest.mark.parametrize(("target", "name"), [("raw", "pix"), ("normalised", "norm_pix")])
def test_loss_and_gradients(golden: Golden, target: str, name: str) -> None:
    task = mae_of(golden, target=target)
    loss = task.loss(golden["input/imgs"], golden["input/noise"])
    golden.check(f"output/loss_{name}", loss.detach().view(1))
    loss.backward()
    gradients = {
        key: parameter.grad
        for key, parameter in zip(task.official_state(), task.official_state().values(), strict=True)
    }
    own = dict(task.named_parameters())
    official = dict.fromkeys(gradients)
    for key in own:
        short = key.removeprefix("encoder.") if key.startswith("encoder.") else None
        if short in official:
            official[short] = own[key].grad
    decoder = {
        "mask_token": own["decoder.mask_token"].grad,
        "decoder_pred.weight": own["decoder.pred.weight"].grad,
        "decoder_embed.bias": own["decoder.embed.bias"].grad,
    }
    for key in golden.keys_under(f"grad/{name}/"):
        golden.check(f"grad/{name}/{key}", decoder.get(key, official[key]))


@torch.no_grad()
def test_fixed_position_tables_are_the_ones_we_make(golden: Golden) -> None:
    fresh = MAE(
        MAESettings(decoder_width=32, decoder_depth=2, decoder_heads=4),
        mae_of(golden).encoder.settings, OptimSettings(), total_steps=1, steps_per_epoch=1, global_batch=256,
    )  # fmt: skip
    torch.testing.assert_close(fresh.encoder.pos_embed, golden["param_sincos/pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(fresh.decoder.pos_embed, golden["param_sincos/decoder_pos_embed"], atol=1e-6, rtol=0)
    for target, name in [("raw", "pix"), ("normalised", "norm_pix")]:
        task = mae_of(golden, target=target)
        task.encoder.pos_embed.copy_(fresh.encoder.pos_embed)
        task.decoder.pos_embed.copy_(fresh.decoder.pos_embed)
        loss = task.loss(golden["input/imgs"], golden["input/noise"])
        golden.check(f"output/sincos/loss_{name}", loss.view(1))
    visible, _ = split_by_noise(golden["input/noise"], 4)
    latent = task.encoder(golden["input/imgs"], visible)
    golden.check("output/sincos/latent", latent)
    golden.check("output/sincos/pred", task.decoder(latent, visible))


def test_official_names_come_back(golden: Golden) -> None:
    official = mae_of(golden).official_state()
    assert official.keys() == golden.under("param/").keys()
    for key, value in golden.under("param/").items():
        assert torch.equal(official[key], value), key


def test_flat_patches_do_not_explode() -> None:
    flat = torch.full((1, 2, 12), 0.3)
    torch.testing.assert_close(normalise_patches(flat), torch.zeros_like(flat), atol=1e-3, rtol=0)


class _Replay(MAE):
    """MAE with the masking noise of the fixture."""

    noise: list[torch.Tensor]

    def uniform(self, purpose: str, batch: Batch, columns: int) -> torch.Tensor:
        return self.noise[int(batch.samples[0])]


def test_training_steps_of_the_released_loop(tmp_path) -> None:
    golden = Golden("mae_train_steps")
    config = golden.config
    task = _Replay.from_state(
        golden.under("param/"), config["num_heads"], config["decoder_num_heads"], mask_ratio=config["mask_ratio"]
    )
    updates = config["steps_per_epoch"] // config["accum_iter"]
    task.optim = OptimSettings(weight_decay=config["weight_decay"], min_rate=config["min_lr"])
    task.peak_rate, task.total_steps = config["lr"], config["epochs"] * updates
    task.warmup_steps = config["warmup_epochs"] * updates
    micro = config["steps_per_epoch"] * config["epochs_run"]
    task.noise = [golden[f"input/noise_{k}"] for k in range(micro)]
    everyone = torch.ones(4, dtype=torch.bool)
    batches = [
        Batch([golden[f"input/images_{k}"]], None, torch.full((4,), k), everyone, everyone) for k in range(micro)
    ]
    seen: list[tuple[float, float]] = []
    after: dict[int, dict] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            seen.append((float(module.records["loss"][-1]), trainer.optimizers[0].param_groups[0]["lr"]))
            if (batch_idx + 1) % config["steps_per_epoch"] == 0:
                state = {key: value.clone() for key, value in module.official_state().items()}
                after[batch_idx // config["steps_per_epoch"]] = state

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=config["accum_iter"], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    for k, (loss, rate) in enumerate(seen):
        golden.check(f"output/loss_{k}", torch.tensor([loss]))
        assert k % 2 == 0 or rate == pytest.approx(float(golden[f"output/lr_{k}"]), abs=1e-9)
    for epoch, state in after.items():
        for key, expected in golden.under(f"output/param_after_epoch{epoch}/").items():
            comparable = golden[f"output/comparable/{key}"].bool() if f"output/comparable/{key}" in golden else ...
            start = golden[f"param/{key}"]
            bound = 2e-3 * (expected - start).abs().max()
            difference = (state[key] - expected).abs()[comparable].max()
            assert difference <= bound, f"{key} after epoch {epoch}: {difference:.2e} > {bound:.2e}"


def test_schedules_of_the_released_code() -> None:
    golden = Golden("schedules_mae")
    for name, run in golden.config["lr_runs"].items():
        steps = run["steps_per_epoch"]
        ours = [
            warmup_cosine(epoch * steps, run["lr"], run["min_lr"], run["warmup_epochs"] * steps, run["epochs"] * steps)
            for epoch in golden[f"input/{name}/epoch"].tolist()
        ]  # fmt: skip
        ours = torch.tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(ours, golden[f"output/{name}/lr"], atol=1e-9, rtol=1e-6)
        scaled = golden[f"output/{name}/lr_scaled_group"]
        torch.testing.assert_close(ours * run["lr_scale"], scaled, atol=1e-9, rtol=1e-6)


def test_weight_decay_groups_of_the_released_code() -> None:
    golden = Golden("schedules_mae")
    config = golden.config["pretrain"]
    from sslvit.settings import EncoderSettings

    encoder = EncoderSettings(
        image_size=32, patch=8, width=24, depth=2, heads=2, positions="sincos_2d", interpolate_antialias=False
    )
    task = MAE(
        MAESettings(decoder_width=16, decoder_depth=1, decoder_heads=2),
        encoder, OptimSettings(), total_steps=1, steps_per_epoch=1, global_batch=256,
    )  # fmt: skip
    official = {id(value): key for key, value in _official_parameters(task).items()}
    spared, decayed = decay_groups(task, config["weight_decay"])
    expected = golden.about["info"]["pretrain_groups"]
    assert {official[id(p)] for p in spared["params"]} == set(expected["weight_decay_0"])
    assert {official[id(p)] for p in decayed["params"]} == set(expected["weight_decay"])
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)


def _official_parameters(task: MAE) -> dict[str, torch.nn.Parameter]:
    from sslvit.layouts import mae as layout

    own = dict(task.named_parameters())
    extras = {key: value for key, value in own.items() if key.startswith("decoder.")}
    return layout.from_sslvit({k.removeprefix("encoder."): v for k, v in own.items() if k not in extras}, extras)


def test_layer_wise_rates_of_the_released_code() -> None:
    golden = Golden("schedules_mae")
    config = golden.config["lrd"]
    from sslvit.models import ViTEncoder
    from sslvit.settings import EncoderSettings

    encoder = ViTEncoder(
        EncoderSettings(32, patch=8, width=24, depth=4, heads=2, pooling="mean", fc_norm=True, final_norm=False)
    )  # fmt: skip
    encoder.head = torch.nn.Linear(24, 10)
    groups = layer_decay_groups(encoder.named_parameters(), 4, config["weight_decay"], config["layer_decay"])
    by_id = {id(p): group for group in groups for p in group["params"]}
    names = dict(encoder.named_parameters())
    assert len(golden.about["info"]["lrd"]) == len(names)
    for row in golden.about["info"]["lrd"]:
        group = by_id[id(names[row["name"]])]
        assert layer_of(row["name"], 4) == row["layer_id"]
        assert group["rate_scale"] == pytest.approx(row["lr_scale"], abs=1e-9)
        assert group["weight_decay"] == row["weight_decay"]

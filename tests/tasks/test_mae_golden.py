"""MAE against numbers of its released code."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from golden_fixtures import Golden, check_shape, looks_at

from sslvit.data.batch import Batch
from sslvit.layouts import mae as layout
from sslvit.models import ViTEncoder
from sslvit.models.mae import MAEModel, mask_of, normalize_patches, num_visible, patchify, random_masking, unpatchify
from sslvit.models.transformer import Block
from sslvit.optim import layer_decay_groups, warmup_cosine
from sslvit.optim.groups import layer_of
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, MAESettings, OptimSettings
from sslvit.tasks.mae import MAE
from sslvit.tasks.released import mae_from_state, mae_to_state


def mae_of(golden: Golden, **settings) -> MAEModel:
    config = golden.config
    return mae_from_state(
        golden.under("param/"), config["num_heads"], config["decoder_num_heads"],
        mask_ratio=config["mask_ratio"], **settings,
    )  # fmt: skip


def check_decoder(config, model: MAEModel) -> None:
    """The official names of a decoder against the settings that were read from its weights."""
    settings, block = model.settings, model.decoder.blocks[0]
    assert settings.decoder_width == config["decoder_embed_dim"]
    assert settings.decoder_depth == len(model.decoder.blocks) == config["decoder_depth"]
    assert settings.decoder_heads == block.attn.heads == config["decoder_num_heads"]
    assert block.mlp.fc1.out_features == config["mlp_ratio"] * config["decoder_embed_dim"]


@looks_at("mae_model", "input/imgs", "input/patch_tokens", "output/patchify", "output/unpatchify")
def test_patches_are_cut_and_put_together(golden: Golden) -> None:
    patches = patchify(golden["input/imgs"][:2], 8)
    golden.check("output/patchify", patchify(golden["input/imgs"], 8))
    golden.check("output/unpatchify", unpatchify(golden["input/patch_tokens"], 8, (4, 4)))
    assert torch.equal(unpatchify(patches, 8, (4, 4)), golden["input/imgs"][:2])


@looks_at("mae_model", "input/noise", "output/mask", "output/ids_restore", "output/len_keep_table")
def test_masks_follow_the_noise(golden: Golden) -> None:
    visible, hidden = random_masking(golden["input/noise"], 4)
    golden.check("output/mask", mask_of(hidden, visible.shape[1] + hidden.shape[1]).float())
    order = golden["output/ids_restore"].argsort(1)
    assert torch.equal(visible, order[:, :4])
    assert torch.equal(hidden, order[:, 4:])
    for patches, ratio, kept in golden["output/len_keep_table"].tolist():
        assert num_visible(int(patches), ratio / 1000) == kept


@looks_at(
    "mae_model", "config/*", "param/*", "input/imgs", "input/noise", "input/probe_*", "output/latent*", "output/pred",
    "output/probe_*",
)  # fmt: skip
@torch.no_grad()
def test_encoder_and_decoder(golden: Golden) -> None:
    model = mae_of(golden, target="raw").eval()
    check_shape(golden.config, model.encoder.settings)
    check_decoder(golden.config, model)
    images = golden["input/imgs"]
    assert len(images) == golden.config["batch"]
    assert model.settings.mask_ratio == golden.config["mask_ratio"] == MAESettings().mask_ratio
    visible, _ = random_masking(golden["input/noise"], 4)
    latent = model.encoder(images, visible)
    golden.check("output/latent", latent)
    golden.check("output/pred", model.decoder(latent, visible).pixels)
    golden.check("output/latent_full", model.encoder(images))
    golden.check("output/probe_block0", model.encoder.blocks[0](golden["input/probe_tokens"]))
    golden.check("output/probe_norm", model.encoder.norm(golden["input/probe_tokens"]))
    block: Block = model.decoder.blocks[0]
    golden.check("output/probe_decoder_block0", block(golden["input/probe_decoder_tokens"]))


@looks_at("mae_model", "grad/*", "output/loss_*", "info/*")
def test_loss_and_gradients(golden: Golden) -> None:
    for target, name in [("raw", "pix"), ("normalized", "norm_pix")]:
        model = mae_of(golden, target=target)
        loss = model.loss(golden["input/imgs"], golden["input/noise"]).loss
        golden.check(f"output/loss_{name}", loss.detach().view(1))
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in _official_parameters(model).items()}
        for key in golden.keys_under(f"grad/{name}/"):
            golden.check(f"grad/{name}/{key}", gradients[key])
        norms = golden.info[f"grad_norm_{name}"]
        assert norms.keys() == gradients.keys()
        # what float32 adds to a gradient is a share of the largest ones, also where the gradient itself is small
        for key, norm in norms.items():
            assert float(gradients[key].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), key
    assert mae_to_state(mae_of(golden)).keys() - gradients.keys() == set(golden.info["params_without_grad"])


@looks_at("mae_model", "param_sincos/*", "output/sincos/*")
@torch.no_grad()
def test_fixed_position_tables_are_the_ones_we_make(golden: Golden) -> None:
    fresh = MAEModel(MAESettings(decoder_width=32, decoder_depth=2, decoder_heads=4), mae_of(golden).encoder.settings)
    torch.testing.assert_close(fresh.encoder.pos_embed, golden["param_sincos/pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(fresh.decoder.pos_embed, golden["param_sincos/decoder_pos_embed"], atol=1e-6, rtol=0)
    for target, name in [("raw", "pix"), ("normalized", "norm_pix")]:
        model = mae_of(golden, target=target)
        model.encoder.pos_embed.copy_(fresh.encoder.pos_embed)
        model.decoder.pos_embed.copy_(fresh.decoder.pos_embed)
        loss = model.loss(golden["input/imgs"], golden["input/noise"]).loss
        golden.check(f"output/sincos/loss_{name}", loss.view(1))
    visible, _ = random_masking(golden["input/noise"], 4)
    latent = model.encoder(golden["input/imgs"], visible)
    golden.check("output/sincos/latent", latent)
    golden.check("output/sincos/pred", model.decoder(latent, visible).pixels)


@looks_at("mae_model", "param/*")
def test_official_names_come_back(golden: Golden) -> None:
    official = mae_to_state(mae_of(golden))
    assert official.keys() == golden.under("param/").keys()
    for key, value in golden.under("param/").items():
        assert torch.equal(official[key], value), key


def test_flat_patches_do_not_explode() -> None:
    flat = torch.full((1, 2, 12), 0.3)
    torch.testing.assert_close(normalize_patches(flat), torch.zeros_like(flat), atol=1e-3, rtol=0)


@looks_at("mae_train_steps", "*")
def test_training_steps_of_the_released_loop(golden: Golden, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = golden.config
    model = mae_of(golden)
    check_shape(config, model.encoder.settings)
    check_decoder(config, model)
    assert config["norm_pix_loss"] == (model.settings.target == "normalized")
    for key, share in golden.info["comparable_fraction"].items():  # of all other weights everything is compared
        assert float(golden[f"output/comparable/{key}"].float().mean()) == pytest.approx(share)
    updates = config["steps_per_epoch"] // config["accum_iter"]
    optim = OptimSettings(
        base_lr=config["lr"], min_lr=config["min_lr"], warmup_epochs=config["warmup_epochs"],
        weight_decay=config["weight_decay"],
    )  # fmt: skip
    # at a batch of 256 the base rate is the peak
    plan = RunPlan(config["epochs"] * updates, updates, 256, micro_batch_size=256 // config["accum_iter"])
    task = MAE(model.settings, model.encoder.settings, optim, plan)
    task.model.load_state_dict(model.state_dict())
    micro = config["steps_per_epoch"] * config["epochs_run"]
    noise = [golden[f"input/noise_{k}"] for k in range(micro)]  # instead of the task's own numbers
    monkeypatch.setattr(MAE, "uniform", lambda self, purpose, batch, columns, step: noise[int(batch.samples[0])])
    count = config["batch"]
    everyone = torch.ones(count, dtype=torch.bool)
    batches = [
        Batch([golden[f"input/images_{k}"]], None, torch.full((count,), k), everyone, everyone) for k in range(micro)
    ]
    seen: list[tuple[float, set[float]]] = []
    after: dict[int, dict] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            rates = {group["lr"] for group in trainer.optimizers[0].param_groups}
            seen.append((float(module.records["train/loss"][-1]), rates))
            if (batch_idx + 1) % config["steps_per_epoch"] == 0:
                state = {key: value.clone() for key, value in mae_to_state(module.model).items()}
                after[batch_idx // config["steps_per_epoch"]] = state

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=config["accum_iter"], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    assert len(seen) == micro
    for k, (loss, rates) in enumerate(seen):
        golden.check(f"output/loss_{k}", torch.tensor([loss]))
        # the released loop sets the rate at the first micro-batch of an update, ours at the update itself
        expected = float(golden[f"output/lr_{k}"])
        assert expected == pytest.approx(task.lr_at(k // config["accum_iter"]), abs=1e-9)
        if (k + 1) % config["accum_iter"] == 0:
            assert list(rates) == pytest.approx([expected], abs=1e-9)  # one rate for all groups
    for epoch, state in after.items():
        for key, expected in golden.under(f"output/param_after_epoch{epoch}/").items():
            comparable = golden[f"output/comparable/{key}"].bool() if f"output/comparable/{key}" in golden else ...
            start = golden[f"param/{key}"]
            bound = 2e-3 * (expected - start).abs().max()
            difference = (state[key] - expected).abs()[comparable].max()
            assert difference <= bound, f"{key} after epoch {epoch}: {difference:.2e} > {bound:.2e}"


@looks_at("schedules_mae", "config/lr_runs/*", "input/*", "output/*/lr", "output/*/lr_scaled_group")
def test_schedules_of_the_released_code(golden: Golden) -> None:
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


@looks_at("schedules_mae", "config/pretrain/*", "info/pretrain_groups/*")
def test_weight_decay_groups_of_the_released_code(golden: Golden) -> None:
    config = golden.config["pretrain"]
    encoder = EncoderSettings(
        image_size=config["img_size"], patch=config["patch_size"], width=config["embed_dim"], depth=config["depth"],
        heads=config["num_heads"], mlp_ratio=config["mlp_ratio"], pos_embed="sincos_2d", interpolate_antialias=False,
    )  # fmt: skip
    decoder = MAESettings(
        decoder_width=config["decoder_embed_dim"], decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
    )  # fmt: skip
    task = MAE(decoder, encoder, OptimSettings(weight_decay=config["weight_decay"]), RunPlan(1, 1, 256))
    official = {id(value): key for key, value in _official_parameters(task.model).items()}
    spared, decayed = task.parameter_groups()
    expected = golden.info["pretrain_groups"]
    assert {official[id(p)] for p in spared["params"]} == set(expected["weight_decay_0"])
    assert {official[id(p)] for p in decayed["params"]} == set(expected["weight_decay"])
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, config["weight_decay"])
    assert mae_to_state(task.model).keys() - official.values() == set(expected["not_trained"])


def _official_parameters(model: MAEModel) -> dict[str, torch.nn.Parameter]:
    own = dict(model.named_parameters())
    extras = {key: value for key, value in own.items() if key.startswith("decoder.")}
    return layout.from_sslvit({k.removeprefix("encoder."): v for k, v in own.items() if k not in extras}, extras)


@looks_at("schedules_mae", "config/lrd/*", "info/lrd", "output/lrd/*")
def test_layer_wise_rates_of_the_released_code(golden: Golden) -> None:
    config = golden.config["lrd"]
    depth, is_mean = config["depth"], config["global_pool"]
    encoder = ViTEncoder(EncoderSettings(
        image_size=config["img_size"], patch=config["patch_size"], width=config["embed_dim"], depth=depth,
        heads=config["num_heads"], mlp_ratio=config["mlp_ratio"], pooling="mean" if is_mean else "class",
        fc_norm=is_mean, final_norm=not is_mean,
    ))  # fmt: skip
    encoder.head = torch.nn.Linear(config["embed_dim"], config["num_classes"])
    groups = layer_decay_groups(encoder.named_parameters(), depth, config["weight_decay"], config["layer_decay"])
    by_id = {id(p): group for group in groups for p in group["params"]}
    names = dict(encoder.named_parameters())
    rows = golden.info["lrd"]
    assert len(rows) == len(names)
    for row in rows:
        group = by_id[id(names[row["name"]])]
        assert layer_of(row["name"], depth) == row["layer_id"]
        assert group["lr_scale"] == pytest.approx(row["lr_scale"], abs=1e-9)
        assert group["weight_decay"] == row["weight_decay"]
        assert group["decays"] == (row["weight_decay"] > 0)
    for key in ("layer_id", "lr_scale", "weight_decay"):
        assert golden[f"output/lrd/{key}"].tolist() == [row[key] for row in rows]

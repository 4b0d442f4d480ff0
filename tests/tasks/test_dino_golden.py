"""DINO against numbers of its released code."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from golden_fixtures import Golden, check_shape, looks_at
from torch import nn

from sslvit.data.batch import Batch
from sslvit.layouts import dino as layout
from sslvit.models.dino import DINOHead, DINOModel, apply_head, center_and_sharpen, dino_loss, embed_views
from sslvit.optim import cosine, ema_update, warmup_cosine
from sslvit.optim.guard import clip_by_parameter_norm, grad_norms
from sslvit.run_plan import RunPlan
from sslvit.settings import DINOSettings, EncoderSettings, OptimSettings
from sslvit.tasks.dino import DINO
from sslvit.tasks.released import dino_from_state, load_dino


def head_of(config: dict, state: dict[str, torch.Tensor]) -> DINOHead:
    settings = DINOSettings(
        out_dim=config["out_dim"], head_layers=config["nlayers"], head_width=config["hidden_dim"],
        bottleneck=config["bottleneck_dim"], batch_norm=config["use_bn"], norm_last_layer=config["norm_last_layer"],
    )  # fmt: skip
    head = DINOHead(config["in_dim"], settings)
    head.load_state_dict(state)
    return head


@looks_at(["dino_head_norm_last", "dino_head_free_last", "dino_head_bn", "dino_head_1layer"], "*")
def test_head(golden: Golden) -> None:
    head = head_of(golden.config, golden.under("param/"))
    x = golden["input/x"].clone().requires_grad_()
    assert len(x) == golden.config["batch"]
    bottleneck: list[torch.Tensor] = []
    head.last_layer.register_forward_hook(lambda module, inputs, output: bottleneck.append(inputs[0].detach()))
    golden.check("output/y", head.eval()(x).detach())
    golden.check("output/bottleneck_normalised", bottleneck[0])
    output = head.train()(x)
    if "output/y_train" in golden:
        golden.check("output/y_train", output.detach())
    (output * golden["input/cotangent"]).sum().backward()
    golden.check("grad_input/x", x.grad)
    own = dict(head.named_parameters())
    without = {key for key, parameter in own.items() if parameter.grad is None}
    assert without == set(golden.info["no_grad"])
    for key in golden.keys_under("grad/"):
        golden.check(f"grad/{key}", own[key].grad)
    for key in golden.keys_under("output/after_train/"):
        golden.check(f"output/after_train/{key}", head.state_dict()[key])


def test_a_heads_settings_are_read_from_its_weights() -> None:
    for name in ("norm_last", "bn", "1layer"):
        golden = Golden(f"dino_head_{name}")
        config = golden.config
        shape = layout.head_shape({f"head.{key}": value for key, value in golden.under("param/").items()})
        expected = (config["out_dim"], config["bottleneck_dim"], config["nlayers"], config["use_bn"])
        assert (shape["out_dim"], shape["bottleneck"], shape["head_layers"], shape["batch_norm"]) == expected
        assert config["nlayers"] == 1 or shape["head_width"] == config["hidden_dim"]


def tiny_task(steps_per_epoch: int = 1, **changes) -> DINO:
    """A task whose networks do not matter, for its schedules and its loss."""
    encoder = EncoderSettings(image_size=16, patch=4, width=24, depth=1, heads=2)
    small = {"out_dim": 16, "head_width": 8, "bottleneck": 4, "momentum": 0.9}
    settings = DINOSettings(**small | changes).fitted(256, 256, 100)
    return DINO(settings, encoder, OptimSettings(), RunPlan(100, steps_per_epoch, 256))


@looks_at("dino_loss", "*")
def test_loss_and_center_over_three_steps(golden: Golden) -> None:
    config = golden.config
    task = tiny_task(
        out_dim=config["out_dim"], warmup_teacher_temp=config["warmup_teacher_temp"],
        teacher_temp=config["teacher_temp"], warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"],
        center_momentum=config["center_momentum"],
    )  # fmt: skip
    model = task.model
    schedule = [task.teacher_temp_at(epoch) for epoch in range(config["nepochs"])]
    torch.testing.assert_close(
        torch.tensor(schedule, dtype=torch.float64), golden["output/teacher_temp_schedule"].double(), atol=1e-7, rtol=0
    )
    assert config["steps"] == len(config["epochs_of_steps"])
    for step, epoch in enumerate(config["epochs_of_steps"]):
        student = golden[f"input/student_step{step}"].clone().requires_grad_()
        outputs = golden[f"input/teacher_step{step}"].unflatten(0, (2, config["batch"]))
        targets = model.targets(outputs, schedule[epoch])
        torch.testing.assert_close(targets, center_and_sharpen(outputs, model.center, schedule[epoch]))
        logits = student.unflatten(0, (config["ncrops"], config["batch"])) / config["student_temp"]
        loss = dino_loss(targets, logits)
        golden.check(f"output/loss_step{step}", loss.detach().view(1))
        loss.backward()
        golden.check(f"grad/student_step{step}", student.grad)
        model.update_center(torch.zeros(()))
        golden.check(f"output/center_step{step}", model.center[None])


@looks_at("dino_step_ops", "config/clips", "info/names", "input/*", "output/clip*")
def test_each_gradient_is_clipped_by_its_own_norm(golden: Golden) -> None:
    names = golden.info["names"]
    for clip in golden.config["clips"]:
        gradients = [golden[f"input/grad/{name}"].clone() for name in names]
        norms = grad_norms(gradients)
        clip_by_parameter_norm(gradients, norms, clip)
        prefix = f"output/clip{clip:g}"
        golden.check(f"{prefix}/norms", norms.double())
        for name, gradient in zip(names, gradients, strict=True):
            golden.check(f"{prefix}/clipped/{name}", gradient)


@looks_at("dino_step_ops", "config/head/*", "config/momenta", "param/*", "output/ema_*")
def test_the_teacher_follows_the_student(golden: Golden) -> None:
    for momentum in golden.config["momenta"]:
        teacher, student = (
            head_of(golden.config["head"], golden.under(f"param/{name}.")) for name in ("teacher", "student")
        )
        ema_update(teacher, student, momentum, torch.zeros(()))
        for key, parameter in teacher.named_parameters():
            golden.check(f"output/ema_m{momentum:g}/{key}", parameter.detach())


@looks_at("dino_step_ops", "info/frozen")
def test_the_last_layer_is_frozen_in_the_epochs_that_the_released_code_freezes_it(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in golden.info["frozen"]:
        task = tiny_task(steps_per_epoch=3, freeze_last_layer=case["freeze_last_layer"], norm_last_layer=False)
        for parameter in task.parameters():
            parameter.grad = torch.ones_like(parameter)
        for step in range(3 * case["epoch"], 3 * case["epoch"] + 3):
            monkeypatch.setattr(DINO, "global_step", step)
            task.configure_gradient_clipping(task.configure_optimizers())
            without = {f"last_layer.{k}" for k, p in task.model.head.last_layer.named_parameters() if p.grad is None}
            assert without == set(case["without_grad"])
            others = [name for name, p in task.named_parameters() if p.grad is None and ".head.last_layer" not in name]
            assert not others


@looks_at("multi_crop", "*")
def test_crops_of_one_size_go_through_the_encoder_together(golden: Golden) -> None:
    student = golden.under("param/")
    model = dino_from_state(student, student, golden.config["vit"]["num_heads"]).eval()
    assert not model.settings.norm_last_layer  # its prototypes have other lengths than one
    check_shape(golden.config["vit"], model.encoder.settings)
    check_head(golden.config["head"], model)
    for i, side in enumerate(golden.config["crop_sizes"]):
        assert golden[f"input/crop_{i}"].shape == (golden.config["batch"], 3, side, side)
    calls: list[list[int]] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: calls.append(list(inputs[0].shape)))
    for name, order in golden.config["orders"].items():
        calls.clear()
        views = [golden[f"input/crop_{i}"] for i in order]
        with torch.no_grad():
            outputs = apply_head(model.head, embed_views(model.encoder, views))
        golden.check(f"output/{name}/y", outputs.flatten(0, 1))
        assert calls == golden.info["backbone_batches"][name]


@looks_at("schedules_dino", "config/runs/*", "output/*")
def test_schedules_of_the_released_code(golden: Golden) -> None:
    for name, run in golden.config["runs"].items():
        total = run["epochs"] * run["niter_per_ep"]
        if "warmup_epochs" in run:
            warmup = run["warmup_epochs"] * run["niter_per_ep"]
            start = run.get("start_warmup_value", 0.0)
            ours = [
                warmup_cosine(step, run["base_value"], run["final_value"], warmup, total, start, twice_at_peak=True)
                for step in range(total)
            ]
        else:
            ours = [cosine(step, run["base_value"], run["final_value"], total) for step in range(total)]
        ours = torch.tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(ours, golden[f"output/{name}"], atol=1e-9, rtol=1e-6)


@looks_at("schedules_dino", "config/vit/*", "config/head/*", "info/*")
def test_weight_decay_groups_of_the_released_code(golden: Golden) -> None:
    for unit_length in (True, False):
        check_decay_groups(golden, unit_length)


def check_decay_groups(golden: Golden, unit_length: bool) -> None:
    vit, head = golden.config["vit"], golden.config["head"]
    encoder = EncoderSettings(
        image_size=vit["img_size"], patch=vit["patch_size"], width=vit["embed_dim"], depth=vit["depth"],
        heads=vit["num_heads"], mlp_ratio=vit["mlp_ratio"],
    )  # fmt: skip
    settings = DINOSettings(
        out_dim=head["out_dim"], head_width=head["hidden_dim"], bottleneck=head["bottleneck_dim"],
        batch_norm=head["use_bn"], norm_last_layer=unit_length, head_layers=head["nlayers"],
    ).fitted(256, 256, 1)  # fmt: skip
    task = DINO(settings, encoder, OptimSettings(), RunPlan(1, 1, 256))
    assert (head["in_dim"], head["norm_last_layer"]) == (encoder.width, True)  # the other kind has its list too
    names = {id(p): name.replace("encoder.", "backbone.") for name, p in task.model.named_parameters()}
    spared, decayed = ({names[id(p)] for p in group["params"]} for group in task.parameter_groups())
    expected = golden.info["groups"][f"norm_last_layer={unit_length}"]
    assert spared == set(expected["not_regularized"])
    assert decayed == set(expected["regularized"])
    student = [name for name in names.values() if not name.startswith("teacher")]
    assert set(student) - spared - decayed == set(expected["not_trained"])


@looks_at("dino_train_steps", "*")
def test_training_steps_of_the_released_loop(golden: Golden, tmp_path) -> None:
    config = golden.config
    networks = {name: golden.under(f"param/{name}.") for name in ("student", "teacher")}
    model = dino_from_state(
        networks["student"], networks["teacher"], config["vit"]["num_heads"],
        teacher_temp=config["teacher_temp"], warmup_teacher_temp=config["warmup_teacher_temp"],
        warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"], momentum=config["momentum_teacher"],
        freeze_last_layer=config["freeze_last_layer"],
    )  # fmt: skip
    check_shape(config["vit"], model.encoder.settings)
    check_head(config["head"], model)
    for key, share in golden.info["comparable_fraction"].items():  # of all other weights everything is compared
        assert float(golden[f"output/comparable/{key}"].float().mean()) == pytest.approx(share)
    per_epoch, micro = config["steps_per_epoch"], config["steps_per_epoch"] * config["epochs_run"]
    optim = OptimSettings(
        base_lr=config["lr"], min_lr=config["min_lr"], weight_decay=config["weight_decay"],
        final_weight_decay=config["weight_decay_end"], betas=[0.9, 0.999], clip_grad=config["clip_grad"],
        clip_grad_by="parameter", warmup_epochs=config["warmup_epochs"],
    )  # fmt: skip
    # at a batch of 256 the base rate is the peak
    task = DINO(model.settings, model.encoder.settings, optim, RunPlan(config["epochs"] * per_epoch, per_epoch, 256))
    task.model.load_state_dict(model.state_dict())
    momenta = [task.momentum_at(step) for step in range(task.run.total_steps)]
    torch.testing.assert_close(
        torch.tensor(momenta, dtype=torch.float64), golden["output/momentum_schedule"], atol=1e-9, rtol=0
    )
    everyone = torch.ones(config["batch"], dtype=torch.bool)
    batches = [
        Batch(
            [golden[f"input/crops/it{k}_crop{i}"] for i in range(len(config["crop_sizes"]))],
            None, torch.arange(config["batch"]), everyone, everyone,
        )
        for k in range(micro)
    ]  # fmt: skip
    assert [view.shape[-1] for view in batches[0].views] == config["crop_sizes"]
    after: dict[int, dict[str, dict]] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, k) -> None:
            golden.check(f"output/loss_{k}", module.records["train/loss"][-1].view(1))
            golden.check(f"output/center_{k}", module.model.center[None])
            spared, decayed = trainer.optimizers[0].param_groups
            assert spared["lr"] == decayed["lr"] == pytest.approx(float(golden["output/lr_schedule"][k]), abs=1e-9)
            assert spared["weight_decay"] == 0
            assert decayed["weight_decay"] == pytest.approx(float(golden["output/wd_schedule"][k]), abs=1e-9)
            if (k + 1) % per_epoch == 0:
                after[k // per_epoch] = {
                    "student": _official(module.model.encoder, module.model.head),
                    "teacher": _official(module.model.teacher, module.model.teacher_head),
                }

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch()], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    assert len(after) == config["epochs_run"]
    for epoch, pair in after.items():
        for network, state in pair.items():
            for key, expected in golden.under(f"output/{network}_after_epoch{epoch}/").items():
                comparable = golden[f"output/comparable/{key}"].bool() if f"output/comparable/{key}" in golden else ...
                bound = 2e-3 * (expected - networks[network][key]).abs().max()
                difference = (state[key] - expected).abs()[comparable].max()
                assert difference <= bound, f"{network} {key} after epoch {epoch}: {difference:.2e} > {bound:.2e}"


def check_head(config, model: DINOModel) -> None:
    """The official names of a head against the settings that were read from its weights."""
    settings = model.settings
    ours = {
        "in_dim": model.encoder.settings.width, "out_dim": settings.out_dim, "hidden_dim": settings.head_width,
        "bottleneck_dim": settings.bottleneck, "nlayers": settings.head_layers, "use_bn": settings.batch_norm,
        "norm_last_layer": settings.norm_last_layer,
    }  # fmt: skip
    assert dict(config) == ours


def _official(encoder: nn.Module, head: nn.Module) -> dict[str, torch.Tensor]:
    parts = (("backbone.", encoder), ("head.", head))
    return {prefix + key: value.clone() for prefix, part in parts for key, value in part.state_dict().items()}


def test_the_full_checkpoint_loads_with_heads_and_center(tmp_path) -> None:
    golden = Golden("dino_train_steps")
    content = {"student": {f"module.{k}": v for k, v in golden.under("param/student.").items()}}
    content["teacher"] = golden.under("param/teacher.")
    content["dino_loss"] = {"center": golden["output/center_3"]}
    torch.save(content, tmp_path / "full.pth")
    model = load_dino(tmp_path / "full.pth", heads=golden.config["vit"]["num_heads"])
    for network, state in (
        ("student", _official(model.encoder, model.head)), ("teacher", _official(model.teacher, model.teacher_head)),
    ):  # fmt: skip
        expected = golden.under(f"param/{network}.")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(model.center, golden["output/center_3"][0])
    assert model.settings.norm_last_layer
    torch.save(content["teacher"], tmp_path / "one.pth")
    with pytest.raises(ValueError, match="no student and teacher"):
        load_dino(tmp_path / "one.pth", heads=2)

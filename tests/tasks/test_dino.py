"""DINO's behavior beyond the fixtures."""

from __future__ import annotations

import math

import pytest
import torch

from sslvit.data.batch import Batch
from sslvit.layouts import dino as layout
from sslvit.models.dino import (
    DINOHead,
    DINOModel,
    apply_head,
    dino_loss,
    embed_views,
    koleo_loss,
    sinkhorn_knopp,
)
from sslvit.run_plan import RunPlan
from sslvit.settings import DINOSettings, EncoderSettings, OptimSettings
from sslvit.settings.task import momentum_for, prototypes_for
from sslvit.tasks.dino import DINO
from sslvit.tasks.released import load_dino


def make(task: dict | None = None, **encoder) -> DINO:
    torch.manual_seed(0)
    encoder = EncoderSettings(
        **{"image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2, "channels": 1} | encoder
    )
    settings = DINOSettings(**{"out_dim": 12, "head_width": 16, "bottleneck": 8} | (task or {})).fitted(1280, 256, 100)
    return DINO(settings, encoder, OptimSettings(), RunPlan(100, 5, 256))


def batch_of(count: int = 6, local_crops: int = 2, first_row: int = 0) -> Batch:
    noise = torch.Generator().manual_seed(first_row)
    sides = [16, 16] + [8] * local_crops
    views = [torch.randn(count, 1, side, side, generator=noise) for side in sides]
    return Batch(
        views, None, torch.arange(count), torch.ones(count, dtype=torch.bool), torch.zeros(count), first_row
    )  # fmt: skip


def test_a_view_is_never_compared_with_itself() -> None:
    """Teacher view t names image b by prototype t, and so does the student: every other pair is wrong, and counts."""
    targets = torch.eye(3)[:2, None].expand(2, 4, 3)  # t b k
    logits = 50 * torch.eye(3)[:, None].expand(3, 4, 3)  # s b k
    assert dino_loss(targets, logits) == pytest.approx(50, rel=1e-4)
    one_of_them = logits.clone()
    one_of_them[1] = logits[0]  # student view 1 agrees with teacher view 0 now: one of the four pairs is right
    assert dino_loss(targets, one_of_them) == pytest.approx(50 * 3 / 4, rel=1e-4)
    shares = torch.rand(2, 5, 7).softmax(-1)
    scores = torch.randn(4, 5, 7)
    plain = [
        -(shares[t] * scores[s].log_softmax(-1)).sum(-1).mean() for t in range(2) for s in range(4) if s != t
    ]  # fmt: skip
    torch.testing.assert_close(dino_loss(shares, scores), torch.stack(plain).mean())


def test_the_teacher_gets_no_gradient_and_is_what_is_saved() -> None:
    task = make()
    task.compute(batch_of(), 0).objective.backward()
    assert all(
        p.grad is None for network in (task.model.teacher, task.model.teacher_head) for p in network.parameters()
    )
    without = [n for n, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []  # and every trained weight gets one
    assert task.trained_encoder is task.model.teacher
    assert not task.model.head.last_layer.weight_g.requires_grad
    assert make({"norm_last_layer": False}).model.head.last_layer.weight_g.requires_grad


def test_teacher_and_student_start_alike_also_from_another_encoder() -> None:
    task, other = make(), make()
    other.encoder.cls_token.data += 1
    task.start_from(other.encoder, "other")
    for student, teacher in ((task.encoder, task.model.teacher), (task.model.head, task.model.teacher_head)):
        for key, value in student.state_dict().items():
            assert torch.equal(value, teacher.state_dict()[key])
    assert torch.equal(task.model.teacher.cls_token, other.encoder.cls_token)


def test_stochastic_depth_is_the_students_alone_and_follows_the_rows() -> None:
    task = make(drop_path=0.5)
    assert task.model.teacher.settings.drop_path == 0
    whole = batch_of(8)
    noise = task.path_noise(whole, 0, views=4)  # branches (v b)
    half = Batch(
        [view[4:] for view in whole.views], None, whole.samples[4:], whole.valid[4:], whole.epochs[4:], first_row=4
    )  # fmt: skip
    by_view = noise.view(-1, 4, 8)
    torch.testing.assert_close(task.path_noise(half, 0, views=4).view(-1, 4, 4), by_view[:, :, 4:])
    assert len(by_view.flatten().unique()) == by_view.numel()
    torch.testing.assert_close(
        embed_views(task.encoder, half.views, task.path_noise(half, 0, 4)),
        embed_views(task.encoder, whole.views, noise)[:, 4:],
    )


def test_grouped_crops_give_what_single_crops_give() -> None:
    task = make().eval()
    views = batch_of().views
    together = embed_views(task.encoder, views)
    alone = torch.stack([task.encoder.features(view) for view in views])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_logits_and_loss_are_float32_under_bf16() -> None:
    task = make()
    with torch.autocast("cpu", torch.bfloat16):
        features = embed_views(task.encoder, batch_of().views)
        logits = apply_head(task.model.head, features)
        loss = task.compute(batch_of(), 0).objective.detach()
    assert logits.dtype == loss.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # not merely bf16 numbers in a larger type
    assert math.isfinite(loss)


def test_sinkhorn_uses_every_prototype_equally_and_keeps_each_images_preference() -> None:
    outputs = torch.randn(2, 30, 6)
    outputs[..., 0] += 3  # all images like prototype 0 most
    shares = sinkhorn_knopp(outputs, 0.2, iterations=50)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 30), atol=1e-5, rtol=0)
    torch.testing.assert_close(shares.sum((0, 1)), torch.full((6,), 10.0), atol=1e-2, rtol=0)
    plain = sinkhorn_knopp(outputs, 0.2, iterations=3)
    torch.testing.assert_close(plain, sinkhorn_knopp(outputs + 100, 0.2, iterations=3), atol=1e-4, rtol=0)
    unloved = torch.randn(1, 20, 4)
    unloved[..., 3] = -400  # nobody's choice: its scores underflow
    shares = sinkhorn_knopp(unloved, 0.04, iterations=3)
    assert shares.isfinite().all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 20), atol=1e-4, rtol=0)
    model = make({"centering": "sinkhorn"}).model
    model.loss(batch_of().views, teacher_temp=0.04)
    model.update_center(torch.zeros(()))
    assert not model.center.any()


def test_koleo_is_large_where_images_coincide() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0, 2.3])
    points = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [2.0], [3.0]])
    chord = 2 * torch.sin(torch.tensor([0.05, 0.15]))
    torch.testing.assert_close(koleo_loss(points), -chord.log().mean(), atol=1e-4, rtol=0)
    assert koleo_loss(points[[0, 0, 2]]) > koleo_loss(points[:3]) + 2
    task, plain = make({"koleo": 0.5}), make()
    output = task.compute(batch_of(), 0)
    extra = sum(koleo_loss(view) for view in embed_views(task.encoder, batch_of().views)[:2])
    torch.testing.assert_close(output.objective, plain.compute(batch_of(), 0).objective + 0.5 * extra)
    torch.testing.assert_close(output.metrics["koleo"], extra)


def test_a_single_image_cannot_be_spread() -> None:
    assert koleo_loss(torch.randn(1, 8)) == koleo_loss(torch.randn(1, 8))  # whatever it is
    with pytest.raises(
        ValueError, match=r"task.koleo: 0.1 spreads .*Raise train.micro_batch_size or data.global_batch_size, or"
    ):
        DINOSettings(koleo=0.1).check_micro_batch(1)
    DINOSettings(koleo=0.1).check_micro_batch(2)
    DINOSettings().check_micro_batch(1)


def test_the_center_counts_every_micro_batch_once() -> None:
    whole, parts = make().model, make().model
    views = batch_of(6).views
    whole.loss(views, teacher_temp=0.04)
    for start in (0, 2, 4):
        parts.loss([view[start : start + 2] for view in views], teacher_temp=0.04)
        assert not parts.center.any()  # it moves with the update, not with the micro-batch
    for model in (whole, parts):
        model.update_center(torch.zeros(()))
    assert whole.center.abs().max() > 1e-3
    torch.testing.assert_close(whole.center, parts.center)


def test_images_that_are_not_trained_on_do_not_move_the_center() -> None:
    model = make().model.eval()
    model.loss(batch_of().views, teacher_temp=0.04)
    assert not model.output_sum.any()
    assert model.output_rows == 0


def test_a_step_that_is_skipped_leaves_no_trace_in_center_or_teacher() -> None:
    task, undisturbed = make(), make()
    task.guard.begin_step()
    loss = task.compute(batch_of(6, first_row=100), 0).objective
    assert task.model.output_sum.any()
    task.guard.backward(loss * math.inf)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    optimizer = task.configure_optimizers()
    task.configure_gradient_clipping(optimizer)
    task.optimizer_step(0, 0, optimizer)
    assert task.guard.skipped
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    for model in (task.model, undisturbed.model):
        model.loss(batch_of().views, teacher_temp=0.04)
        model.update_center(torch.zeros(()))
    torch.testing.assert_close(task.model.center, undisturbed.model.center)


def by_hand(model: DINOModel, batch: Batch, probs_of) -> torch.Tensor:
    """The loss of a step: each pair of two views, by the networks' outputs."""
    teacher = [model.teacher_head(model.teacher.features(view)) for view in batch.views[:2]]
    student = [model.head(model.encoder.features(view)) for view in batch.views]
    targets = probs_of(torch.stack(teacher).detach())
    terms = []
    for t in range(2):
        for s, output in enumerate(student):
            if s != t:
                logits = (output / model.settings.student_temp).log_softmax(-1)
                terms.append(-(targets[t] * logits).sum(-1).mean())
    return sum(terms) / len(terms)


def different(task: DINO) -> DINO:
    """Student and teacher as after some steps: each with other weights, and a center that is not zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for network in (task.encoder, task.model.head, task.model.teacher, task.model.teacher_head):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        task.model.center.normal_(std=0.3)
    return task


@pytest.mark.parametrize("step", [0, 4, 5, 14, 15, 99])
@pytest.mark.parametrize(("student", "first", "last"), [(0.1, 0.04, 0.07), (0.25, 0.5, 0.2)])
def test_a_steps_loss_is_by_the_temperatures_of_its_epoch(step: int, student: float, first: float, last: float) -> None:
    """5 steps an epoch and a warm-up of 3 epochs: at first `first`, half way in the second, `last` from then on."""
    task = different(make({
        "student_temp": student, "warmup_teacher_temp": first, "teacher_temp": last,
        "warmup_teacher_temp_epochs": 3,
    }))  # fmt: skip
    temperature = {0: first, 1: (first + last) / 2}.get(step // 5, last)
    batch = batch_of()
    expected = by_hand(task.model, batch, lambda outputs: ((outputs - task.model.center) / temperature).softmax(-1))
    torch.testing.assert_close(task.compute(batch, step).objective, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("iterations", "temperature"), [(1, 0.2), (2, 0.2), (40, 0.2), (2, 0.5)])
def test_sinkhorns_targets_are_those_of_its_iterations_and_temperature(iterations: int, temperature: float) -> None:
    """By hand as in SwAV: rows of prototypes, then columns of images, divided by their sums in turn."""
    task = different(make({
        "centering": "sinkhorn", "sinkhorn_iterations": iterations, "teacher_temp": temperature,
        "warmup_teacher_temp_epochs": 0,
    }))  # fmt: skip

    def probs(outputs: torch.Tensor) -> torch.Tensor:
        table = (outputs.flatten(0, 1).double() / temperature).exp().T
        prototypes, images = table.shape
        table = table / table.sum()
        for _ in range(iterations):
            table = table / table.sum(1, keepdim=True) / prototypes
            table = table / table.sum(0, keepdim=True) / images
        return (table * images).T.unflatten(0, (2, -1)).float()

    batch = batch_of()
    expected = by_hand(task.model, batch, probs)
    torch.testing.assert_close(task.compute(batch, 0).objective, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_the_center_moves_by_its_momentum(momentum: float) -> None:
    model, views = different(make({"center_momentum": momentum})).model, batch_of().views
    before = model.center.clone()
    model.loss(views, teacher_temp=0.04)
    model.update_center(torch.zeros(()))
    outputs = torch.stack([model.teacher_head(model.teacher.features(view)) for view in views[:2]]).detach()
    torch.testing.assert_close(model.center, momentum * before + (1 - momentum) * outputs.mean((0, 1)))


def test_the_teachers_momentum_goes_from_the_first_to_the_last_and_each_step_uses_its_own(monkeypatch) -> None:
    task = different(make({"momentum": 0.8, "final_momentum": 0.96}))
    momenta = [0.96 + (0.8 - 0.96) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)]
    assert [task.momentum_at(step) for step in range(101)] == pytest.approx(momenta)
    pairs = [(task.model.teacher, task.encoder), (task.model.teacher_head, task.model.head)]
    before = [[p.detach().clone() for p in teacher.parameters()] for teacher, _ in pairs]
    task.compute(batch_of(), 50)
    optimizer = task.configure_optimizers()
    # Lightning counts the step within its optimizer's call
    optimizer.step = lambda closure=None: monkeypatch.setattr(DINO, "global_step", 51)
    monkeypatch.setattr(DINO, "global_step", 50)
    task.optimizer_step(0, 0, optimizer)
    for (teacher, student), old in zip(pairs, before, strict=True):
        for now, then, other in zip(teacher.parameters(), old, student.parameters(), strict=True):
            torch.testing.assert_close(now.detach(), momenta[50] * then + (1 - momenta[50]) * other.detach())


def test_the_teacher_drops_nothing_and_gets_no_update_of_its_own() -> None:
    task = make(dropout=0.5, drop_path=0.5).train()
    views = batch_of().views[:2]
    assert torch.equal(embed_views(task.model.teacher, views), embed_views(task.model.teacher, views))
    assert not torch.equal(embed_views(task.encoder, views), embed_views(task.encoder, views))
    moved = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert not moved & {
        id(p) for network in (task.model.teacher, task.model.teacher_head) for p in network.parameters()
    }


def test_a_head_starts_small_and_its_prototypes_of_length_one() -> None:
    torch.manual_seed(0)
    settings = DINOSettings(out_dim=64, head_width=128, bottleneck=32, head_layers=3)
    head = DINOHead(96, settings)
    for layer in (layer for layer in head.mlp if isinstance(layer, torch.nn.Linear)):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    assert [tuple(layer.weight.shape) for layer in head.mlp if isinstance(layer, torch.nn.Linear)] == [
        (128, 96), (128, 128), (32, 128),
    ]  # fmt: skip
    one = torch.eye(32)  # of each direction, so its outputs are the prototypes themselves
    prototypes = head.last_layer(one).T
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(head(torch.randn(5, 96)).abs().max() <= 1 + 1e-6, torch.tensor(True))


def test_recorded_numbers_are_the_loss_without_koleo_and_koleo_without_its_weight() -> None:
    output = make({"koleo": 0.5}).compute(batch_of(), 0)
    loss, koleo = (output.metrics[name] for name in ("loss", "koleo"))
    torch.testing.assert_close(loss, make().compute(batch_of(), 0).objective)
    torch.testing.assert_close(output.objective, loss + 0.5 * koleo)


def test_the_health_check_sees_the_teachers_first_view() -> None:
    task, batch = different(make()), batch_of()
    output, first = task.compute(batch, 99), task.model.teacher.features(batch.views[0])
    torch.testing.assert_close(output.features, first)
    probs = ((task.model.teacher_head(first) - task.model.center) / task.settings.teacher_temp).softmax(-1)
    torch.testing.assert_close(output.probs, probs)


def test_a_released_checkpoint_brings_its_center(tmp_path) -> None:
    model = different(make(channels=3)).model
    networks = {
        name: layout.from_sslvit(encoder.state_dict(), {f"head.{k}": v for k, v in head.state_dict().items()})
        for name, encoder, head in (
            ("student", model.encoder, model.head),
            ("teacher", model.teacher, model.teacher_head),
        )
    }
    torch.save(networks | {"dino_loss": {"center": model.center[None]}}, tmp_path / "full.pth")
    again = load_dino(tmp_path / "full.pth", heads=2)
    assert torch.equal(again.center, model.center)
    for key, value in model.teacher.state_dict().items():
        assert torch.equal(again.teacher.state_dict()[key], value)


def test_what_suits_a_job() -> None:
    imagenet = DINOSettings().fitted(1_281_167, 1024, 125_000)
    assert (imagenet.out_dim, imagenet.momentum) == (65_536, 0.996)  # the paper's
    assert DINOSettings().fitted(1_281_167, 512, 250_000).teacher_temp == 0.04  # the released default
    assert (imagenet.teacher_temp, imagenet.warmup_teacher_temp_epochs) == (0.07, pytest.approx(10, rel=0.01))
    assert [prototypes_for(images) for images in (100, 50_000, 10**9)] == [256, 2048, 65_536]
    assert momentum_for(256, 10**6) == pytest.approx(0.999, abs=1e-5)  # a quarter of the images an update
    assert momentum_for(64, 800) == 0.9875  # an average over a tenth of so short a run
    assert DINOSettings().fitted(50_000, 256, 10**5).teacher_temp == 0.04
    given = {"out_dim": 99, "momentum": 0.9, "teacher_temp": 0.05, "warmup_teacher_temp_epochs": 7.0}
    fitted = DINOSettings(**given).fitted(1_281_167, 1024, 125_000)
    assert {key: getattr(fitted, key) for key in given} == given


def test_what_cannot_work_is_refused_by_name() -> None:
    for changes, message in [
        ({"out_dim": 1}, "task.out_dim: with 1 prototype"),
        ({"momentum": 1.5}, "task.momentum: 1.5 must be in .0, 1."),
        ({"teacher_temp": 0.0}, "task.teacher_temp: 0.0 must be positive"),
        ({"head_layers": 0}, "task.head_layers: 0 must be 1 or more"),
        ({"koleo": -1.0}, "task.koleo: -1.0 must be 0 or more"),
        ({"momentum": 0.99, "final_momentum": 0.9}, "task.final_momentum: 0.9 is below task.momentum"),
    ]:
        with pytest.raises(ValueError, match=message):
            DINOSettings(**changes)
    with pytest.raises(ValueError, match="a pixel sequence is tied to one"):
        make(tokens="pixel", patch=1, class_token=False, pooling="mean")
    with pytest.raises(ValueError, match="in front of a causal encoder, which sees no patch"):
        make(causal=True)
    make(causal=True, pooling="mean").compute(batch_of(), 0)
    with pytest.raises(ValueError, match=r"task.out_dim, .* still null"):
        DINOModel(DINOSettings(), EncoderSettings())


def test_the_rate_never_passes_its_peak() -> None:
    for warmup_epochs in (0, 0.5, 2.1, 30):
        task = make()
        task.warmup_steps = OptimSettings(warmup_epochs=warmup_epochs).warmup_steps(5, 100)
        rates = [task.lr_at(step) for step in range(100)]
        assert max(rates) == pytest.approx(task.peak_lr)
        assert rates[0] == (task.peak_lr if warmup_epochs == 0 else 0)
    assert OptimSettings(warmup_epochs=None).fitted(50, 1000).warmup_epochs == 2
    assert OptimSettings(warmup_epochs=None).fitted(1250, 10**6).warmup_steps(1250, 10**6) == 12_500
    with pytest.raises(ValueError, match="optim.warmup_epochs: still null"):
        OptimSettings(warmup_epochs=None).warmup_steps(5, 100)


def test_the_rate_stays_constant_until_the_cooldown_where_that_is_asked_for() -> None:
    task = make()
    task.optim.lr_schedule = "wsd"
    task.optim.cooldown_fraction = 0.5
    assert [task.lr_at(step) for step in (task.warmup_steps, 49)] == [task.peak_lr] * 2
    assert task.lr_at(75) < task.peak_lr


def test_a_run_shorter_than_its_recipe_still_trains_its_prototypes() -> None:
    assert make({"freeze_last_layer": 2}).frozen_steps == 10
    assert make({"freeze_last_layer": 1000}).frozen_steps == 25  # a quarter of 100
    assert make({"freeze_last_layer": 1}).health_grace_steps == 10  # the warm-up, a tenth of the run
    assert make({"freeze_last_layer": 3}).health_grace_steps == 15  # a network with frozen prototypes has just begun

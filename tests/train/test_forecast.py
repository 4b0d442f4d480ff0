"""What `sslvit plan` says beforehand is what a run does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from run_fixtures import BERT, RECIPES, run, weights
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sslvit.cli import main
from sslvit.models import transformer
from sslvit.run_plan import RunPlan
from sslvit.settings import EncoderSettings, RunSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train.fake_step import FEW, LiveBytes, example, one_chunk
from sslvit.train.fitting import duration
from sslvit.train.forecast import Forecast, forecast, plan_step
from sslvit.train.strategies import make_strategy
from sslvit.train.timing import Clock


def forecast_of(settings: RunSettings, images: int = 100) -> Forecast:
    return forecast(plan_step(settings, images))


@pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_flops_parameters_and_memory_are_those_of_a_real_step(recipe: str, precision: str) -> None:
    large = {"encoder.width": 64, "encoder.image_size": 16, "data.global_batch_size": 32}  # beside kernels' own room
    settings = load_recipe(recipe, RECIPES[recipe] | large | {"train.steps": 9, "train.precision": precision})
    found = forecast_of(settings)
    task = task_class(settings.task.name)(
        settings.task.fitted(100, 32, 9), settings.encoder, settings.optim.fitted(3, 9), RunPlan(9, 3, 32),
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.training_step(example(settings), 0).backward()
    task.zero_grad()
    batch = example(settings, 32)
    if precision == "float64":
        task.double()
        batch.views = [view.double() for view in batch.views]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = task.training_step(batch, 0)
        loss.backward()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(changes)) + sum(view.nbytes for view in batch.views)
    assert found.flops_per_image == counter.get_total_flops() // FEW
    assert found.peak == pytest.approx(peak, rel=0.05)
    assert found.trained == sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert found.encoder == sum(p.numel() for p in task.trained_encoder.parameters())


def test_of_a_batch_in_chunks_one_is_computed_and_the_memory_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, sizes = transformer.Attention(EncoderSettings(width=48, heads=12)), []
    monkeypatch.setattr(transformer, "WEIGHTS_AT_ONCE", 1)  # one image at a time
    weights = transformer._weights
    monkeypatch.setattr(transformer, "_weights", lambda query, *rest: sizes.append(len(query)) or weights(query, *rest))

    def peak() -> int:
        tokens = torch.zeros(32, 17, 48, requires_grad=True)
        with LiveBytes([tokens, *attention.parameters()]) as live, torch.autocast("cpu", torch.bfloat16):
            attention(tokens).float().sum().backward()
        attention.zero_grad()
        return live.peak

    of_all = peak()
    assert sizes == [1] * 2 * 32  # forward and backward
    sizes.clear()
    with one_chunk(attention):
        assert peak() == pytest.approx(of_all, rel=0.02)  # but for the results of the chunk before
    assert sizes == [1] * 2


def test_a_forecast_for_a_cpu_computes_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"encoder.width": 48, "encoder.heads": 12, "encoder.image_size": 28, "train.precision": "bf16"}
    settings, sizes = load_recipe("mae/digits", RECIPES["mae/digits"] | changes | {"data.global_batch_size": 32}), []
    monkeypatch.setattr(transformer, "WEIGHTS_AT_ONCE", 1)
    weights = transformer._weights
    monkeypatch.setattr(transformer, "_weights", lambda query, *rest: sizes.append(len(query)) or weights(query, *rest))
    step = plan_step(settings, 100)
    step.peak(32, 1)
    few = len(sizes)
    step.peak(16, 1)
    assert set(sizes) == {1}
    assert len(sizes) == 2 * few


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_weights_moments_and_gradients_are_those_of_a_real_step(recipe: str) -> None:
    """Byte by byte, whatever share of the whole they are."""
    settings = load_recipe(recipe, {**RECIPES[recipe], "train.steps": 9})
    found = forecast_of(settings)
    task = task_class(settings.task.name)(
        settings.task.fitted(100, 8, 9), settings.encoder, settings.optim.fitted(12, 9), RunPlan(9, 12, 8),
    )  # fmt: skip
    optimizer = task.configure_optimizers()
    task.training_step(example(settings), 0).backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    memory = found.memory("ddp")
    for name, tensors in (("weights", task.state_dict().values()), ("moments", moments), ("gradients", gradients)):
        assert memory[name] == sum(value.numel() * 4 for value in tensors), name


def test_several_ranks_hold_the_buckets_of_their_gradients() -> None:
    def of(**changes):
        changes = RECIPES["mae/digits"] | {"data.global_batch_size": 16} | changes
        return forecast_of(load_recipe("mae/digits", changes))

    one, two = of(**{"train.micro_batch_size": 8}), of(**{"train.devices": 2})
    gradients = 4.0 * one.trained
    alike = ("weights", "moments", "gradients")
    assert [two.memory("ddp")[name] for name in alike] == [one.memory("ddp")[name] for name in alike]
    assert "buckets" not in two.memory("ddp") | one.memory("ddp")  # they are the gradients
    assert two.memory("ddp")["activations"] == two.activations > two.peak - gradients
    passes = of(**{"train.devices": 2, "train.micro_batch_size": 4})
    assert passes.memory("ddp") == passes.memory("ddp") | {"buckets": gradients, "gradients": gradients}
    parts = two.memory("fsdp")
    assert [parts[name] for name in alike] == [one.memory("ddp")[name] / 2 for name in alike]
    assert parts["activations"] == two.activations


@pytest.mark.slow  # measures memory, which other tests beside it leave behind
def test_with_buckets_a_step_of_ddp_holds_what_is_planned(tmp_path: Path) -> None:
    """In a group of one process: what is allocated at once in its second step, besides weights."""
    settings = load_recipe("mae/digits", RECIPES["mae/digits"] | {"encoder.width": 128, "data.global_batch_size": 4})
    settings.train.devices = 2
    found = forecast_of(settings)
    task = task_class("mae")(settings.task, settings.encoder, settings.optim, RunPlan(9, 2, 4))  # fmt: skip
    strategy = make_strategy(settings.train, Clock())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        task.forward = task.training_step
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model = DistributedDataParallel(task, **strategy._ddp_kwargs)
            for _ in range(2):
                model(example(settings, found.run.images_per_pass), 0).backward()
                task.zero_grad()
                distributed.barrier()  # gloo's threads let the buckets go, which the second step replaces
    finally:
        distributed.destroy_process_group()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # of several threads
    memory = found.memory("ddp")
    planned = memory["gradients"] + memory["activations"]
    assert max(accumulate(changes)) == pytest.approx(planned, rel=0.15)
    assert planned + memory["gradients"] > 1.3 * planned  # a second copy would show


def test_steps_and_batches_are_those_of_the_run(shards: Path, tmp_path: Path) -> None:
    changes = {"train.steps": None, "train.epochs": 2.5, "train.micro_batch_size": 4}
    settings = load_recipe("mae/digits", RECIPES["mae/digits"] | changes)
    found = forecast_of(settings, 30)
    plan = found.run
    assert (plan.total_steps, plan.steps_per_epoch) == (8, 3)
    assert (plan.images_per_pass, plan.accumulation_steps) == (4, 2)
    folder = run(shards, tmp_path / "run", **changes)
    assert folder.read_metrics()[-1]["step"] == plan.total_steps
    assert sum(value.numel() for value in weights(folder).values()) == found.total_params


def test_more_work_costs_more(tmp_path: Path) -> None:
    def of(**changes) -> tuple:
        found = forecast_of(load_recipe("igpt/digits", RECIPES["igpt/digits"] | changes))
        return found.flops_per_image, found.total("ddp"), found.hours(1.0, 0.5)

    plain = of()
    assert of(**BERT)[0] > 0
    assert of(**{"encoder.depth": 2})[0] > 1.5 * plain[0]
    assert of(**{"data.global_batch_size": 16})[2] == pytest.approx(2 * plain[2])
    assert of(**{"data.global_batch_size": 16})[1] > plain[1]
    deep = {"encoder.depth": 6}
    assert of(**deep, **{"encoder.activation_checkpointing": True})[1] < of(**deep)[1]
    assert of(**{"train.devices": 2})[2] == pytest.approx(plain[2] / 2)


def test_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "--config", "dino/digits", "--images", "1437"]
    assert main([*words, "--tflops", "10", "--utilization", "0.5"]) == 0
    said = capsys.readouterr().out
    for part in ("parameters   encoder ", "FLOPs ", "memory ", "epochs of 1,437 images", "(10 TFLOP/s, 50% used)"):
        assert part in said
    for more, reason in (
        (["--config", "mae/digits"], "how many images are there"),
        (
            ["--config", "mae/digits", "--images", "3", "--data.global_batch_size", "64"],
            "data.global_batch_size: 64 is more than the 3 images",
        ),
        (["--config", "mae/digits", "--images", "99", "--utilization", "2"], "--utilization 2"),
        (["--config", "mae/digits", "--images", "99", "--memory-gib", "0"], "--memory-gib 0"),
        (
            ["--config", "mae/digits", "--images", "99", "--memory-gib", "8", "--train.accelerator", "cpu"],
            "--memory-gib: the memory of a GPU, but train.accelerator is cpu",
        ),
    ):
        assert main(["plan", *more]) == 1
        assert reason in capsys.readouterr().err


def test_minutes_are_printed_below_an_hour() -> None:
    assert [duration(3600 * hours) for hours in (1234.56, 1.0, 0.75, 0.01, 1e-6)] == [
        "1,234.6 hours", "1.0 hours", "45.0 minutes", "0.6 minutes", "under 0.1 minutes",
    ]  # fmt: skip


# ---- for a GPU that is not here ------------------------------------------------------------------------------------

SMALL = {
    "encoder.image_size": 32, "encoder.patch": 2, "encoder.width": 16, "encoder.depth": 2, "encoder.heads": 4,
    "encoder.drop_path": 0.1, "train.accelerator": "gpu", "task.mask_ratio": 0.1, "task.decoder_depth": 1,
    "task.decoder_width": 16, "data.global_batch_size": 8,
}  # fmt: skip


def test_a_gpu_is_planned_in_bf16_and_what_is_asked_for_on_any_machine() -> None:
    def said(**changes) -> str:
        return forecast_of(load_recipe("mae/digits", RECIPES["mae/digits"] | changes)).text()

    assert "per rank in bf16 on a GPU (" in said(**{"train.accelerator": "gpu", "train.precision": "auto"})
    assert "per rank in float32 on a GPU (" in said(**{"train.accelerator": "gpu", "train.precision": "float32"})
    assert "per rank in bf16 on a CPU (" in said(**{"train.precision": "bf16"})


@pytest.mark.parametrize("changes", [{}, {"encoder.norm": "rms"}])
def test_attention_on_a_gpu_is_planned_without_a_matrix_of_scores(changes: dict) -> None:
    def activations(precision: str, size: int) -> float:
        more = {"encoder.image_size": size, "train.precision": precision, "encoder.depth": 4}
        return forecast_of(load_recipe("mae/digits", SMALL | more | changes)).memory("ddp")["activations"]

    scores = 8 * 4 * (0.9 * 32 * 32 / 4) ** 2 * 2  # of one block, in bf16: 8 images, 4 heads
    large = activations("bf16", 32)
    assert large < 4.6 * activations("bf16", 16)  # four times the patches
    assert large < 0.8 * activations("float32", 32)
    assert large < 4 * 2 * scores


def test_a_learned_bias_leaves_attention_on_a_gpu_fused() -> None:
    changes = {"encoder.image_size": 32, "encoder.pos_embed": "relative_bias", "train.precision": "float32"}
    on_gpu, on_cpu = (
        forecast_of(load_recipe("dino/digits", RECIPES["dino/digits"] | changes | {"train.accelerator": accelerator}))
        for accelerator in ("gpu", "cpu")
    )
    assert on_gpu.peak < 0.6 * on_cpu.peak


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_blocks_that_are_computed_again_are_planned_for_a_gpu(norm: str, precision: str) -> None:
    changes = SMALL | {"train.precision": precision, "encoder.norm": norm, "encoder.qk_norm": True, "encoder.depth": 6}
    kept, again = (
        forecast_of(load_recipe("mae/digits", changes | {"encoder.activation_checkpointing": value}))
        for value in (False, True)
    )
    assert again.peak < 0.6 * kept.peak


def test_a_forecast_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    forecast_of(load_recipe("dino/digits", RECIPES["dino/digits"] | {"train.accelerator": "gpu"}))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fine_tuning_is_planned_with_its_random_erasing() -> None:
    settings = load_recipe("finetune/small_images", {"encoder.preset": "vit_tiny", "data.global_batch_size": 4})
    assert (settings.task.erase, settings.task.mixup) > (0, 0)
    assert forecast(plan_step(settings, 100, 3)).flops_per_image > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "micro", "gib"),
    [("mae/vit_large_in1k", 256, 22.8), ("dino/vit_small_in1k_100", 128, 16.5), ("igpt/medium_in1k", 16, 26.5)],
)
def test_bf16_on_a_gpu_takes_what_torchs_own_fake_gpu_says(recipe: str, micro: int, gib: float) -> None:
    """The numbers are of a step on fake tensors on cuda:0, with the kernels that are chosen on an H100."""
    changes = {"data.global_batch_size": micro, "train.steps": 9, "train.accelerator": "gpu"}
    half, full = (forecast_of(load_recipe(recipe, changes | {"train.precision": precision}), 50_000)
                  for precision in ("bf16", "float32"))  # fmt: skip
    assert half.total("ddp") / 2**30 == pytest.approx(gib, rel=0.01)
    assert half.total("ddp") < 0.75 * full.total("ddp")


MEASURE = """
import gc, resource, sys, torch
from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train import fake_step
from sslvit.train.forecast import forecast, plan_step

torch.set_num_threads(1)
name, micro = sys.argv[1], int(sys.argv[2])
settings = load_recipe(name, {
    "data.global_batch_size": micro, "train.steps": 9, "train.precision": "float32", "train.accelerator": "cpu"})
found = forecast(plan_step(settings, 1_000_000))
task = task_class(settings.task.name)(
    settings.task.fitted(1_000_000, micro, 9), settings.encoder, settings.optim.fitted(99, 9), RunPlan(9, 99, micro))
gc.collect()
status = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
base = int(status.split()[1]) * 1024 - 4 * found.total_params
optimizer = task.configure_optimizers()
batch = fake_step.example(settings, micro)
for _ in range(2):
    task.training_step(batch, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
print(found.total("ddp") / peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "micro"), [("mae/vit_tiny_cifar10", 256), ("dino/vit_small_in1k_100", 4), ("igpt/small_cifar10", 8)]
)
def test_memory_is_within_5_percent_of_what_a_process_takes(recipe: str, micro: int) -> None:
    """In float32: the growth of the process over two whole steps, without the holes of its C library's heap."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, recipe, str(micro)], check=True, capture_output=True, text=True, env=env
    )
    ratio = float(done.stdout.splitlines()[-1])
    assert math.isclose(ratio, 1.0, abs_tol=0.05), ratio

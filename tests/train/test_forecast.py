"""What `sslvit plan` says beforehand is what a run does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
from run_fixtures import BERT, RECIPES, run, weights
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sslvit.cli import main
from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train.forecast import FEW, example, forecast
from sslvit.train.strategies import make_strategy
from sslvit.train.timing import Clock


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_flops_parameters_and_memory_are_those_of_a_real_step(recipe: str) -> None:
    settings = load_recipe(recipe, {**RECIPES[recipe], "train.steps": 9})
    found, _ = forecast(settings, 100)
    task = task_class(settings.task.name)(
        settings.task.fitted(100, 8, 9), settings.encoder, settings.optim.fitted(12, 9), RunPlan(9, 12, 8),
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.training_step(example(settings), 0).backward()
    task.zero_grad()
    batch = example(settings, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task.training_step(batch, 0).backward()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(changes)) + sum(view.numel() * 4 for view in batch.views)
    assert found.flops_per_image == counter.get_total_flops() // FEW
    assert found.peak == pytest.approx(peak, rel=0.1)  # kernels have room of their own
    assert found.trained == sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert found.encoder == sum(p.numel() for p in task.trained_encoder.parameters())


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits"])
def test_weights_moments_and_gradients_are_those_of_a_real_step(recipe: str) -> None:
    """Byte by byte, whatever share of the whole they are."""
    settings = load_recipe(recipe, {**RECIPES[recipe], "train.steps": 9})
    found, _ = forecast(settings, 100)
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
        return forecast(load_recipe("mae/digits", changes), 100)[0]

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
    found, _ = forecast(settings, 100)
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
    found, _ = forecast(settings, 30)
    plan = found.run
    assert (plan.total_steps, plan.steps_per_epoch) == (8, 3)
    assert (plan.images_per_pass, plan.accumulation_steps) == (4, 2)
    folder = run(shards, tmp_path / "run", **changes)
    assert folder.read_metrics()[-1]["step"] == plan.total_steps
    assert sum(value.numel() for value in weights(folder).values()) == found.total_params


def test_more_work_costs_more(tmp_path: Path) -> None:
    def of(**changes) -> tuple:
        found, _ = forecast(load_recipe("igpt/digits", RECIPES["igpt/digits"] | changes), 100)
        return found.flops_per_image, sum(found.memory("ddp").values()), found.hours(1.0, 0.5)

    plain = of()
    assert of(**BERT)[0] > 0
    assert of(**{"encoder.depth": 2})[0] > 1.5 * plain[0]
    assert of(**{"data.global_batch_size": 16})[2] == pytest.approx(2 * plain[2])
    assert of(**{"data.global_batch_size": 16})[1] > plain[1]
    deep = {"encoder.depth": 6}
    assert of(**deep, **{"encoder.activation_checkpointing": True})[1] < of(**deep)[1]
    assert of(**{"train.devices": 2})[2] == pytest.approx(plain[2] / 2)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "--config", "dino/digits", "--images", "1437", "--figure", str(tmp_path / "s.png")]
    assert main([*words, "--tflops", "10", "--utilization", "0.5"]) == 0
    said = capsys.readouterr().out
    for part in ("parameters   encoder ", "FLOPs ", "memory ", "epochs of 1,437 images", "(10 TFLOP/s, 50% used)"):
        assert part in said
    assert (tmp_path / "s.png").exists()
    for more, reason in (
        (["--config", "mae/digits"], "how many images are there"),
        (
            ["--config", "mae/digits", "--images", "3", "--data.global_batch_size", "64"],
            "data.global_batch_size: 64 is more than the 3 images",
        ),
        (["--config", "mae/digits", "--images", "99", "--utilization", "2"], "--utilization 2"),
        (["--config", "finetune/small_images", "--images", "999", "--classes", "3"], "Plan it without"),
    ):
        assert main(["plan", *more]) == 1
        assert reason in capsys.readouterr().err


MEASURE = """
import gc, resource, sys, torch
from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train import forecast as plan

torch.set_num_threads(1)
name, micro = sys.argv[1], int(sys.argv[2])
settings = load_recipe(name, {"data.global_batch_size": micro, "train.steps": 9})
found, _ = plan.forecast(settings, 1_000_000)
task = task_class(settings.task.name)(
    settings.task.fitted(1_000_000, micro, 9), settings.encoder, settings.optim.fitted(99, 9), RunPlan(9, 99, micro))
gc.collect()
status = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
base = int(status.split()[1]) * 1024 - 4 * found.total_params
optimizer = task.configure_optimizers()
batch = plan.example(settings, micro)
for _ in range(2):
    task.training_step(batch, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
print(sum(found.memory("ddp").values()) / peak)
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

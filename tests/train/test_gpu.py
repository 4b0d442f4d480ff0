"""What only a GPU can show; with none, or one, each says why it is skipped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from run_fixtures import RECIPES, losses, run, run_ranks, same
from test_ranks import assert_alike

from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train.fake_step import example
from sslvit.train.forecast import forecast, plan_step

GPU = {"train.accelerator": "gpu"}
needs_one = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_one
@pytest.mark.parametrize(
    ("recipe", "precision", "mode"),
    [*itertools.product(RECIPES, ["float32", "bf16"], ["none"]), ("mae/digits", "bf16", "default")],
)
def test_a_resume_with_repeatable_kernels_is_bit_identical(
    shards: Path, tmp_path: Path, recipe: str, precision: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_resume import interrupted

    options = {**GPU, "encoder.dropout": 0.1, "train.deterministic": True, "train.precision": precision,
               "train.micro_batch_size": 4, "data.workers": 2, "data.memory_limit_mb": 0, "recipe": recipe,
               "train.compile": mode}  # fmt: skip
    whole = run(shards, tmp_path / "whole", **options)
    interrupted(shards, tmp_path / "cut", 5, monkeypatch, **options)
    assert same(run(shards, tmp_path / "cut", resume=True, **options), whole)


@needs_one
def test_a_compiled_run_is_a_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = run_ranks(shards, tmp_path / "plain", **GPU, **{"train.compile": "none"})
    assert not list((tmp_path / "cache").rglob("*.py"))  # what was compiled
    compiled = run_ranks(shards, tmp_path / "compiled", **GPU, **{"train.compile": "default"})
    assert list((tmp_path / "cache").rglob("*.py"))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


@needs_one
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("recipe", "micro"),
    [("mae/vit_base_in1k", 32), ("dino/vit_small_in1k_100", 16), ("igpt/small_cifar10", 16)],
)
def test_planned_memory_is_what_the_gpu_holds(recipe: str, micro: int, precision: str) -> None:
    """Within 15 %."""
    settings = load_recipe(recipe, {
        **GPU, "data.global_batch_size": micro, "train.steps": 9, "train.devices": 1, "train.nodes": 1,
        "train.precision": precision,
    })  # fmt: skip
    found = forecast(plan_step(settings, 1_000_000))
    task = task_class(settings.task.name)(
        settings.task.fitted(1_000_000, micro, 9), settings.encoder, settings.optim.fitted(99, 9),
        RunPlan(9, 99, micro),
    ).cuda()  # fmt: skip
    optimizer, batch = task.configure_optimizers(), example(settings, micro).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = task.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found.total("ddp") == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


@needs_two
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_gpus_train_as_one(shards: Path, tmp_path: Path, recipe: str, strategy: str) -> None:
    options = {**GPU, "train.precision": "float64", "recipe": recipe}
    one = run_ranks(shards, tmp_path / "one", **options)
    two = run_ranks(shards, tmp_path / "two", **options, **{"train.devices": 2, "train.strategy": strategy})
    assert_alike(one, two)

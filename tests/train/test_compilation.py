"""A compiled step is the same step: one program per size of views, the same names, and nothing is left of it after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_fixtures import BERT, RECIPES, losses, run, run_ranks, weights

from sslvit.models.transformer import Block
from sslvit.run_plan import RunPlan
from sslvit.settings import TrainSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import make_task
from sslvit.tasks.base import Task
from sslvit.train.compilation import blocks, compile_task, undo_compilation
from sslvit.train.fake_step import example
from sslvit.train.hardware import compile_mode, tf32_beside_bf16

KINDS = {
    "mae": ("mae/digits", {"encoder.drop_path": 0.1}),
    "dino": ("dino/digits", {"task.koleo": 0.1, "task.batch_norm": True}),
    "sinkhorn": ("dino/digits", {"task.centering": "sinkhorn"}),
    "igpt": ("igpt/digits", {}),
    "bert": ("igpt/digits", BERT),
    "supervised": ("finetune/small_images", {"task.mixup": 0.0, "task.cutmix": 0.0, "task.erase": 0.0,
                                             "encoder.image_size": 8, "encoder.patch": 4, "encoder.width": 16,
                                             "encoder.depth": 1, "encoder.heads": 2}),
}  # fmt: skip


def task_of(kind: str, ranks: int = 1, micro: int | None = None) -> tuple[Task, Callable]:
    recipe, changes = KINDS[kind]
    settings = load_recipe(recipe, RECIPES.get(recipe, {}) | changes | {"data.global_batch_size": 8, "train.steps": 40})
    torch.manual_seed(0)
    run_plan = RunPlan(40, 4, 8, micro, ranks)
    task = make_task(replace(settings, task=settings.task.fitted(32, 8, 40, 3)), run_plan)
    return task, lambda: example(settings, 4)


def check_one_program(kind: str) -> None:
    """In a process of its own: here the checks of shapes stand between."""
    programs: list[torch.fx.GraphModule] = []
    compile_with = torch.compile

    def traced(function: Callable, mode: str, dynamic: bool) -> Callable:
        assert (mode, dynamic) == ("default", False)
        return compile_with(function, backend=lambda module, _: programs.append(module) or module.forward,
                            fullgraph=True, dynamic=dynamic)  # fmt: skip

    torch.compile = traced
    (plain, batch), (task, _) = task_of(kind), task_of(kind)
    compile_task(task, "default")
    for step in (0, 9, 30):
        plain.logs_features = task.logs_features = step == 9
        expected, found = (each.compute(batch(), step).objective for each in (plain, task))
        torch.testing.assert_close(found, expected)
        found.backward()
    assert len(programs) == 1
    undo_compilation(task)
    assert task.loss_fn == task.model.loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_step_is_one_program_at_every_step_and_the_same_loss(kind: str) -> None:
    """Also when the teacher's temperature rises, and when the health check looks on."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent, here)))}
    code = f"import test_compilation; test_compilation.check_one_program({kind!r})"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_on_several_ranks_each_block_is_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are exchanged while the backward pass goes on."""
    calls: list[Block] = []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda forward, **_: lambda *given, **more: calls.append(forward.__self__) or forward(*given, **more),
    )
    task, batch = task_of("dino", ranks=2)
    names = list(task.state_dict())
    compile_task(task, "default")
    task.compute(batch(), 0)
    assert len({id(block) for block in calls}) == len(blocks(task)) == 2  # of student and teacher
    assert list(task.state_dict()) == names
    undo_compilation(task)
    assert not any("forward" in vars(block) for block in blocks(task))


def test_cuda_graphs_are_refused_where_a_step_has_several_passes() -> None:
    task, _ = task_of("mae", micro=4)
    with pytest.raises(ValueError, match="reduce-overhead takes one pass per step, not 2 of 4 images"):
        compile_task(task, "reduce-overhead")


def test_auto_compiles_on_a_gpu_with_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {True: object(), False: None}
    for has_gpu, has_triton, accelerator, expected in (
        (True, True, "auto", "default"), (True, True, "cpu", None), (True, False, "auto", None),
        (False, True, "auto", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        monkeypatch.setattr("sslvit.train.hardware.find_spec", lambda _, has_triton=has_triton: found[has_triton])
        assert compile_mode(TrainSettings(accelerator=accelerator)) == expected
    assert compile_mode(TrainSettings(compile="none")) is None
    assert compile_mode(TrainSettings(compile="reduce-overhead")) == "reduce-overhead"


def test_a_run_is_compiled_while_it_trains_and_not_after(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, left = [], []
    monkeypatch.setattr(torch, "compile", lambda loss, **_: lambda *given: calls.append(1) or loss(*given))
    monkeypatch.setattr(
        "sslvit.train.run.plot_pictures", lambda folder, task, *_: left.append(task.loss_fn == task.model.loss)
    )
    run(shards, tmp_path / "run", **{"train.steps": 3, "train.compile": "default"})
    assert len(calls) == 3
    assert left == [True]


@pytest.mark.parametrize(
    ("precision", "accelerator", "expected"),
    [("auto", "auto", "high"), ("bf16", "gpu", "high"), ("float32", "auto", "highest"), ("bf16", "cpu", "highest")],
)
def test_tf32_stands_beside_bf16_on_a_gpu_alone_and_ends_with_the_run(
    precision: str, accelerator: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with tf32_beside_bf16(TrainSettings(precision=precision, accelerator=accelerator)):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.slow
def test_a_compiled_run_trains_alike(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, without the checks of shapes; what was compiled lies in the compiler's cache."""
    options = {"recipe": "mae/digits", "train.steps": 3}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = run_ranks(shards, tmp_path / "plain", **options)
    assert not list((tmp_path / "cache").rglob("*.py"))
    compiled = run_ranks(shards, tmp_path / "compiled", **options, **{"train.compile": "default"})
    assert list((tmp_path / "cache").rglob("*.py"))
    assert weights(compiled).keys() == weights(plain).keys()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert json.loads((compiled.encoder / "encoder.json").read_text())["provenance"]["step"] == 3


@pytest.mark.slow
def test_compiled_blocks_on_two_ranks_train_alike(shards: Path, tmp_path: Path) -> None:
    options = {"recipe": "dino/digits", "train.steps": 3, "train.devices": 2}
    plain = run_ranks(shards, tmp_path / "plain", **options)
    compiled = run_ranks(shards, tmp_path / "compiled", **options, **{"train.compile": "default"})
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)

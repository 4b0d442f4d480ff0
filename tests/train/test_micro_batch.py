"""`train.micro_batch_size: auto`: what fits a GPU by the forecast, and what a run does with it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from run_fixtures import RECIPES, metrics, run, same, weights

from sslvit.cli import main
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings, TrainSettings
from sslvit.settings.load import load_recipe
from sslvit.train import fitting, hardware
from sslvit.train.fake_step import FakeStep
from sslvit.train.fitting import FRAGMENTED, RESERVED, RESERVED_ON_CPU, choose_micro_batch, fit_micro_batch
from sslvit.train.forecast import forecast, plan_step

GPU = {"train.accelerator": "gpu", "train.precision": "bf16", "data.global_batch_size": 12}
LARGE = {"encoder.width": 128, "encoder.depth": 4}  # weights beside which activations are few
RUN = RunPlan(7, 7, 12)


def settings_of(recipe: str = "mae/digits", **changes) -> RunSettings:
    return load_recipe(recipe, RECIPES[recipe] | GPU | changes)


@pytest.fixture(scope="module")
def step() -> FakeStep:
    return plan_step(settings_of(), 100)


def memory_for(step: FakeStep, size: int) -> float:
    """A GPU that is just large enough for so many images at once."""
    reserved = RESERVED if step.on_gpu else RESERVED_ON_CPU
    return (forecast(step, size).total(step.settings.train.strategy) + reserved) / (1 - FRAGMENTED) + 2


def all_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def put_gpu_here(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    """A GPU for the choice alone; the run stays on the CPU."""
    monkeypatch.setattr(fitting, "trains_on_gpu", lambda _: True)
    monkeypatch.setattr(fitting, "gpu_memory", lambda _: memory)


def test_the_largest_divisor_that_fits_is_chosen(step: FakeStep) -> None:
    for size, smaller in ((12, 6), (6, 4), (4, 3), (3, 2), (2, 1), (1, None)):
        memory = memory_for(step, size)
        chosen = choose_micro_batch(step, memory)
        assert chosen.size == chosen.found.run.images_per_pass == size
        assert choose_micro_batch(step, memory - 1000).size == smaller
    assert choose_micro_batch(step, 1e12).size == 12


def test_a_forecast_leaves_room_for_what_it_does_not_count() -> None:
    gib = fitting.usable(80 * 2**30) / 2**30
    assert gib == pytest.approx(70.5)


def test_a_choice_counts_the_ranks_and_what_is_sharded(step: FakeStep) -> None:
    two = plan_step(settings_of(**{"train.devices": 2}), 100)
    assert choose_micro_batch(two, 1e12).size == 6
    assert choose_micro_batch(two, memory_for(two, 3)).size == 3
    sharded = plan_step(settings_of(**{"train.devices": 2, "train.strategy": "fsdp", **LARGE}), 100)
    memory = memory_for(sharded, 3)
    assert choose_micro_batch(sharded, memory).size == 3
    copies = plan_step(settings_of(**{"train.devices": 2, **LARGE}), 100)
    assert choose_micro_batch(copies, memory).size is None


def test_a_choice_is_said_with_its_reason_in_one_line(step: FakeStep) -> None:
    chosen = choose_micro_batch(step, 80 * 2**30)
    said = replace(chosen, found=replace(chosen.found, peak=40 * 2**30)).text()
    assert said == (
        "train.micro_batch_size auto: 12 images at once, of 12 on each rank (40.0 GiB are forecast in bf16, and 70.5 "
        "of the GPU's 80.0 GiB can be planned with)"
    )


def test_where_nothing_fits_the_remedies_are_named(step: FakeStep) -> None:
    nothing = choose_micro_batch(step, 2**30)
    assert nothing.size is None
    assert nothing.text().startswith("train.micro_batch_size: not even 1 image at once would fit: ")
    for remedy in ("encoder.activation_checkpointing true, train.strategy fsdp", "encoder.image_size"):
        assert remedy in nothing.text()
    tried = settings_of(**{"encoder.activation_checkpointing": True, "train.strategy": "fsdp", "train.devices": 2})
    text = choose_micro_batch(plan_step(tried, 100), 2**30).text()
    assert "activation_checkpointing" not in text
    assert "Use more train.devices, or a smaller view" in text


def test_no_fewer_images_are_chosen_than_the_task_needs() -> None:
    step = plan_step(settings_of("dino/digits", **{"task.koleo": 0.1}), 100)
    nothing = choose_micro_batch(step, 2**30)
    assert nothing.size is None
    assert "not even 2 images at once" in nothing.text()
    assert choose_micro_batch(step, memory_for(step, 2)).size == 2


# ---- in a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, None])
def test_a_given_number_is_left_alone(given: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu_here(monkeypatch, 2**30)
    plan = replace(RUN, micro_batch_size=given)
    assert fit_micro_batch(plan, settings_of(**{"train.micro_batch_size": given}), 100, None) == (plan, None)


def test_a_cpu_with_much_memory_takes_all_images_and_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "FakeStep", None)
    assert TrainSettings().micro_batch_size == "auto"
    assert RunPlan.make(TrainSettings(), 7, 12, 0).images_per_pass == 12
    settings = settings_of(**{"train.accelerator": "cpu"})
    assert fit_micro_batch(RUN, settings, 100, None) == (RUN, None)


def test_a_cpu_takes_what_its_free_memory_holds_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(**{"train.accelerator": "cpu"})
    free = memory_for(plan_step(settings, 100), 4)
    monkeypatch.setattr(fitting, "cpu_memory", lambda processes: free)
    monkeypatch.setattr(fitting, "LITTLE", 0)
    plan, notice = fit_micro_batch(RUN, settings, 100, None)
    assert plan.images_per_pass == 4
    assert notice.startswith("train.micro_batch_size auto: 4 images at once, of 12 on each rank (")
    assert "GiB that are free on this machine can be planned with" in notice
    monkeypatch.setattr(fitting, "cpu_memory", lambda processes: 1e12)
    assert fit_micro_batch(RUN, settings, 100, None) == (replace(RUN, micro_batch_size=12), None)
    monkeypatch.setattr(fitting, "cpu_memory", lambda processes: 2**20)  # what is free may grow: it is tried
    plan, notice = fit_micro_batch(RUN, settings, 100, None)
    assert plan.images_per_pass == 1
    assert "not even 1 image at once would fit" in notice


@pytest.mark.parametrize("recipe", ["mae/digits", "dino/digits", "igpt/digits", "mae/vit_base_in1k"])
def test_what_is_too_little_to_be_counted_is_estimated_too_high(recipe: str) -> None:
    settings = load_recipe(recipe, {"train.accelerator": "cpu", "data.global_batch_size": 4})
    assert fitting.rough_bytes(settings, 4) > 1.5 * plan_step(settings, 100).peak(4, 1)


def test_free_memory_is_within_the_limit_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = hardware.cpu_memory()
    assert 0 < free <= all_memory()
    monkeypatch.setattr(hardware, "_group_limits", lambda: [(6 * 2**20, 2**20)])
    assert hardware.cpu_memory() == 5 * 2**20
    assert hardware.cpu_memory(3) == 2**20  # of several, each an equal part of half of all


def test_the_limit_of_a_job_holds_for_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM sets it: on the group of the job, above that of the process."""
    root = tmp_path / "cgroup"
    step = root / "slurm" / "job_7" / "step_0"
    step.mkdir(parents=True)
    for group, limit in ((step, "max"), (step.parent, "4096"), (step.parent.parent, "max")):
        for name, value in (("memory.max", limit), ("memory.current", "1000"), ("memory.stat", "inactive_file 100")):
            (group / name).write_text(value + "\n")
    (tmp_path / "own").write_text("0::/slurm/job_7/step_0\n")
    replaced = {"/sys/fs/cgroup": root, "/sys/fs/cgroup/memory": root / "none", "/proc/self/cgroup": tmp_path / "own"}
    monkeypatch.setattr(hardware, "Path", lambda name: replaced.get(name, Path(name)))
    assert hardware._group_limits() == [(4096, 900)]


def test_a_task_that_cannot_be_counted_takes_all_images_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise TypeError("no values here")

    put_gpu_here(monkeypatch, 2**30)
    monkeypatch.setattr(fitting, "FakeStep", fail)
    plan, notice = fit_micro_batch(RUN, settings_of(), 100, None)
    assert plan == RUN
    assert notice == "train.micro_batch_size auto: all 12 images of each rank at once (no values here)"


@pytest.mark.parametrize("value", ["some", 1.5, 0])
def test_other_values_are_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"train.micro_batch_size: (expected int or auto or null|0 must be positive)"):
        load_recipe("mae/digits", {"train.micro_batch_size": value})


def test_a_run_trains_with_what_fits_and_a_resume_chooses_anew(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = run(shards, tmp_path / "given", **{"train.micro_batch_size": 4})
    step = plan_step(load_recipe("mae/digits", RECIPES["mae/digits"]), 30)
    put_gpu_here(monkeypatch, memory_for(step, 4))
    capsys.readouterr()
    chosen = run(shards, tmp_path / "chosen")
    assert "train.micro_batch_size auto: 4 images at once, of 8 on each rank (" in capsys.readouterr().out
    assert same(given, chosen)
    assert yaml.safe_load(chosen.config.read_text())["train"]["micro_batch_size"] == "auto"

    begun = run(shards, tmp_path / "resumed", **{"train.steps": 7, "train.keep_every": 3})
    begun.checkpoint.with_name("step-00000003.ckpt").rename(begun.checkpoint)
    put_gpu_here(monkeypatch, memory_for(step, 2))
    capsys.readouterr()
    resumed = run(shards, tmp_path / "resumed", resume=True)
    assert "auto: 2 images at once" in capsys.readouterr().out
    assert [line["step"] for line in metrics(resumed)][-1] == 7
    for name, value in weights(resumed).items():
        assert torch.allclose(value, weights(chosen)[name], rtol=1e-3, atol=1e-4), name

    put_gpu_here(monkeypatch, 2**20)
    with pytest.raises(ValueError, match="not even 1 image at once would fit"):
        run(shards, tmp_path / "none")


# ---- sslvit plan -----------------------------------------------------------------------------------------------------

PLAN = ["plan", "--config", "mae/digits", "--images", "100"]


def test_a_plan_for_a_gpus_memory_says_what_auto_would_choose(
    step: FakeStep, capsys: pytest.CaptureFixture
) -> None:  # fmt: skip
    changes = RECIPES["mae/digits"] | {"data.global_batch_size": 12, "train.precision": "bf16"}
    del changes["train.accelerator"]
    words = [*PLAN, *(f"--{key}={json.dumps(value)}" for key, value in changes.items())]
    memory = ["--memory-gib", str(memory_for(step, 3) / 2**30)]
    assert main([*words, *memory]) == 0
    out = capsys.readouterr().out
    assert "batch        12 images: 1 rank x 4 passes x 3" in out
    assert "in bf16 on a GPU (" in out
    assert "micro-batch  train.micro_batch_size auto: 3 images at once, of 12 on each rank (" in out
    assert main([*words, *memory, "--train.micro_batch_size", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"]["micro_batch_size"], found["auto_micro_batch_size"]) == (6, 3)
    assert main([*words, "--memory-gib", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 pass x 12" in out
    assert "not even 1 image at once would fit" in out

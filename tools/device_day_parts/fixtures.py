"""The golden tests on the device, and short runs repeated with deterministic kernels.

The tests are the repository's own. While a test runs, new tensors are created on the device, fixtures are moved there
when they are opened, and Trainers use it.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import golden_fixtures
import pytest
import pytorch_lightning as pl
import torch

from device_day_parts.common import ROOT, Day, in_a_run, last_line, pack_noise, recipe
from device_day_parts.gpu_tests import Recorder, run_pytest

FILES = ("tests/test_golden_encoders.py", "tests/tasks/test_mae_golden.py", "tests/tasks/test_dino_golden.py",
         "tests/tasks/test_igpt_golden.py", "tests/evaluate/test_probes.py", "tests/evaluate/test_protocols.py",
         "tests/test_palette.py")  # fmt: skip
# tests that compare files, names and schedules, and compute nothing on a GPU
LEFT_OUT = ()
STEPS = 20


class OnDevice:
    """Pytest plugin that runs only the golden tests, on a device.

    Args:
        device: Device on which tensors are created.
        is_bf16: Whether to run under autocast, and to record errors of compared tensors instead of failing.
    """

    def __init__(self, device: str, is_bf16: bool) -> None:
        self.device, self.is_bf16 = device, is_bf16
        self.errors: dict[str, list[float]] = defaultdict(list)  # fixture -> relative errors by norm

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = [item for item in items if "golden" in getattr(getattr(item, "callspec", None), "params", {})
                and item.originalname not in LEFT_OUT]  # fmt: skip
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: Any) -> Iterator[Any]:
        golden, make = golden_fixtures.Golden, golden_fixtures.Golden.__init__
        trainer = pl.Trainer

        def open_on_device(fixture: Any, name: str) -> None:
            make(fixture, name)
            fixture.tensors = {key: value.to(self.device) for key, value in fixture.tensors.items()}

        def note(fixture: Any, key: str, ours: torch.Tensor) -> None:
            expected, tolerance = fixture[key], fixture.about["tolerance"]
            atol = tolerance.get("per_tensor_atol", {}).get(key, tolerance["atol"])
            if expected.is_floating_point() and expected.abs().max() > 10 * atol:  # otherwise zero except for rounding
                error = (ours.double().view(expected.shape) - expected.double()).norm() / expected.double().norm()
                self.errors[fixture.name].append(float(error))

        with ExitStack() as changed:
            changed.enter_context(patch.object(golden, "__init__", open_on_device))
            if self.device != "cpu":
                on_it = {"accelerator": "gpu", "devices": 1}
                changed.enter_context(patch.object(pl, "Trainer", lambda **given: trainer(**given | on_it)))
            if self.is_bf16:
                changed.enter_context(patch.object(golden, "check", note))
                changed.enter_context(torch.autocast(self.device.split(":")[0], torch.bfloat16))
            changed.enter_context(torch.device(self.device))
            return (yield)


def run_part(day: Day) -> None:
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # read when libraries load
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    files = [str(ROOT / file) for file in FILES]
    run_pytest(day, *files, plugins=[OnDevice(day.device, is_bf16=False), Recorder(day)])
    deterministic(day)
    bf16 = OnDevice(day.device, is_bf16=True)
    run_pytest(day, *files, "--no-header", "--tb=no", plugins=[bf16])
    for name, errors in sorted(bf16.errors.items()):
        day.record(fixture=name, bf16_median=statistics.median(errors), bf16_largest=max(errors), compared=len(errors))


def deterministic(day: Day) -> None:
    """Run each task's CIFAR-10 recipe for 20 steps twice, and compare the final weights."""
    shards = pack_noise(day.work / "noise-32", 256, 32)
    for name in ("mae/vit_tiny_cifar10", "dino/vit_tiny_cifar10", "igpt/small_cifar10"):
        changes = {"data.global_batch_size": day.pick(64, 8), "train.steps": STEPS, "train.deterministic": True,
                   "train.compile": "none"}  # fmt: skip
        try:
            settings = recipe(day, name, shards, "deterministic", **changes)
            one, other = (in_a_run(settings, final_weights) for _ in range(2))
        except Exception as error:  # the other tasks may work
            day.record(deterministic=name, is_equal=False, error=last_line(error))
            continue
        different = [key for key in one if not torch.equal(one[key], other[key])]
        day.record(deterministic=name, is_equal=not different, steps=STEPS, different=different[:5])


def final_weights(fit: Any, trainer: Any, task: Any, data: Any) -> dict[str, torch.Tensor]:
    fit(trainer, task, datamodule=data)
    assert trainer.global_step == STEPS, trainer.global_step
    return {key: value.detach().cpu().clone() for key, value in task.state_dict().items()}

"""`sslvit replay`: a step that was not finite, taken again in float32, to see where it goes wrong."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sslvit.data.batch import Batch
from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.tasks import make_task
from sslvit.tasks.base import Task
from sslvit.train.callbacks.incidents import from_tensors


def replay(folder: str | Path) -> list[str]:
    """Repeat the step of an incident, and describe what happens in it, one line each.

    Args:
        folder: incident/ of a run.

    Raises:
        FileNotFoundError: there is no incident.
        ValueError: its files are damaged.
    """
    folder = Path(folder)
    if not (folder / "incident.json").is_file():
        raise FileNotFoundError(f"{folder}: no incident.json there. Give the incident/ folder of a run.")
    try:
        about = json.loads((folder / "incident.json").read_text())
        step, run = about["step"], RunPlan(**about["run"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'incident.json'}: damaged ({error}).") from error
    settings = load_recipe(folder / "config.yaml", {"data.allow_pipe": True})  # nothing is read from there
    task = make_task(settings, run)
    task.load_state_dict(read_checkpoint(folder / "state.ckpt")["state_dict"])
    files = sorted(folder.glob("batch-rank-*.safetensors"))
    said = [f"step {step} of {settings.task.name}, seed {run.seed}, was taken in {about['precision']}"]
    if broken := [name for name, value in task.state_dict().items() if not is_finite(value)]:
        said.append(f"weights that are not finite before the step: {named(broken)}")
    if not files:
        return [*said, "no batch was saved: a stream cannot give the same images again"]
    for file in files:
        said += [f"{file.stem}: {line}" for line in batch_in_words(task, read_batch(file), step - 1)]
    return said


def read_batch(file: Path) -> Batch:
    """A micro-batch saved in an incident."""
    with safe_open(file, "pt") as content:
        first_row = int((content.metadata() or {}).get("first_row", 0))
    return from_tensors(load_file(file), first_row)


def named(names: list[str]) -> str:
    """The first names, and how many there are."""
    return f"{', '.join(names[:4])} ({len(names)} in all)"


def batch_in_words(task: Task, batch: Batch, step: int) -> list[str]:
    """Describe a micro-batch: its images, loss, first module whose output is not finite, gradients and anomalies."""
    said = []
    for number, view in enumerate(batch.views):
        rows = [int(row) for row in torch.nonzero(~view.isfinite().flatten(1).all(1))[:, 0]]
        if rows:
            samples = [int(batch.samples[row]) for row in rows[:4]]
            said.append(f"view {number}: pixels that are not finite in {len(rows)} images (samples {samples})")
    largest = max(float(view.nan_to_num(posinf=0, neginf=0).abs().max()) for view in batch.views)
    task.zero_grad()
    names = {module: name for name, module in task.named_modules() if name}
    first: list[str] = []  # the first module whose output is not finite

    def look(module: nn.Module, given: tuple, output: object) -> None:
        if isinstance(output, Tensor) and not first and not is_finite(output):
            first.append(f"{names[module]} ({type(module).__name__})")

    hooks = [module.register_forward_hook(look) for module in names]
    anomaly = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.set_detect_anomaly(True):
                task.seed_dropout(batch, step)
                loss = task.compute(batch, step).objective
                loss.backward()
            value = float(loss.detach())
        except RuntimeError as error:
            anomaly, value = str(error).splitlines()[0], math.nan
    for hook in hooks:
        hook.remove()
    said.append(f"largest pixel {largest:.3g} deviations from the mean; loss in float32: {value:.6g}")
    if first:
        said.append(f"first output that is not finite: {first[0]}")
    if anomaly:
        found = re.search(r"Function '(\w+)'", anomaly)
        said.append(f"backward: {found[1] if found else anomaly} gives a gradient that is not finite")
    broken = [name for name, p in task.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    if broken:
        said.append(f"gradients that are not finite: {named(broken)}")
    if not (first or anomaly or broken) and math.isfinite(value):
        said.append("finite in float32: the step fails in its own precision only. Try train.precision float32")
    return said


def is_finite(value: Tensor) -> bool:
    """Whether every number in a tensor is finite."""
    return not value.is_floating_point() or bool(value.isfinite().all())

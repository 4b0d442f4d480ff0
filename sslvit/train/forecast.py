"""`sslvit plan`: parameters, FLOPs, memory, steps and hours of a run, before anything runs.

One step is taken with tensors that have shapes and no content, so nothing is estimated that can be counted: FLOPs are
those of every matrix product of the step, forward and backward; activations are what the backward pass keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sslvit.data.batch import Batch
from sslvit.data.index import Index
from sslvit.data.plan import slices
from sslvit.data.views import Views
from sslvit.figures import curves
from sslvit.settings import PretrainSettings
from sslvit.tasks import task_class
from sslvit.tasks.base import PretextTask

# TFLOP/s of 16-bit matrix products without sparsity (NVIDIA's data sheets)
PEAKS = {"h200": 989.0, "h100pcie": 756.0, "h100": 989.0, "a100": 312.0, "l40s": 362.0, "rtx4090": 165.0, "v100": 125.0}
FEW = 4  # images that the counts are made with
POINTS = 400  # of a schedule's curve


@dataclass
class Forecast:
    """Of one run.

    Args:
        encoder: parameters of the encoder.
        trained: parameters that the optimiser moves.
        held: numbers of the whole state, teacher and buffers included.
        flops_per_image: of a step, forward and backward.
        activations_per_image: bytes that the backward pass keeps, in float32.
        largest_per_image: of the largest tensor among them.
        images: in the data set.
        global_batch: images per optimiser step.
        micro: images per forward pass on one rank.
        passes: forward passes per optimiser step.
        ranks: processes.
        steps: optimiser steps.
        steps_per_epoch: of one pass over the data.
    """

    encoder: int
    trained: int
    held: int
    flops_per_image: int
    activations_per_image: int
    largest_per_image: int
    images: int
    global_batch: int
    micro: int
    passes: int
    ranks: int
    steps: int
    steps_per_epoch: int

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on each rank in float32, every rank holding everything (DDP)."""
        return {
            "weights": 4.0 * self.held, "gradients": 4.0 * self.trained, "optimiser": 8.0 * self.trained,
            "activations": float(self.activations_per_image) * self.micro,
            # gradients of an activation that is written in parts: two coming in, two going out
            "working": 4.0 * self.largest_per_image * self.micro,
        }  # fmt: skip

    def hours(self, tflops: float, utilisation: float) -> float:
        """On devices of so many TFLOP/s, of which a share is used."""
        work = float(self.flops_per_image) * self.global_batch * self.steps
        return work / (tflops * 1e12 * utilisation * self.ranks) / 3600

    def text(self) -> str:
        """For a reader."""
        memory = self.memory
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        return "\n".join([
            f"parameters   encoder {self.encoder:,}, trained {self.trained:,}, held {self.held:,}",
            f"FLOPs        {self.flops_per_image / 1e9:,.3f} G per image (forward and backward)",
            f"memory       {sum(memory.values()) / 2**30:.2f} GiB per rank in float32: {parts} GiB",
            f"batch        {self.global_batch:,} images: {self.ranks} ranks x {self.passes} passes x {self.micro}",
            f"steps        {self.steps:,} ({self.steps / self.steps_per_epoch:,.1f} epochs of {self.images:,} images)",
        ])  # fmt: skip


def forecast(settings: PretrainSettings, images: int, classes: int | None = None) -> tuple[Forecast, PretextTask]:
    """What a run with these settings would be, and its task, without weights, for its schedules.

    Args:
        settings: as for a run.
        images: in the data set.
        classes: of the data set, where it has labels.

    Raises:
        ValueError: fewer images than a batch, or a step whose course depends on what the images show.
    """
    train, batch = settings.train, settings.data.global_batch
    if images < batch:
        raise ValueError(f"data.global_batch: {batch} is more than the {images} images there are.")
    ranks = train.devices * train.nodes
    micro, passes = slices(batch, ranks, train.micro_batch)
    per_epoch = images // batch
    steps = train.steps or max(1, round(train.epochs * per_epoch))
    fitted, optim = settings.task.fitted(images, batch, steps, classes), settings.optim.fitted(per_epoch, steps)
    with torch.device("meta"):  # initialisation would ask fake numbers for their values
        task: PretextTask = task_class(settings.task.name)(
            fitted, settings.encoder, optim, total_steps=steps, steps_per_epoch=per_epoch, global_batch=batch,
            seed=settings.seed,
        )  # fmt: skip
    state = task.state_dict()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            task.to_empty(device="cpu")
            flops = count_flops(task, settings)
            kept, largest = count_activations(task, settings)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise ValueError(
            f"task.name: a step of {settings.task.name} depends on what is drawn for each image. Plan it without "
            "(--task.erase 0 --task.mixup 0 --task.cutmix 0)."
        ) from error
    found = Forecast(
        encoder=sum(p.numel() for p in task.trained_encoder.parameters()),
        trained=sum(p.numel() for p in task.parameters() if p.requires_grad),
        held=sum(value.numel() for value in state.values()),
        flops_per_image=flops // FEW, activations_per_image=kept // FEW, largest_per_image=largest // FEW,
        images=images, global_batch=batch,
        micro=micro, passes=passes, ranks=ranks, steps=steps, steps_per_epoch=per_epoch,
    )  # fmt: skip
    return found, task


def rate_of_peak(settings: PretrainSettings, index: Index) -> float | None:
    """Share of all devices' peak that one image a second takes; None where the peak or the work is not known.

    The work is that of the model's products in a step, without what is computed again to save memory.

    Args:
        settings: of a run.
        index: of its data.
    """
    train = settings.train
    peak = train.peak_tflops
    if peak is None and train.accelerator != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().replace(" ", "")
        peak = next((tflops for key, tflops in PEAKS.items() if key in name), None)
    if peak is None:
        return None
    once = replace(settings, encoder=replace(settings.encoder, checkpointing=False))
    try:
        found, _ = forecast(once, len(index), len(index.classes) if index.classes else None)
    except ValueError:  # the work depends on what is drawn for each image
        return None
    return found.flops_per_image / (peak * 1e12 * train.devices * train.nodes)


def example(settings: PretrainSettings) -> Batch:
    """A few images as the task would get them."""
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).of_size()
    numbers = torch.zeros(FEW, dtype=torch.long)
    images = [torch.zeros(FEW, settings.encoder.channels, *view.size) for view in views]
    return Batch(images, numbers, numbers, torch.ones(FEW, dtype=torch.bool), numbers)


def count_flops(task: PretextTask, settings: PretrainSettings) -> int:
    """Of a step on a few images; attention as two matrix products, whatever kernel makes it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.training_step(example(settings), 0).backward()
    task.zero_grad()
    return counter.get_total_flops()


def count_activations(task: PretextTask, settings: PretrainSettings) -> tuple[int, int]:
    """Bytes that the backward pass of a step on a few images keeps besides weights, each storage once; the largest."""
    own = {value.untyped_storage()._cdata for value in [*task.parameters(), *task.buffers()]}
    kept = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        task.training_step(example(settings), 0)
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes), max(sizes)


def draw_schedules(task: PretextTask, path: Path) -> Path:
    """Everything of the task that changes with the step: rate, weight decay, and a task's own."""
    steps = np.unique(np.linspace(0, task.total_steps - 1, POINTS).astype(int)).tolist()
    named = {name.removesuffix("_at"): getattr(task, name) for name in dir(type(task)) if name.endswith("_at")}
    lines = {name.replace("_", " "): [at(step) for step in steps] for name, at in named.items()}
    shares = {f"{name} (up to {max(values):.3g})": (steps, [value / (max(values) or 1) for value in values])
              for name, values in lines.items()}  # fmt: skip
    return curves(path, shares, "optimiser step", "share of the largest value", "schedules")

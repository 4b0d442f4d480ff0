"""`sslvit plan`: parameters, FLOPs, memory, steps and hours of a run, before anything runs.

One step is taken with tensors that have shapes and no content, so nothing is estimated that can be counted: FLOPs are
those of every matrix product of the step, forward and backward; memory is the most that is alive at once.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sslvit.data.batch import Batch
from sslvit.data.mixture import Index
from sslvit.data.stream import StreamIndex
from sslvit.data.views import Views
from sslvit.figures import plot_curves
from sslvit.models.transformer import Block
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.tasks import make_task
from sslvit.tasks.base import Task

# TFLOP/s of 16-bit matrix products without sparsity (NVIDIA's data sheets)
PEAKS = {"h200": 989.0, "h100pcie": 756.0, "h100": 989.0, "a100": 312.0, "l40s": 362.0, "rtx4090": 165.0, "v100": 125.0}
FEW = 4  # images that the counts are made with
POINTS = 400  # of a schedule's curve


@dataclass
class Forecast:
    """Of one run.

    Args:
        encoder: parameters of the encoder.
        trained: parameters that the optimizer moves.
        total_params: numbers in the whole state, teacher and buffers included.
        flops_per_image: of a step, forward and backward.
        peak: most bytes that a step on one rank's micro-batch holds at once besides weights and moments, in float32.
        activations: the same without the weights' gradients.
        block: numbers in the largest block of a network.
        outside: numbers of weights that lie in no block.
        images: in the data set.
        run: steps, batch sizes and ranks.
    """

    encoder: int
    trained: int
    total_params: int
    flops_per_image: int
    peak: int
    activations: int
    block: int
    outside: int
    images: int
    run: RunPlan

    def memory(self, strategy: str) -> dict[str, float]:
        """Bytes on each rank in float32.

        Args:
            strategy: ddp or fsdp.
        """
        gradients = 4.0 * self.trained
        kept = {"weights": 4.0 * self.total_params, "moments": 8.0 * self.trained, "gradients": gradients}
        alone = kept | {"activations": self.peak - gradients}
        if self.run.ranks == 1:
            return alone
        if strategy == "ddp":  # the buckets that are exchanged stay, and in the last pass they are the gradients
            return (
                alone | {"buckets": gradients}
                if self.run.accumulation_steps > 1
                else kept | {"activations": self.activations}
            )
        parts = {name: size / self.run.ranks for name, size in kept.items()}
        # at once whole: what lies in no block, the block that runs and the next, and the gradients of one
        gathered = 4.0 * (self.outside + 3 * self.block)
        return parts | {"gathered": gathered, "activations": self.activations}

    def hours(self, tflops: float, utilization: float) -> float:
        """On devices of so many TFLOP/s, of which a share is used."""
        work = float(self.flops_per_image) * self.run.global_batch_size * self.run.total_steps
        return work / (tflops * 1e12 * utilization * self.run.ranks) / 3600

    def text(self) -> str:
        """For a reader."""
        run, memory = self.run, []
        for strategy in ("ddp", "fsdp"):
            sizes = self.memory(strategy)
            parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
            memory.append(
                f"memory       {strategy}: {sum(sizes.values()) / 2**30:.2f} GiB per rank in float32 ({parts})"
            )
        return "\n".join([
            f"parameters   encoder {self.encoder:,}, trained {self.trained:,}, total {self.total_params:,}",
            f"FLOPs        {self.flops_per_image / 1e9:,.3f} G per image (forward and backward)",
            *memory[: 1 if run.ranks == 1 else 2],
            f"batch        {run.global_batch_size:,} images: {run.ranks} ranks x {run.accumulation_steps} passes x "
            f"{run.images_per_pass}",
            f"steps        {run.total_steps:,} ({run.total_steps / run.steps_per_epoch:,.1f} epochs of "
            f"{self.images:,} images)",
        ])  # fmt: skip


def forecast(settings: RunSettings, images: int, classes: int | None = None) -> tuple[Forecast, Task]:
    """What a run with these settings would be, and its task, without weights, for its schedules.

    Args:
        settings: as for a run.
        images: in the data set.
        classes: of the data set, where it has labels.

    Raises:
        ValueError: fewer images than a batch, or a step whose course depends on what the images show.
    """
    train = settings.train
    batch = settings.data.fitted(images, train.devices * train.nodes).global_batch_size
    if images < batch:
        raise ValueError(f"data.global_batch_size: {batch} is more than the {images} images there are.")
    run = RunPlan.make(train, images // batch, batch, settings.seed)
    fitted = settings.task.fitted(images, batch, run.total_steps, classes)
    with torch.device("meta"):  # initialization would ask fake numbers for their values
        task = make_task(replace(settings, task=fitted), run)
    state = task.state_dict()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            task.to_empty(device="cpu")
            flops = count_flops(task, settings)
            peak = count_peak(task, settings, run.images_per_pass, run.accumulation_steps)
            activations = count_peak(task, settings, run.images_per_pass, 1, has_gradients=True)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise ValueError(
            f"task.name: a step of {settings.task.name} depends on what is drawn for each image. Plan it without "
            "(--task.erase 0 --task.mixup 0 --task.cutmix 0)."
        ) from error
    blocks = {name: sum(p.numel() for p in module.parameters())
              for name, module in task.named_modules() if isinstance(module, Block)}  # fmt: skip
    found = Forecast(
        encoder=sum(p.numel() for p in task.trained_encoder.parameters()),
        trained=sum(p.numel() for p in task.parameters() if p.requires_grad),
        total_params=sum(value.numel() for value in state.values()),
        flops_per_image=flops // FEW, peak=peak, activations=activations, block=max(blocks.values(), default=0),
        outside=sum(p.numel() for p in task.parameters()) - sum(blocks.values()),
        images=images, run=run,
    )  # fmt: skip
    return found, task


def mfu_per_throughput(settings: RunSettings, index: Index | StreamIndex) -> float | None:
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
    once = replace(settings, encoder=replace(settings.encoder, activation_checkpointing=False))
    try:
        found, _ = forecast(once, len(index), len(index.classes) if index.classes else None)
    except Exception:  # the work depends on what the images show: then there is no such number, and the run goes on
        return None
    return found.flops_per_image / (peak * 1e12 * train.devices * train.nodes)


def example(settings: RunSettings, count: int = FEW) -> Batch:
    """Some images as the task would get them."""
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).specs()
    numbers = torch.zeros(count, dtype=torch.long)
    images = [torch.zeros(count, settings.encoder.channels, *size) for size, _ in views]
    return Batch(images, numbers, numbers, torch.ones(count, dtype=torch.bool), numbers)


def count_flops(task: Task, settings: RunSettings) -> int:
    """Of a step on a few images; attention as two matrix products, whatever kernel makes it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.compute(example(settings), 0).objective.backward()
    task.zero_grad()
    return counter.get_total_flops()


def count_peak(task: Task, settings: RunSettings, images: int, passes: int, has_gradients: bool = False) -> int:
    """Most bytes besides weights that are held at once in the passes of a step, gradients and images included.

    Args:
        task: takes the step.
        settings: of the run.
        images: Images per pass.
        passes: Forward passes in the step.
        has_gradients: gradients have their place before the step, and do not count.
    """
    known = [*task.parameters(), *task.buffers()]
    if has_gradients:
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                known.append(parameter.grad)
    with LiveBytes(known) as live:
        for _ in range(min(passes, 2)):  # the gradients of the first stay while the second runs
            task.compute(example(settings, images), 0).objective.backward()
    task.zero_grad()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """While it is on, counts the bytes of the tensors that are alive, each storage once; `peak` is the most.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive = {value.untyped_storage()._cdata: 0 for value in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.on_alloc, result)
        return result

    def on_alloc(self, value: torch.Tensor) -> torch.Tensor:
        """Count a tensor's storage, once."""
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.on_free, key)
        return value

    def on_free(self, key: int) -> None:
        """Take a storage off again."""
        self.now -= self.alive.pop(key)


def plot_schedules(task: Task, path: Path) -> Path:
    """Everything of the task that changes with the step: rate, weight decay, and a task's own."""
    steps = np.unique(np.linspace(0, task.run.total_steps - 1, POINTS).astype(int)).tolist()
    named = {name.removesuffix("_at"): getattr(task, name) for name in dir(type(task)) if name.endswith("_at")}
    lines = {name.replace("_", " "): [at(step) for step in steps] for name, at in named.items()}
    shares = {f"{name} (up to {max(values):.3g})": (steps, [value / (max(values) or 1) for value in values])
              for name, values in lines.items()}  # fmt: skip
    return plot_curves(path, shares, "optimizer step", "share of the largest value", "schedules")

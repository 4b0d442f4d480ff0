"""`sslvit plan`: parameters, FLOPs, memory, steps and hours of a run, before anything runs.

One step is taken with tensors that have shapes and no content, so nothing is estimated that can be counted: FLOPs are
those of every matrix product of the step, forward and backward; memory is the most that is alive at once.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sslvit.data.batch import Batch
from sslvit.data.index import Index
from sslvit.data.plan import slices
from sslvit.data.views import Views
from sslvit.figures import plot_curves
from sslvit.models.transformer import Block
from sslvit.settings import RunSettings
from sslvit.tasks import task_class
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
        held: numbers of the whole state, teacher and buffers included.
        flops_per_image: of a step, forward and backward.
        peak: most bytes that a step on one rank's micro-batch holds at once besides weights and moments, in float32.
        activations: the same without the weights' gradients.
        block: numbers in the largest block of a network.
        outside: numbers of weights that lie in no block.
        images: in the data set.
        global_batch_size: images per optimizer step.
        micro: images per forward pass on one rank.
        passes: forward passes per optimizer step.
        ranks: processes.
        steps: optimizer steps.
        steps_per_epoch: of one pass over the data.
    """

    encoder: int
    trained: int
    held: int
    flops_per_image: int
    peak: int
    activations: int
    block: int
    outside: int
    images: int
    global_batch_size: int
    micro: int
    passes: int
    ranks: int
    steps: int
    steps_per_epoch: int

    def memory(self, strategy: str) -> dict[str, float]:
        """Bytes on each rank in float32.

        Args:
            strategy: ddp or fsdp.
        """
        gradients = 4.0 * self.trained
        kept = {"weights": 4.0 * self.held, "moments": 8.0 * self.trained, "gradients": gradients}
        alone = kept | {"activations": self.peak - gradients}
        if self.ranks == 1:
            return alone
        if strategy == "ddp":  # the buckets that are exchanged stay, and in the last pass they are the gradients
            return alone | {"buckets": gradients} if self.passes > 1 else kept | {"activations": self.activations}
        parts = {name: size / self.ranks for name, size in kept.items()}
        # at once whole: what lies in no block, the block that runs and the next, and the gradients of one
        gathered = 4.0 * (self.outside + 3 * self.block)
        return parts | {"gathered": gathered, "activations": self.activations}

    def hours(self, tflops: float, utilization: float) -> float:
        """On devices of so many TFLOP/s, of which a share is used."""
        work = float(self.flops_per_image) * self.global_batch_size * self.steps
        return work / (tflops * 1e12 * utilization * self.ranks) / 3600

    def text(self) -> str:
        """For a reader."""
        memory = []
        for strategy in ("ddp", "fsdp"):
            sizes = self.memory(strategy)
            parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
            memory.append(
                f"memory       {strategy}: {sum(sizes.values()) / 2**30:.2f} GiB per rank in float32 ({parts})"
            )
        return "\n".join([
            f"parameters   encoder {self.encoder:,}, trained {self.trained:,}, held {self.held:,}",
            f"FLOPs        {self.flops_per_image / 1e9:,.3f} G per image (forward and backward)",
            *memory[: 1 if self.ranks == 1 else 2],
            f"batch        {self.global_batch_size:,} images: {self.ranks} ranks x {self.passes} passes x {self.micro}",
            f"steps        {self.steps:,} ({self.steps / self.steps_per_epoch:,.1f} epochs of {self.images:,} images)",
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
    ranks = train.devices * train.nodes
    batch = settings.data.fitted(images, ranks).global_batch_size
    if images < batch:
        raise ValueError(f"data.global_batch_size: {batch} is more than the {images} images there are.")
    micro, passes = slices(batch, ranks, train.micro_batch_size)
    per_epoch = images // batch
    steps = train.steps or max(1, round(train.epochs * per_epoch))
    fitted, optim = settings.task.fitted(images, batch, steps, classes), settings.optim.fitted(per_epoch, steps)
    with torch.device("meta"):  # initialization would ask fake numbers for their values
        task: Task = task_class(settings.task.name)(
            fitted, settings.encoder, optim, total_steps=steps, steps_per_epoch=per_epoch, global_batch_size=batch,
            seed=settings.seed,
        )  # fmt: skip
    state = task.state_dict()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            task.to_empty(device="cpu")
            flops = count_flops(task, settings)
            peak = count_peak(task, settings, micro, passes)
            activations = count_peak(task, settings, micro, 1, has_gradients=True)
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
        held=sum(value.numel() for value in state.values()),
        flops_per_image=flops // FEW, peak=peak, activations=activations, block=max(blocks.values(), default=0),
        outside=sum(p.numel() for p in task.parameters()) - sum(blocks.values()),
        images=images, global_batch_size=batch,
        micro=micro, passes=passes, ranks=ranks, steps=steps, steps_per_epoch=per_epoch,
    )  # fmt: skip
    return found, task


def mfu_per_throughput(settings: RunSettings, index: Index) -> float | None:
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
    views = Views(settings.data.view, settings.encoder.image_size, settings.encoder.interpolation).of_size()
    numbers = torch.zeros(count, dtype=torch.long)
    images = [torch.zeros(count, settings.encoder.channels, *view.size) for view in views]
    return Batch(images, numbers, numbers, torch.ones(count, dtype=torch.bool), numbers)


def count_flops(task: Task, settings: RunSettings) -> int:
    """Of a step on a few images; attention as two matrix products, whatever kernel makes it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.training_step(example(settings), 0).backward()
    task.zero_grad()
    return counter.get_total_flops()


def count_peak(task: Task, settings: RunSettings, micro: int, passes: int, has_gradients: bool = False) -> int:
    """Most bytes besides weights that are held at once in the passes of a step, gradients and images included.

    Args:
        task: takes the step.
        settings: of the run.
        micro: images per pass.
        passes: of a step.
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
            task.training_step(example(settings, micro), 0).backward()
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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.meet, result)
        return result

    def meet(self, value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.part, key)
        return value

    def part(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def draw_schedules(task: Task, path: Path) -> Path:
    """Everything of the task that changes with the step: rate, weight decay, and a task's own."""
    steps = np.unique(np.linspace(0, task.total_steps - 1, POINTS).astype(int)).tolist()
    named = {name.removesuffix("_at"): getattr(task, name) for name in dir(type(task)) if name.endswith("_at")}
    lines = {name.replace("_", " "): [at(step) for step in steps] for name, at in named.items()}
    shares = {f"{name} (up to {max(values):.3g})": (steps, [value / (max(values) or 1) for value in values])
              for name, values in lines.items()}  # fmt: skip
    return plot_curves(path, shares, "optimizer step", "share of the largest value", "schedules")

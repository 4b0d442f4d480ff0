"""`sslvit plan`: parameters, FLOPs, memory, steps and hours of a run, before anything runs.

One step is taken with tensors that have shapes and no content, so nothing is estimated that can be counted: FLOPs are
those of every matrix product of the step, forward and backward; memory is the most that is alive at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sslvit.data.mixture import Index
from sslvit.data.stream import StreamIndex
from sslvit.files import counted
from sslvit.models.transformer import Block
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.train.fake_step import FakeStep
from sslvit.train.hardware import trains_on_gpu

# TFLOP/s of 16-bit matrix products without sparsity (NVIDIA's data sheets)
PEAKS = {"h200": 989.0, "h100pcie": 756.0, "h100": 989.0, "a100": 312.0, "l40s": 362.0, "rtx4090": 165.0, "v100": 125.0}


@dataclass
class Forecast:
    """Of one run.

    Args:
        encoder: parameters of the encoder.
        trained: parameters that the optimizer moves.
        total_params: numbers in the whole state, teacher and buffers included.
        flops_per_image: FLOPs of a step per image, forward and backward.
        peak: most bytes that a step on one rank's micro-batch holds at once besides weights and moments.
        activations: the same without the weights' gradients, for several ranks; otherwise 0.
        block: numbers in the largest block of a network.
        outside: numbers of weights that lie in no block.
        images: in the data set.
        precision: Precision of the computation: float32, bf16 or float64.
        on_gpu: whether memory is counted as a GPU's kernels hold it; otherwise as a CPU's.
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
    precision: str
    on_gpu: bool
    run: RunPlan

    def memory(self, strategy: str) -> dict[str, float]:
        """Bytes on each rank. Weights, moments and gradients are float32 in bf16, too.

        Args:
            strategy: ddp or fsdp.
        """
        size = 8.0 if self.precision == "float64" else 4.0
        gradients = size * self.trained
        kept = {"weights": size * self.total_params, "moments": 2 * size * self.trained, "gradients": gradients}
        alone = kept | {"activations": self.peak - gradients}
        if self.run.ranks == 1:
            return alone
        if strategy == "ddp":  # the buckets that are exchanged stay, and in the last pass they are the gradients
            return (
                alone | {"buckets": gradients}
                if self.run.accumulation_steps > 1
                else kept | {"activations": self.activations}
            )
        sharded = {name: whole / self.run.ranks for name, whole in kept.items()}
        # at once whole: what lies in no block, the block that runs and the next, and the gradients of one
        gathered = size * (self.outside + 3 * self.block)
        return sharded | {"gathered": gathered, "activations": self.activations}

    def total(self, strategy: str) -> float:
        """All bytes on each rank."""
        return sum(self.memory(strategy).values())

    def hours(self, tflops: float, utilization: float) -> float:
        """On devices of so many TFLOP/s, of which a share is used."""
        work = float(self.flops_per_image) * self.run.global_batch_size * self.run.total_steps
        return work / (tflops * 1e12 * utilization * self.run.ranks) / 3600

    def text(self) -> str:
        """For a reader."""
        run, memory = self.run, []
        for strategy in ("ddp", "fsdp"):
            bytes_by_use = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.memory(strategy).items())
            memory.append(
                f"memory       {strategy}: {self.total(strategy) / 2**30:.2f} GiB per rank in {self.precision} on a "
                f"{'GPU' if self.on_gpu else 'CPU'} ({bytes_by_use})"
            )
        return "\n".join([
            f"parameters   encoder {self.encoder:,}, trained {self.trained:,}, total {self.total_params:,}",
            f"FLOPs        {self.flops_per_image / 1e9:,.3f} G per image (forward and backward)",
            *memory[: 1 if run.ranks == 1 else 2],
            f"batch        {run.global_batch_size:,} images: {counted(run.ranks, 'rank')} x "
            f"{counted(run.accumulation_steps, 'pass')} x {run.images_per_pass}",
            f"steps        {run.total_steps:,} ({run.total_steps / run.steps_per_epoch:,.1f} epochs of "
            f"{self.images:,} images)",
        ])  # fmt: skip


def plan_step(settings: RunSettings, images: int, classes: int | None = None) -> FakeStep:
    """A step that a run with these settings would take.

    Args:
        settings: As for a run.
        images: Number of images in the data set.
        classes: Number of its classes, where it has labels.

    Raises:
        ValueError: There are fewer images than a batch.
    """
    usual, train = settings.task.usual, settings.train
    batch = settings.data.batch_for(images, usual.batch, train.batch_multiple)
    if images < batch:
        raise ValueError(f"data.global_batch_size: {batch} is more than the {images} images there are.")
    train = train.fitted(usual, images, images // batch)
    return FakeStep(settings, RunPlan.make(train, images // batch, batch, settings.seed), images, classes)


def forecast(step: FakeStep, micro_batch_size: int | None = None) -> Forecast:
    """What a run would be.

    Args:
        step: A step of the run.
        micro_batch_size: Images per forward pass; null for those of the run.

    Raises:
        ValueError: The course of a step depends on what the images show.
    """
    run, task = step.run, step.task
    if micro_batch_size is not None:
        run = replace(run, micro_batch_size=micro_batch_size)
    blocks = [sum(p.numel() for p in module.parameters()) for module in task.modules() if isinstance(module, Block)]
    return Forecast(
        encoder=sum(p.numel() for p in task.trained_encoder.parameters()),
        trained=sum(p.numel() for p in task.parameters() if p.requires_grad),
        total_params=step.total_params, flops_per_image=step.flops_per_image,
        peak=step.peak(run.images_per_pass, run.accumulation_steps),
        activations=step.peak(run.images_per_pass, 1, has_gradients=True) if run.ranks > 1 else 0,
        block=max(blocks, default=0),
        outside=sum(p.numel() for p in task.parameters()) - sum(blocks),
        images=step.images, precision=step.precision, on_gpu=step.on_gpu, run=run,
    )  # fmt: skip


def mfu_per_throughput(settings: RunSettings, index: Index | StreamIndex) -> float | None:
    """Share of all devices' peak that one image a second takes.

    None where the peak or the work is not known, or the work of an image changes (data.resolution_fractions).

    The work is that of the model's products in a step, without what is computed again to save memory.

    Args:
        settings: Settings of a run.
        index: Index of its data.
    """
    train = settings.train
    peak = train.peak_tflops
    if peak is None and trains_on_gpu(train):
        peak = next(iter((peak_of_gpu() or {}).values()), None)
    if peak is None or settings.data.resolution_fractions is not None:  # the work of an image changes on the way
        return None
    once = replace(settings, encoder=replace(settings.encoder, activation_checkpointing=False))
    try:
        flops = plan_step(once, len(index), len(index.classes) if index.classes else None).flops_per_image
    except Exception:  # the work depends on what the images show: then there is no such number, and the run goes on
        return None
    return flops / (peak * 1e12 * train.ranks)


def peak_of_gpu() -> dict[str, float] | None:
    """Name and TFLOP/s of the GPU of this machine; None where there is none, or nothing is known of it."""
    name = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    return next(({key: tflops} for key, tflops in PEAKS.items() if key in name), None)

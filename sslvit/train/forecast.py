"""`sslvit plan`: parameters, FLOPs, memory, steps and hours of a run, before anything runs.

One step is run on fake tensors, which have shapes but no content, so nothing is estimated that can be counted: FLOPs
are those of every matrix product of the step, forward and backward; memory is the peak of live tensors.
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
    """The forecast of one run.

    Args:
        encoder: parameters of the encoder.
        trained: parameters that the optimizer updates.
        total_params: numbers in the whole state, including teacher and buffers.
        flops_per_image: FLOPs of a step per image, forward and backward.
        peak: peak bytes of a step on one rank's micro-batch, without weights and moments.
        activations: the same without the weights' gradients, for several ranks; otherwise 0.
        block: parameters in the largest block of a network.
        outside: parameters outside of all blocks.
        images: images in the data set.
        precision: Precision of the computation: float32, bf16 or float64.
        on_gpu: whether memory is counted as for a GPU's kernels; otherwise as for a CPU's.
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
        """Bytes on each rank, by use. Weights, moments and gradients are float32 also in bf16.

        Args:
            strategy: ddp or fsdp.
        """
        size = 8.0 if self.precision == "float64" else 4.0
        gradients = size * self.trained
        kept = {"weights": size * self.total_params, "moments": 2 * size * self.trained, "gradients": gradients}
        alone = kept | {"activations": self.peak - gradients}
        if self.run.ranks == 1:
            return alone
        if strategy == "ddp":  # communication buckets stay allocated; in the last pass, gradients are views of them
            return (
                alone | {"buckets": gradients}
                if self.run.accumulation_steps > 1
                else kept | {"activations": self.activations}
            )
        sharded = {name: whole / self.run.ranks for name, whole in kept.items()}
        # unsharded at once: parameters outside of blocks, two blocks (this and the next), and one block's gradients
        gathered = size * (self.outside + 3 * self.block)
        return sharded | {"gathered": gathered, "activations": self.activations}

    def total(self, strategy: str) -> float:
        """All bytes on each rank."""
        return sum(self.memory(strategy).values())

    def hours(self, tflops: float, utilization: float) -> float:
        """Hours on devices with this peak in TFLOP/s, of which a fraction is used."""
        work = float(self.flops_per_image) * self.run.global_batch_size * self.run.total_steps
        return work / (tflops * 1e12 * utilization * self.run.ranks) / 3600

    def text(self) -> str:
        """The forecast as text."""
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
        settings: Settings of the run.
        images: Number of images in the data set.
        classes: Number of its classes, if it has labels.

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
    """The forecast of a run.

    Args:
        step: A step of the run.
        micro_batch_size: Images per forward pass; None for the run's own.

    Raises:
        ValueError: The computation of a step depends on the content of its images.
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
    """Fraction of all devices' peak that one image per second uses.

    None if the peak or the FLOPs are unknown, or if the FLOPs per image change (data.resolution_fractions).

    FLOPs are those of the model's matrix products in a step, without recomputation to save memory.

    Args:
        settings: Settings of a run.
        index: Index of its data.
    """
    train = settings.train
    peak = train.peak_tflops
    if peak is None and trains_on_gpu(train):
        peak = next(iter((peak_of_gpu() or {}).values()), None)
    if peak is None or settings.data.resolution_fractions is not None:  # FLOPs per image change
        return None
    once = replace(settings, encoder=replace(settings.encoder, activation_checkpointing=False))
    try:
        flops = plan_step(once, len(index), len(index.classes) if index.classes else None).flops_per_image
    except Exception:  # the FLOPs depend on the images' content: the run continues without this number
        return None
    return flops / (peak * 1e12 * train.ranks)


def peak_of_gpu() -> dict[str, float] | None:
    """Name and TFLOP/s of the GPU of this machine; None if there is none, or an unknown one."""
    name = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    return next(({key: tflops} for key, tflops in PEAKS.items() if key in name), None)

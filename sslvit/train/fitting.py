"""Choices for the machine if nothing is given: the length of a run, and the number of images per forward pass.

`train.epochs: null` chooses a length that suits the data set, and on a CPU takes at most about an hour.
`train.micro_batch_size: auto` chooses as many images as fit in memory, according to the forecast of a step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from sslvit.data.views import view_sizes
from sslvit.files import brief
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings, TrainSettings
from sslvit.train.fake_step import FakeStep
from sslvit.train.forecast import Forecast, forecast
from sslvit.train.hardware import cpu_flops, cpu_memory, gpu_memory, trains_on_gpu

CPU_SECONDS = 3600.0  # limit for a run whose length is not given
# FLOP/s of a training step divided by those that `cpu_flops` measures: 0.8 to 1.0 in float32 and 0.45 to 0.9 in bf16,
# for MAE, DINO and iGPT on two CPU cores
STEP_EFFICIENCY = 0.75
# assumed FLOP/s of each of several processes, which must all choose the same length
ASSUMED_FLOPS = 5e10

# What a forecast does not count. The CUDA context with its loaded kernels takes about half a GiB, the workspaces of
# cuBLAS and cuDNN some 100 MiB, NCCL's buffers up to half a GiB, probes and pictures during training the rest.
RESERVED = 1.5 * 2**30
RESERVED_ON_CPU = 0.5 * 2**30  # the process with its libraries, images in transit, probes and pictures
# The caching allocator rounds sizes up and leaves gaps between blocks of different sizes; kernels need workspaces, too.
FRAGMENTED = 0.1  # of the memory
# Bytes that a step on a CPU holds per token, channel and block: two to ten times the counted number. If even that is
# little compared with the memory, the step is not counted, which would take a second.
ROUGH_BYTES, LITTLE = 256, 0.05


def fit_length(
    settings: RunSettings, images: int, classes: int | None, steps_per_epoch: int, global_batch_size: int
) -> tuple[TrainSettings, str]:
    """The settings, with a length if none is given, and a note about it.

    Args:
        settings: Settings of the run.
        images: Number of images in the data set.
        classes: Number of its classes, if it has labels.
        steps_per_epoch: Optimizer steps in one pass over the data.
        global_batch_size: Images per step.
    """
    train = settings.train
    fitted = train.fitted(settings.task.usual, images, steps_per_epoch)
    if fitted is train or trains_on_gpu(train):
        return fitted, ""
    run = RunPlan.make(fitted, steps_per_epoch, global_batch_size, settings.seed)
    try:
        seconds = cpu_seconds(FakeStep(settings, run, images, classes))
    except Exception:  # a custom task may do what fake tensors cannot
        return fitted, ""
    if seconds <= CPU_SECONDS:
        return fitted, ""
    epochs = max(1, round(run.total_steps * CPU_SECONDS / seconds)) / steps_per_epoch
    note = (
        f"about an hour on this machine's CPU, to show the way; a GPU would get {fitted.epochs:g} epochs, which take "
        f"about {duration(seconds)} here. Set another length with --train.epochs"
    )
    return replace(train, epochs=epochs), note


def duration(seconds: float) -> str:
    """Hours in words; minutes below one hour."""
    minutes = seconds / 60
    if minutes >= 60:
        return f"{minutes / 60:,.1f} hours"
    return f"{minutes:.1f} minutes" if minutes >= 0.1 else "under 0.1 minutes"


def cpu_seconds(step: FakeStep) -> float:
    """Seconds of a run on this machine's CPU, estimated from the FLOPs of a step and a short measurement."""
    run = step.run
    one = run.ranks == 1
    flops = STEP_EFFICIENCY * (cpu_flops(step.settings.encoder.width, step.precision) if one else ASSUMED_FLOPS)
    return float(step.flops_per_image) * run.global_batch_size * run.total_steps / (flops * run.ranks)


@dataclass(frozen=True)
class MicroBatch:
    """Images per forward pass that fit the memory.

    Args:
        size: Number of images; None if not even the smallest number fits.
        found: The forecast with that number, or with the smallest one.
        memory: Bytes of GPU memory, or free bytes of main memory.
        settings: Settings of the run.
    """

    size: int | None
    found: Forecast
    memory: float
    settings: RunSettings

    def text(self) -> str:
        """What was chosen and why, or why nothing fits and what would help, in one line."""
        run, encoder, train = self.found.run, self.settings.encoder, self.settings.train
        count = f"{run.images_per_pass} image{'' if run.images_per_pass == 1 else 's'}"
        on_gpu, there = self.found.on_gpu, f"{self.memory / 2**30:.1f} GiB"
        of = f"of the GPU's {there}" if on_gpu else f"of the {there} that are free on this machine"
        why = (
            f"{self.found.total(train.strategy) / 2**30:.1f} GiB are forecast in {self.found.precision}, and "
            f"{usable(self.memory, on_gpu) / 2**30:.1f} {of} can be planned with"
        )
        if self.size is not None:
            return f"train.micro_batch_size auto: {count} at once, of {run.images_per_rank} on each rank ({why})"
        remedies = [] if encoder.activation_checkpointing else ["encoder.activation_checkpointing true"]
        if on_gpu:
            remedies += ["train.strategy fsdp on several GPUs" if train.strategy == "ddp" else "more train.devices"]
        remedies = remedies or ["a smaller encoder"]
        return (
            f"train.micro_batch_size: not even {count} at once would fit: {why}. Use {', '.join(remedies)}, or a "
            f"smaller view (encoder.image_size); a number here is tried as it is."
        )


def usable(memory: float, on_gpu: bool = True) -> float:
    """Bytes of memory that a forecast may fill."""
    return (1 - FRAGMENTED) * memory - (RESERVED if on_gpu else RESERVED_ON_CPU)


def choose_micro_batch(step: FakeStep, memory: float) -> MicroBatch:
    """Choose the most images per forward pass that divide a rank's share of the batch and whose forecast fits.

    Args:
        step: A step of the run.
        memory: Bytes of GPU memory, or free bytes of main memory.
    """
    settings, limit, most = step.settings, usable(memory, step.on_gpu), step.run.images_per_rank
    settings.task.check_micro_batch(most)

    def needed(size: int) -> float:
        return forecast(step, size).total(settings.train.strategy)

    sizes = [size for size in range(1, most + 1) if most % size == 0 and _is_allowed(settings, size)]
    fitting = len(sizes)
    if needed(most) > limit:  # tested first: a single pass does not hold the gradients of another
        fitting = bisect_right(sizes[:-1], limit, key=needed)
    found = forecast(step, sizes[max(fitting, 1) - 1])
    return MicroBatch(found.run.images_per_pass if fitting else None, found, memory, settings)


def fit_micro_batch(
    run: RunPlan, settings: RunSettings, images: int, classes: int | None
) -> tuple[RunPlan, str | None]:
    """The plan with the micro-batch that `auto` chooses for this machine's GPU or memory, and a note about it.

    The setting stays `auto`, so that a resume on another machine chooses for that one. More main memory may soon be
    free, so a run on a CPU that does not fit is tried with the fewest images.

    Args:
        run: Steps, batch sizes and ranks.
        settings: Settings of the run.
        images: Number of images in the data set.
        classes: Number of its classes, if it has labels.

    Raises:
        ValueError: Not even the fewest images fit a GPU.
    """
    train, on_gpu = settings.train, trains_on_gpu(settings.train)
    if train.micro_batch_size != "auto":
        return run, None
    memory = gpu_memory(train.devices or 1) if on_gpu else cpu_memory(train.devices or 1)
    if not on_gpu and (not memory or rough_bytes(settings, run.images_per_rank) < LITTLE * memory):
        return run, None
    try:
        chosen = choose_micro_batch(FakeStep(settings, run, images, classes), memory)
    except Exception as error:  # a custom task may do what fake tensors cannot; its run should continue
        reason = brief(str(error))
        return run, f"train.micro_batch_size auto: all {run.images_per_rank} images of each rank at once ({reason})"
    if chosen.size is None and on_gpu:
        raise ValueError(chosen.text())
    size = chosen.found.run.images_per_pass
    return replace(run, micro_batch_size=size), chosen.text() if on_gpu or size < run.images_per_rank else None


def rough_bytes(settings: RunSettings, images: int) -> float:
    """A rough upper estimate of the bytes that a step with this many images per pass holds."""
    encoder = settings.encoder
    tokens = sum(math.prod(size) for size in view_sizes(settings, settings.data.largest_side)) / encoder.patch**2
    return ROUGH_BYTES * images * tokens * encoder.width * (encoder.depth + 1)


def _is_allowed(settings: RunSettings, size: int) -> bool:
    try:
        settings.task.check_micro_batch(size)
    except ValueError:
        return False
    return True

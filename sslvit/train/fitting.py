"""What is chosen for the machine where nothing is given: the length of a run, and how many images it sees at once.

`train.epochs: null` is a length that suits the data set, and on a CPU ends within about an hour.
`train.micro_batch_size: auto` is as many images as memory holds, by the forecast of a step.
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

CPU_SECONDS = 3600.0  # of a run whose length nobody gave: it shows the way
# FLOP/s of a training step over those that `cpu_flops` measures: 0.8 to 1.0 in float32 and 0.45 to 0.9 in bf16, of MAE,
# DINO and iGPT on two CPU cores
STEP_EFFICIENCY = 0.75
# FLOP/s of a process among several, which must all come to the same length
ASSUMED_FLOPS = 5e10

# What a forecast does not count. The CUDA context with its loaded kernels takes about half a GiB, the workspaces of
# cuBLAS and cuDNN some 100 MiB, NCCL's buffers up to half a GiB, probes and pictures during training the rest.
RESERVED = 1.5 * 2**30
RESERVED_ON_CPU = 0.5 * 2**30  # the process with its libraries, images on their way, probes and pictures
# The caching allocator rounds sizes up and leaves holes between the blocks of one size and those of the next; kernels
# have room of their own, too.
FRAGMENTED = 0.1  # of the memory
# Bytes that a step on a CPU holds for each token, number of its width and block: two to ten times what is counted.
# Where even that is little beside the memory, the step is not counted, which takes a second.
ROUGH_BYTES, LITTLE = 256, 0.05


def fit_length(
    settings: RunSettings, images: int, classes: int | None, steps_per_epoch: int, global_batch_size: int
) -> tuple[TrainSettings, str]:
    """The settings with a length where none is given, and what to say about it.

    Args:
        settings: Settings of the run.
        images: Number of images in the data set.
        classes: Number of its classes, where it has labels.
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
    except Exception:  # a task of one's own may do what fake tensors cannot
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
    """Seconds of a run on the CPU of this machine, by the work of its step and a short measurement."""
    run = step.run
    one = run.ranks == 1
    flops = STEP_EFFICIENCY * (cpu_flops(step.settings.encoder.width, step.precision) if one else ASSUMED_FLOPS)
    return float(step.flops_per_image) * run.global_batch_size * run.total_steps / (flops * run.ranks)


@dataclass(frozen=True)
class MicroBatch:
    """Images per forward pass that fit the memory.

    Args:
        size: Number of images; None where not even the fewest fit.
        found: The forecast with that number, or with the fewest.
        memory: Bytes of the GPU, or what is free of a CPU's.
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
    """Bytes of a memory that a forecast may fill."""
    return (1 - FRAGMENTED) * memory - (RESERVED if on_gpu else RESERVED_ON_CPU)


def choose_micro_batch(step: FakeStep, memory: float) -> MicroBatch:
    """The most images per forward pass, of those that divide a rank's part of the batch, whose forecast fits.

    Args:
        step: A step of the run.
        memory: Bytes of the GPU, or what is free of a CPU's.
    """
    settings, limit, most = step.settings, usable(memory, step.on_gpu), step.run.images_per_rank
    settings.task.check_micro_batch(most)

    def needed(size: int) -> float:
        return forecast(step, size).total(settings.train.strategy)

    sizes = [size for size in range(1, most + 1) if most % size == 0 and _is_allowed(settings, size)]
    fitting = len(sizes)
    if needed(most) > limit:  # asked first: one pass does not hold the gradients of another
        fitting = bisect_right(sizes[:-1], limit, key=needed)
    found = forecast(step, sizes[max(fitting, 1) - 1])
    return MicroBatch(found.run.images_per_pass if fitting else None, found, memory, settings)


def fit_micro_batch(
    run: RunPlan, settings: RunSettings, images: int, classes: int | None
) -> tuple[RunPlan, str | None]:
    """The plan with the micro-batch that `auto` chooses for the GPU or the memory here, and what to say about it.

    The setting stays `auto`, so that a resume on another machine chooses for that one. What is free of a CPU's memory
    may soon be more, so a run that does not fit it is tried with the fewest images.

    Args:
        run: Steps, batch sizes and ranks.
        settings: Settings of the run.
        images: Number of images in the data set.
        classes: Number of its classes, where it has labels.

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
    except Exception as error:  # a task of one's own may do what fake tensors cannot; its run is to go on
        reason = brief(str(error))
        return run, f"train.micro_batch_size auto: all {run.images_per_rank} images of each rank at once ({reason})"
    if chosen.size is None and on_gpu:
        raise ValueError(chosen.text())
    size = chosen.found.run.images_per_pass
    return replace(run, micro_batch_size=size), chosen.text() if on_gpu or size < run.images_per_rank else None


def rough_bytes(settings: RunSettings, images: int) -> float:
    """What a step with so many images at once holds, roughly and rather too much."""
    encoder = settings.encoder
    tokens = sum(math.prod(size) for size in view_sizes(settings, settings.data.largest_side)) / encoder.patch**2
    return ROUGH_BYTES * images * tokens * encoder.width * (encoder.depth + 1)


def _is_allowed(settings: RunSettings, size: int) -> bool:
    try:
        settings.task.check_micro_batch(size)
    except ValueError:
        return False
    return True

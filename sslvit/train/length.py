"""`train.epochs: null`: a length that suits the data set, and on a CPU ends within about an hour."""

from __future__ import annotations

from dataclasses import replace

from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.settings.train import TrainSettings
from sslvit.train.fake_step import FakeStep
from sslvit.train.hardware import cpu_flops, trains_on_gpu

CPU_SECONDS = 3600.0  # of a run whose length nobody gave: it shows the way
# FLOP/s of a training step over those that `cpu_flops` measures: 0.8 to 1.0 in float32 and 0.45 to 0.9 in bf16, of MAE,
# DINO and iGPT on two CPU cores
STEP_EFFICIENCY = 0.75
# FLOP/s of a process among several, which must all come to the same length
ASSUMED_FLOPS = 5e10


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

"""Plot of a recipe's schedules: learning rate, weight decay, and a task's own such as DINO's momentum."""

from __future__ import annotations

from pathlib import Path

from sslvit.data.examples import Examples
from sslvit.data.open import shard_cache
from sslvit.data.plan import evenly_spaced
from sslvit.figures import plot_curves
from sslvit.settings import RunSettings
from sslvit.train.forecast import plan_step

POINTS = 400  # of a curve
STEPS_PER_EPOCH = 1000  # assumed if no images are given; the curves over epochs hardly depend on it


def plot_schedule(settings: RunSettings, source: str | None, out: str | Path) -> Path:
    """Plot each scheduled value over the epochs of a run, as a fraction of its largest value.

    Args:
        settings: Settings of the run.
        source: Shards or a folder of images, which is not packed; None if the settings specify batch size and epochs.
        out: PNG file.

    Raises:
        ValueError: The length or batch size depends on images that are not given, or on the machine.
    """
    train, batch = settings.train, settings.data.global_batch_size
    if train.budget is not None and train.steps is None:
        raise ValueError(
            f"show schedule: train.budget {train.budget} is a number of steps that is measured before the run. Give "
            "one with --train.steps."
        )
    if source is not None:
        examples = Examples.open(source, shard_cache(settings.data))
        classes = examples.classes
        images = settings.data.images_of(examples.images, examples.location, classes)
    elif train.steps is not None:
        raise ValueError(
            "show schedule: how many epochs train.steps are depends on the images. Name their shards or folder."
        )
    elif batch is None or train.epochs is None:
        key = "data.global_batch_size" if batch is None else "train.epochs"
        raise ValueError(
            f"show schedule: {key} is null here and depends on the images. Name their shards or folder, or give {key}."
        )
    else:
        images, classes = STEPS_PER_EPOCH * batch, 2  # no schedule depends on the number of classes
    task = plan_step(settings, images, classes).task
    steps = evenly_spaced(task.run.total_steps, POINTS).tolist()
    epochs = [step / task.run.steps_per_epoch for step in steps]
    curves = {}
    for name in sorted(name for name in dir(type(task)) if name.endswith("_at")):
        values = [getattr(task, name)(step) for step in steps]
        largest = max(values)
        label = f"{name.removesuffix('_at').replace('_', ' ')} (up to {largest:.3g})"
        curves[label] = (epochs, [value / (largest or 1) for value in values])
    return plot_curves(out, curves, "epoch", "fraction of the largest value")

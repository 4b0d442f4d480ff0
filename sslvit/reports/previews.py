"""Plots of what a recipe will do: its schedules, and its input to the model with the boxes of the views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sslvit.data.decode import decode_pixels
from sslvit.data.examples import Examples
from sslvit.data.header import BadImage
from sslvit.data.loader import encoder_views, make_batch
from sslvit.data.open import open_shards, shard_cache
from sslvit.data.plan import evenly_spaced
from sslvit.data.reader import ShardReader
from sslvit.data.resample import Boxes
from sslvit.figures import plot_curves, plot_images
from sslvit.files import printable
from sslvit.settings import RunSettings
from sslvit.settings.views import TransformSettings
from sslvit.train.forecast import plan_step

POINTS = 400  # of a curve
STEPS_PER_EPOCH = 1000  # assumed if no images are given; the curves over epochs hardly depend on it
SIDE = 192  # pixels of an image with boxes
COLORS = ((1.0, 0.6, 0.0), (0.2, 0.75, 1.0))  # of boxes: for views of the largest size, and for smaller ones


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


def plot_views(settings: RunSettings, source: str, out: str | Path, images: int = 8) -> Path:
    """Plot images with a box for each view, and below them the views as in the first epoch of a run.

    Raises:
        ValueError: One of the images cannot be read.
    """
    index, encoder = open_shards(source), settings.encoder
    views = encoder_views(encoder, settings.data.view, settings.seed, fill=encoder.mean)
    reader = ShardReader(index, encoder.channels, 0)
    samples = evenly_spaced(len(index), images)
    epochs = np.zeros_like(samples)
    batch = make_batch(reader, views, samples, epochs)
    if batch.unreadable:
        key, reason = next(iter(batch.unreadable.items()))
        raise ValueError(f"{source}: {printable(key)} cannot be read ({printable(reason)}).")
    largest = max(view.shape[2] for view in batch.views)
    titles, rows = [], []
    if not isinstance(settings.data.view, TransformSettings):  # whose views have no boxes
        originals = [_decode(reader, int(sample)) for sample in samples]
        sides = np.array([image.shape[:2] for image in originals])
        boxes = views.sample_boxes(sides, samples, epochs)
        drawn = [np.asarray(image, np.float32) / 255 for image in originals]
        of_image = [[(size[0] == largest, box[row]) for size, box in boxes] for row in range(len(drawn))]
        rows.append(np.stack([_with_boxes(*pair) for pair in zip(drawn, of_image, strict=True)]))
        titles.append("image, and the\nboxes of its views")
    for number, view in enumerate(batch.views, 1):
        titles.append(f"view {number}\n{view.shape[2]} x {view.shape[3]}")
        rows.append(view.float().numpy() / 255)
    return plot_images(out, rows, titles)


def _decode(reader: ShardReader, sample: int) -> np.ndarray:
    """Decode an image to pixels 'h w c'."""
    content = reader.read(sample)
    try:
        return decode_pixels(content, reader.channels, reader.bits, header=reader.header(content))
    except BadImage as error:  # unlikely, since the views of this image could be made
        raise ValueError(f"{printable(reader.key(sample))} cannot be read ({error}).") from error


def _with_boxes(image: np.ndarray, boxes: list[tuple[bool, Boxes]]) -> np.ndarray:
    """Draw an image 'h w c' with the outlines of boxes, which may reach beyond it, on a square canvas 'c side side'."""
    height, width = image.shape[:2]
    corners = [(box.top[0], box.left[0], box.top[0] + box.height[0], box.left[0] + box.width[0]) for _, box in boxes]
    edges = np.array([(0.0, 0.0, height, width), *corners])
    (top, left), (bottom, right) = edges[:, :2].min(0), edges[:, 2:].max(0)
    scale = (SIDE - 1) / max(bottom - top, right - left)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    small = F.interpolate(tensor, (rows, columns), mode="bilinear", antialias=True)[0].numpy()
    small = small[:3] if small.shape[0] >= 3 else small[:1].repeat(3, 0)
    canvas = np.ones((3, SIDE, SIDE), np.float32)
    y, x = round(-top * scale), round(-left * scale)
    canvas[:, y : y + rows, x : x + columns] = small[:, : SIDE - y, : SIDE - x]
    drawn = np.round((edges[1:] - [top, left, top, left]) * scale).clip(0, SIDE - 1).astype(int)
    for (is_large, _), (first_row, first_column, last_row, last_column) in zip(boxes, drawn, strict=True):
        color = np.array(COLORS[0 if is_large else 1], np.float32)[:, None]
        canvas[:, [first_row, last_row], first_column : last_column + 1] = color[..., None]
        canvas[:, first_row : last_row + 1, [first_column, last_column]] = color[..., None]
    return canvas

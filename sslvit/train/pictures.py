"""The pictures of every run: its loss, its views, the task's own pictures, and the encoder's attention."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from sslvit.data.module import ShardDataModule
from sslvit.data.stream import StreamIndex
from sslvit.evaluate.attention import class_attention, mass_mask, patch_colors
from sslvit.evaluate.neighbors import find_neighbors, plot_neighbors
from sslvit.figures import dim_outside, overlay_heat, plot_curves, plot_images
from sslvit.models import Backbone, ViTEncoder
from sslvit.tasks.base import Task
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)

IMAGES = 8
LARGER = 2  # times the training resolution
MASS = 0.6  # of the attention, in the masks
MAX_HEADS = 16  # one row of the picture each
NEIGHBORS_OF = 5  # images; `sslvit show neighbors` draws more
SEARCHED, SEARCHED_ON_CPU = 1000, 128  # images searched for neighbors, in a few seconds


def plot_pictures(folder: RunFolder, task: Task, data: ShardDataModule, device: torch.device) -> None:
    """Draw all pictures from the first images of the data set.

    Args:
        folder: The run's folder.
        task: The trained task, which is left on the CPU.
        data: The training data.
        device: Where the run trained, and where neighbors are searched and pixels sampled.
    """
    metrics = folder.read_metrics()
    steps = [line["step"] for line in metrics]
    losses = {"loss": (steps, [line["train/loss"] for line in metrics])}
    plot_curves(
        folder.figures / "loss.png", losses, "optimizer step", "loss", f"{type(task).__name__}: training loss"
    )  # fmt: skip
    task.to(device, torch.float32)
    plot_found_neighbors(folder, task, data)
    examples = data.examples(IMAGES)
    titles = [f"view {number}\n{view.shape[2]} x {view.shape[3]}" for number, view in enumerate(examples.views, 1)]
    plot_images(
        folder.figures / "views.png", [task.encoder.to_display(view).numpy() for view in examples.views], titles
    )
    moved = examples.to(device)
    with torch.no_grad():
        is_sound = bool(task.trained_encoder(moved.views[0]).isfinite().all())
    if not is_sound:
        task.to("cpu")
        logger.info("no pictures: what the encoder gives is not finite")
        return
    try:
        figures = task.figures(moved)
    finally:
        task.to("cpu")
    for name, (titles, rows) in figures.items():
        plot_images(folder.figures / f"{name}.png", rows, titles)
    encoder = task.trained_encoder
    if isinstance(encoder, Backbone) or encoder.settings.tokens == "pixel":
        return  # a backbone has no tokens; those of a pixel sequence are not patches, and its size is fixed
    sizes = {"": data.whole_images(IMAGES), "_larger": data.whole_images(IMAGES, LARGER)}
    if encoder.settings.pooling == "class":
        for suffix, images in sizes.items():
            titles, rows = attention_rows(encoder, images)
            plot_images(folder.figures / f"attention{suffix}.png", rows, titles)
    titles, rows = ["input"], [encoder.to_display(sizes["_larger"]).numpy()]
    for images in sizes.values():
        titles.append(f"patches at\n{images.shape[2]} x {images.shape[3]}")
        rows.append(patch_colors(encoder, images).numpy())
    plot_images(folder.figures / "patches.png", rows, titles)


def plot_found_neighbors(folder: RunFolder, task: Task, data: ShardDataModule) -> None:
    """Draw some images with their nearest neighbors, if the encoder's features are finite."""
    index, encoder = data.index, task.trained_encoder
    if isinstance(index, StreamIndex) or len(index) < 2:
        return
    reader = data.make_reader(index)
    found = find_neighbors(
        encoder, reader, NEIGHBORS_OF, among=SEARCHED_ON_CPU if task.device.type == "cpu" else SEARCHED
    )
    if np.isfinite(found.similarity).all():
        plot_neighbors(encoder, reader, found, folder.figures / "neighbors.png")


def attention_rows(encoder: ViTEncoder, images: Tensor) -> tuple[list[str], list[np.ndarray]]:
    """The class token's attention in the last block: per head over the input, and the patches that hold most of it."""
    maps = class_attention(encoder, images)  # b heads rows cols
    mean = maps.mean(1, keepdim=True)
    pixels = encoder.to_display(images).numpy()
    titles, rows = [f"input\n{images.shape[2]} x {images.shape[3]}"], [pixels]
    for head in range(min(maps.shape[1], MAX_HEADS)):
        titles.append(f"head {head + 1}")
        rows.append(overlay_heat(pixels, maps[:, head].numpy()))
    titles += ["mean of heads", f"{MASS:.0%} of it"]
    rows += [overlay_heat(pixels, mean[:, 0].numpy()), dim_outside(pixels, mass_mask(mean, MASS)[:, 0].numpy())]
    return titles, rows

"""Images and their nearest neighbors in feature space: what an encoder finds similar, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.data.loader import encoder_views, make_batch, normalized_view
from sslvit.data.plan import evenly_spaced
from sslvit.data.reader import ShardReader
from sslvit.evaluate.knn import nearest
from sslvit.evaluate.sources import full_float32
from sslvit.figures import plot_images
from sslvit.models import Encoder, device_and_dtype
from sslvit.progress import track

IMAGES_AT_ONCE = 16


@dataclass
class Neighbors:
    """Some images of a data set, each with its nearest neighbors in feature space, nearest first.

    Args:
        queries: Sample numbers of the images.
        samples: Sample numbers of their neighbors, 'queries neighbors'.
        similarity: Cosine similarity of the features of each neighbor.
        searched: Number of images that were searched for neighbors.
    """

    queries: np.ndarray
    samples: np.ndarray
    similarity: np.ndarray
    searched: int


@full_float32()
def find_neighbors(
    encoder: Encoder, reader: ShardReader, queries: int = 8, neighbors: int = 6, among: int = 1000
) -> Neighbors:
    """The nearest neighbors of images that are evenly spaced over a data set, by cosine similarity.

    It runs in this process alone, on the encoder's device. Images that cannot be read are left out.

    Args:
        encoder: An encoder in evaluation mode.
        reader: Reader of the data set.
        queries: Number of images whose neighbors are found.
        neighbors: Number of neighbors of each image.
        among: Number of evenly spaced images that are searched.

    Raises:
        ValueError: there are fewer than two images that can be read.
    """
    samples, features = features_of(encoder, reader, evenly_spaced(len(reader.index), among))
    if len(samples) < 2:
        raise ValueError(f"{reader.index.location}: neighbors take two images that can be read or more.")
    rows = torch.from_numpy(evenly_spaced(len(samples), queries))
    bank = F.normalize(features, dim=1)
    similarity, found = nearest(bank[rows], bank, torch.arange(len(bank)), neighbors + 1)
    is_other = found != rows[:, None]
    is_other[is_other.all(1), -1] = False  # an image with equal copies may not find itself: drop the last one
    shape = len(rows), found.shape[1] - 1
    return Neighbors(
        samples[rows.numpy()], samples[found[is_other].reshape(shape).numpy()],
        similarity[is_other].reshape(shape).numpy(), len(samples),
    )  # fmt: skip


@torch.no_grad()
def features_of(encoder: Encoder, reader: ShardReader, samples: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """The samples that can be read, and their features 'n d' on the CPU."""
    device, dtype = device_and_dtype(encoder)
    views, kept, rows = encoder_views(encoder.settings), [], []
    pieces = np.split(samples, range(IMAGES_AT_ONCE, len(samples), IMAGES_AT_ONCE))
    for piece in track(pieces, "features", len(samples), each=IMAGES_AT_ONCE):
        batch = make_batch(reader, views, piece, np.zeros_like(piece))
        images = normalized_view(batch, encoder.settings, device)[batch.valid.to(device)]
        if len(images):
            rows.append(encoder.features(images.to(dtype)).float().cpu())
            kept.append(piece[batch.valid.numpy()])
    return np.concatenate([samples[:0], *kept]), torch.cat(rows) if rows else torch.empty(0, 1)


def plot_neighbors(encoder: Encoder, reader: ShardReader, found: Neighbors, path: str | Path) -> Path:
    """Plot each image in a row with its neighbors, as the encoder sees them."""
    numbers = np.concatenate([found.queries[:, None], found.samples], axis=1)
    rows = [center_pixels(encoder, reader, row) for row in numbers]
    captions = [["image", *(f"{value:.2f}" for value in values)] for values in found.similarity]
    title = f"the nearest of {found.searched:,} images, by the cosine similarity of their features"
    return plot_images(path, rows, [""] * len(rows), title, captions)


def center_pixels(encoder: Encoder, reader: ShardReader, samples: np.ndarray) -> np.ndarray:
    """The encoder's center views of some images, 'n c h w' in [0, 1]."""
    batch = make_batch(reader, encoder_views(encoder.settings), samples, np.zeros_like(samples))
    pixels: np.ndarray = batch.views[0].float().div(255).clamp(0, 1).numpy()
    return pixels

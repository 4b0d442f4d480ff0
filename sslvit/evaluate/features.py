"""Frozen encoder -> one feature per image, in one pass over a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslvit.data.loader import evaluation_loader, normalised_view
from sslvit.data.reader import ShardReader
from sslvit.models import ViTEncoder
from sslvit.progress import track
from sslvit.settings import EncoderSettings

PIXEL_SIDE = 32  # raw pixels are compared at no more than this size


@dataclass
class Features:
    """Features of the readable images of a data set, on the CPU.

    Args:
        values: one row per image.
        labels: class numbers.
    """

    values: Float[Tensor, "n d"]
    labels: Int[Tensor, "n"]

    def __getitem__(self, chosen: Tensor) -> Features:
        return Features(self.values[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def encoder_features(
    encoder: ViTEncoder,
    reader: ShardReader,
    layer: int | None = None,
    pooling: str | None = None,
    batch: int = 256,
    workers: int = 0,
) -> Features:
    """Features of the centre view of every image, from batches of one size whatever the data set's length."""
    (features,) = layer_features(encoder, reader, [layer], pooling, batch, workers)
    return features


@torch.no_grad()
def layer_features(
    encoder: ViTEncoder,
    reader: ShardReader,
    layers: list[int | None],
    pooling: str | None = None,
    batch: int = 256,
    workers: int = 0,
) -> list[Features]:
    """encoder_features of several layers in one pass over the data; None is the encoder's own layer."""
    device = next(encoder.parameters()).device
    own = encoder.settings.feature_layer or encoder.settings.depth
    numbers = [own if layer is None else layer for layer in layers]
    encoder.eval()

    def features(images: Tensor) -> Tensor:
        return torch.cat(encoder.features_of_layers(images, numbers, pooling), 1).float()  # b (layers d)

    found = _collect(features, reader, encoder.settings, batch, workers, device)
    return [Features(values, found.labels) for values in found.values.chunk(len(numbers), 1)]


def pixel_features(reader: ShardReader, settings: EncoderSettings, batch: int = 256, workers: int = 0) -> Features:
    """The pixels themselves, at most 32 x 32: what a probe gets without learning."""

    def features(images: Tensor) -> Tensor:
        height, width = (min(PIXEL_SIDE, side) for side in images.shape[2:])
        if (height, width) != images.shape[2:]:
            images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
        return images.flatten(1)

    return _collect(features, reader, settings, batch, workers, torch.device("cpu"))


def _collect(
    features: Callable[[Tensor], Tensor], reader: ShardReader, settings: EncoderSettings, batch: int, workers: int,
    device: torch.device,
) -> Features:  # fmt: skip
    reader.index.labels_of(np.arange(0))  # refuses unlabelled data before the pass, not after it
    values, labels = [], []
    loader = evaluation_loader(reader, settings, batch, workers)
    for piece in track(loader, "features", len(loader) * batch, each=batch):
        rows = features(normalised_view(piece, settings, device)).cpu()
        values.append(rows[piece.valid])
        labels.append(piece.labels[piece.valid])
    return Features(torch.cat(values), torch.cat(labels))

"""Pictures of what an encoder does with images: where it looks, how far, and which pixels reach it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sslvit.data.loader import make_batch, normalized_view
from sslvit.data.open import open_shards
from sslvit.data.reader import ShardReader
from sslvit.data.views import Views
from sslvit.evaluate.attention import attention_measures, receptive_field
from sslvit.evaluate.dense import DenseTable, MaskedImages
from sslvit.evaluate.label_free import spread
from sslvit.evaluate.probe import untrained
from sslvit.figures import heat_over, image_rows, points
from sslvit.files import printable
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings
from sslvit.settings.views import CenterSettings
from sslvit.train.pictures import attention_rows

FIELD_COLUMNS = 4  # depths at which receptive fields are drawn


def some_images(settings: EncoderSettings, source: str, count: int) -> Tensor:
    """Images evenly spread over a data set, normalized, 'b c h w'.

    Raises:
        ValueError: one of them cannot be read.
    """
    index = open_shards(source)
    chosen = spread(len(index), count)
    views = Views(CenterSettings(), settings.image_size, settings.interpolation)
    batch = make_batch(ShardReader(index, settings.channels, 0), views, chosen, np.zeros_like(chosen))
    if batch.unreadable:
        key, reason = next(iter(batch.unreadable.items()))
        raise ValueError(f"{source}: {printable(key)} cannot be read ({printable(reason)}).")
    return normalized_view(batch, settings, torch.device("cpu"))


def draw_attention(encoder: ViTEncoder, images: Tensor, out: str | Path) -> Path:
    """The class token's attention in the last block, head by head."""
    titles, rows = attention_rows(encoder, images)
    return image_rows(out, rows, titles)


def draw_distance(encoder: ViTEncoder, images: Tensor, out: str | Path, seed: int = 0) -> tuple[Path, dict]:
    """Mean attention distance and entropy of every head against depth, beside the untrained network's.

    Returns:
        The PNG, and the numbers: network -> measure -> layers x heads.
    """
    numbers = {}
    for name, network in (("trained", encoder), ("untrained", untrained(encoder, seed))):
        distance, entropy = attention_measures(network, images)
        numbers[name] = {"distance_pixels": distance.tolist(), "entropy_nats": entropy.tolist()}
    panels = {
        "mean attention distance in pixels": {name: of["distance_pixels"] for name, of in numbers.items()},
        "entropy of the attention in nats": {name: of["entropy_nats"] for name, of in numbers.items()},
    }
    return points(out, panels, "block"), numbers


def draw_field(encoder: ViTEncoder, images: Tensor, out: str | Path, seed: int = 0) -> Path:
    """Which pixels reach the middle patch, block by block, beside the middle of a ResNet-18's stages.

    Raises:
        ValueError: pixel tokens, whose colors are looked up, so that no gradient reaches the pixels.
    """
    from torchvision.models import resnet18

    settings = encoder.settings
    if settings.tokens == "pixel":
        raise ValueError("receptive field: colors are looked up in the palette, so no gradient reaches the pixels.")
    blocks = sorted({round(1 + (settings.depth - 1) * i / (FIELD_COLUMNS - 1)) for i in range(FIELD_COLUMNS)})
    rows, titles = [], []
    for name, network in (("this encoder", encoder), ("untrained", untrained(encoder, seed))):
        fields = [receptive_field(middle_patch(network, block), images, seed) for block in blocks]
        rows.append(_as_row(fields))
        titles.append(f"{name}\nblocks {', '.join(map(str, blocks))}")
    torch.manual_seed(seed)
    cnn = resnet18(weights=None).eval()
    if settings.channels != 3:
        cnn.conv1 = nn.Conv2d(settings.channels, 64, 7, 2, 3, bias=False)
    fields = [receptive_field(middle_of_stage(cnn, stage), images, seed) for stage in range(1, 5)]
    rows.append(_as_row(fields[: len(blocks)]))
    titles.append(f"ResNet-18,\nuntrained,\nstages 1 to {len(blocks)}")
    return image_rows(out, rows, titles)


def middle_patch(encoder: ViTEncoder, block: int) -> Callable[[Tensor], Tensor]:
    def features(images: Tensor) -> Tensor:
        rows, columns = encoder.settings.grid_of(*images.shape[2:])
        middle = encoder.prefix + (rows // 2) * columns + columns // 2
        return encoder.layers(images, [block])[0][:, middle]

    return features


def middle_of_stage(cnn: nn.Module, stage: int) -> Callable[[Tensor], Tensor]:
    def features(images: Tensor) -> Tensor:
        maps = cnn.maxpool(cnn.relu(cnn.bn1(cnn.conv1(images))))
        for number in range(1, stage + 1):
            maps = getattr(cnn, f"layer{number}")(maps)
        return maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]

    return features


def _as_row(fields: list[Tensor]) -> np.ndarray:
    """Fields as colors, their square roots, so that what is faint can be seen."""
    heat = torch.stack(fields).sqrt().numpy()
    return heat_over(np.zeros((len(fields), 1, *heat.shape[1:])), heat) / 0.7


def draw_guesses(table: DenseTable, val: MaskedImages, settings: EncoderSettings, out: str | Path) -> Path:
    """The first reported images, their masks, and what each row of a segmentation guessed."""
    pairs = [val.read(number, settings) for number in range(len(next(iter(table.guesses.values()))))]
    images = np.stack([image.numpy() / 255 for image, _ in pairs])
    masks = {"mask": np.stack([mask for _, mask in pairs]), **table.guesses}
    drawn = [mask_colors(mask, table.about["classes"]) for mask in masks.values()]
    return image_rows(out, [images, *drawn], ["image", *masks])


def mask_colors(masks: np.ndarray, classes: list[int]) -> np.ndarray:
    """Class numbers 'b h w' as colors 'b 3 h w'; pixels without a label are white."""
    from matplotlib import colormaps

    colors = np.ones((*masks.shape, 3))
    for place, number in enumerate(classes):
        colors[masks == number] = colormaps["tab20"](place % 20)[:3]
    return colors.transpose(0, 3, 1, 2)

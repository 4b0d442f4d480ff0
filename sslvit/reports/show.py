"""Figures of an encoder: attention maps, attention distances, receptive fields, neighbors, predicted masks."""

from __future__ import annotations

import colorsys
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.data.loader import encoder_views, make_batch, normalized_view
from sslvit.data.open import open_shards
from sslvit.data.plan import evenly_spaced
from sslvit.data.python_data import DataLike, path_of, takes_datasets
from sslvit.data.reader import ShardReader
from sslvit.environment import pick_device
from sslvit.evaluate.attention import attention_measures, patch_colors, patch_similarity, receptive_field
from sslvit.evaluate.dense import DenseTable
from sslvit.evaluate.encoders import EncoderLike, Size, borrows_modules, open_encoder
from sslvit.evaluate.masks import MaskedImages
from sslvit.evaluate.neighbors import find_neighbors, plot_neighbors
from sslvit.evaluate.probe import untrained
from sslvit.figures import overlay_heat, plot_images, plot_points
from sslvit.files import brief, check_new_picture, expand_path, printable, write_atomically
from sslvit.messages import for_python
from sslvit.models import Backbone, Encoder, ViTEncoder, make_encoder, require_transformer
from sslvit.models.mae import MAEModel
from sslvit.progress import track
from sslvit.reports.previews import plot_schedule, plot_views
from sslvit.results import Result
from sslvit.settings import EncoderSettings, RunSettings
from sslvit.settings.choices import not_one_of
from sslvit.tasks.mae import reconstruction_rows
from sslvit.tasks.released import load_mae
from sslvit.train.folder import RunFolder
from sslvit.train.pictures import attention_rows
from sslvit.train.prepare import read_settings

PCA_TITLES = ["input", "three principal\ncomponents"]
FIELD_COLUMNS = 4  # number of blocks whose receptive fields are plotted
Shown = Literal["attention", "distance", "field", "neighbors", "pca", "similarity", "reconstruct", "views", "schedule"]
OF_RECIPES = ("views", "schedule")
IMAGES = 8  # default number of images
GOLDEN_RATIO = 0.618  # step between hues, so that neighboring classes differ most


@dataclass(repr=False)
class Picture(Result):
    """A picture, displayed in notebooks.

    Args:
        png: Content of a PNG file.
        path: File to which it was written, if any.
        numbers: The plotted numbers by network and measure, if there are any.
    """

    png: bytes
    path: Path | None = None
    numbers: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write a PNG file, which must not exist yet."""
        check_new_picture(path)
        write_atomically(path, self.png)
        self.path = Path(path)
        return self.path

    def text(self) -> str:
        """The picture's path."""
        return str(self.path) if self.path else "a picture in memory, which save(PATH) writes"

    def to_dict(self) -> dict[str, Any]:
        """The picture's path and numbers."""
        return {"figure": self.path and str(self.path), **({"numbers": self.numbers} if self.numbers else {})}

    def _repr_png_(self) -> bytes:
        return self.png

    def _repr_html_(self) -> None:  # type: ignore[override]  # so that notebooks display the picture
        return None


@for_python
@takes_datasets("data")
@borrows_modules
def show(
    what: Shown,
    encoder: EncoderLike,
    data: DataLike | None = None,
    output: str | Path | None = None,
    *,
    images: int | None = None,
    among: int | None = None,
    patch: str | Sequence[int] | None = None,
    crop_fraction: float | None = None,
    size: Size | None = None,
    **changes: Any,
) -> Picture:
    """Plot an encoder's attention, features or reconstructions, or a recipe's views or schedule.

    Args:
        what: attention (of the class token), distance (of each head's attention), field (receptive field of a patch),
            neighbors (images with the nearest features), pca (principal components of the patches' features as
            colors), similarity (of one patch's features to those of all patches), reconstruct (an MAE run's
            reconstruction from visible patches), views (a recipe's input to its model) or schedule (a recipe's
            learning rate and other scheduled values over the epochs).
        encoder: An encoder, any module that maps images to vectors 'b d', or anything that `load_encoder` accepts; for
            reconstruct an MAE run or its model (sslvit.tasks.released.load_mae), and for views and schedule a recipe
            or a run.
        data: Shards, a folder of images, or a data set (as in `pretrain`). A schedule needs no data if the recipe
            specifies batch size and epochs.
        output: PNG file for the picture; None to write no file.
        images: Number of images, evenly spaced over the data set; None for 8.
        among: Number of evenly spaced images in which neighbors are searched; None for 1,000.
        patch: Row and column of the patch for similarity, (3, 4) or "3,4", from 0 at the top left; None for the middle
            one.
        crop_fraction: Side of the center crop as a fraction of the image's; None for the encoder's own.
        size: Input size in pixels, 64 or "48x64"; None for the encoder's own.
        changes: Other settings of the recipe, as in `pretrain`, for views and schedule.

    Returns:
        The picture, which notebooks display; for distance also the numbers.

    Raises:
        ValueError: The encoder does not support the plot, an image cannot be read, or the file exists already.
        FileNotFoundError: The encoder or the images do not exist.

    Example:
        picture = sslvit.show("neighbors", "runs/dino", "photos")
        print(picture.save("neighbors.png"))
    """
    if what not in get_args(Shown):
        raise ValueError(f"what: {not_one_of(what, get_args(Shown))}")
    for name, number, least in (("images", images, 1), ("among", among, 2)):
        if number is not None and number < least:
            raise ValueError(f"--{name} {number}: must be {least} or more.")
    if among is not None and what != "neighbors":
        raise ValueError("--among is for show neighbors.")
    if patch is not None and what != "similarity":
        raise ValueError("--patch is for show similarity.")
    patch_at = None if patch is None else read_patch(patch)
    output = output and expand_path(output)
    check_new_picture(output)
    if what in OF_RECIPES:
        for name, value in (("size", size), ("crop-fraction", crop_fraction)):
            if value is not None:
                raise ValueError(f"--{name} is for pictures of an encoder; show {what} is of training.")
    elif changes:
        raise ValueError(f"{next(iter(changes))}: settings of a recipe are for show views and show schedule.")
    if what == "schedule" and images is not None:
        raise ValueError("--images is for pictures of images; a schedule takes the images themselves.")
    if what != "schedule" and data is None:
        raise ValueError(f"show {what}: name shards or a folder of images.")
    images = images or IMAGES
    source, numbers = "" if data is None else path_of(data), {}
    with tempfile.TemporaryDirectory(prefix="sslvit-show-") as folder:
        file = Path(folder) / "picture.png"
        if what == "schedule":
            plot_schedule(_read_recipe(what, encoder, changes), source or None, file)
        elif what == "views":
            plot_views(_read_recipe(what, encoder, changes), source, file, images)
        elif what == "reconstruct":
            model = _load_decoder(encoder).to("cpu")
            settings = open_encoder(model.encoder, crop_fraction, size).settings
            titles, rows = reconstruction_rows(model, some_images(settings, source, images))
            plot_images(file, rows, titles)
        elif what == "neighbors":
            network = open_encoder(encoder, crop_fraction, size).to(pick_device())
            reader = ShardReader(open_shards(source), network.settings.channels, 0)
            found = find_neighbors(network, reader, images, among=among or 1000)
            if not np.isfinite(found.similarity).all():
                raise ValueError(f"{source}: features are not finite: the weights are broken. Has the run diverged "
                                 "(health.json)?")  # fmt: skip
            plot_neighbors(network, reader, found, file)
        elif what == "field":
            network = open_encoder(encoder, crop_fraction, size).to("cpu")
            plot_field(network, some_images(network.settings, source, images), file)
        else:
            transformer = require_transformer(open_encoder(encoder, crop_fraction, size).to("cpu"), f"show {what}")
            seen = some_images(transformer.settings, source, images)
            if what == "attention":
                titles, rows = attention_rows(transformer, seen)
                plot_images(file, rows, titles)
            elif what == "pca":
                colors = F.interpolate(patch_colors(transformer, seen), size=seen.shape[2:])  # each patch at its size
                plot_images(file, [transformer.to_display(seen).numpy(), colors.numpy()], PCA_TITLES)
            elif what == "similarity":
                plot_similarity(transformer, seen, file, patch_at)
            else:
                numbers = plot_distance(transformer, seen, file)
        picture = Picture(file.read_bytes(), numbers=numbers)
    if output is not None:
        picture.save(output)
    return picture


def _load_decoder(source: EncoderLike) -> MAEModel:
    """Load an MAE model with its decoder from a run, unless the source is one already."""
    if isinstance(source, MAEModel):
        return source.eval()
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            "show reconstruct: takes the folder of a run of MAE or a model of sslvit.tasks.released.load_mae, since an "
            "encoder has no decoder."
        )
    return load_mae(expand_path(source))


def _read_recipe(what: str, config: EncoderLike, changes: dict[str, Any]) -> RunSettings:
    """Read the settings of a recipe or of a run."""
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(f"show {what}: takes a recipe, a YAML file or a run folder; an encoder does not tell it.")
    run = RunFolder(expand_path(config))
    return read_settings(run.config if run.is_run else os.fspath(config), changes)


def some_images(settings: EncoderSettings, source: str, count: int) -> Tensor:
    """Load normalized images 'b c h w', evenly spaced over a data set.

    Raises:
        ValueError: One of them cannot be read.
    """
    index = open_shards(source)
    samples = evenly_spaced(len(index), count)
    views = encoder_views(settings)
    batch = make_batch(ShardReader(index, settings.channels, 0), views, samples, np.zeros_like(samples))
    if batch.unreadable:
        key, reason = next(iter(batch.unreadable.items()))
        raise ValueError(f"{source}: {printable(key)} cannot be read ({printable(reason)}).")
    return normalized_view(batch, settings, torch.device("cpu"))


def read_patch(patch: str | Sequence[int]) -> tuple[int, int]:
    """Parse the row and column of a patch, from numbers or text such as 3,4."""
    given = patch.split(",") if isinstance(patch, str) else list(patch)
    try:
        row, column = (int(number) for number in given)
    except ValueError:
        raise ValueError(f"--patch {brief(patch)}: expected a row and a column, such as 3,4.") from None
    return row, column


def plot_similarity(encoder: ViTEncoder, images: Tensor, out: str | Path, patch_at: tuple[int, int] | None) -> Path:
    """Plot the similarity of one patch's token to those of all patches; by default of the middle patch.

    Raises:
        ValueError: The position is outside the grid of patches.
    """
    rows, columns = encoder.settings.grid_of(*images.shape[2:])
    row, column = patch_at or (rows // 2, columns // 2)
    similarity = patch_similarity(encoder, images, row, column).clamp(min=0).numpy()
    pixels = encoder.to_display(images).numpy()
    titles = ["input", f"similarity to\npatch {row}, {column}"]
    return plot_images(out, [pixels, overlay_heat(pixels, similarity)], titles)


def plot_distance(encoder: ViTEncoder, images: Tensor, out: str | Path) -> dict[str, dict[str, list[list[float]]]]:
    """Plot mean attention distance and entropy of every head against depth, next to those of the untrained network.

    Returns:
        The numbers: network -> measure -> layers x heads.
    """
    numbers = {}
    for name, network in (("trained", encoder), ("untrained", untrained(encoder, seed=0))):
        distance, entropy = attention_measures(network, images)
        numbers[name] = {"distance_pixels": distance.tolist(), "entropy_nats": entropy.tolist()}
    panels = {
        "mean attention distance in pixels": {name: of["distance_pixels"] for name, of in numbers.items()},
        "entropy of the attention in nats": {name: of["entropy_nats"] for name, of in numbers.items()},
    }
    plot_points(out, panels, "block")
    return numbers


def plot_field(encoder: Encoder, images: Tensor, out: str | Path, seed: int = 0) -> Path:
    """Plot the receptive field of the middle patch block by block, next to that of a ResNet-18's stages.

    Raises:
        ValueError: Tokens are palette indices, through which no gradient reaches the pixels, or the network has no
            known stages.
    """
    settings = encoder.settings
    if settings.tokens == "pixel":
        raise ValueError("receptive field: colors are looked up in the palette, so no gradient reaches the pixels.")
    depth = len(encoder.stages) if isinstance(encoder, Backbone) else settings.depth
    what = "stages" if isinstance(encoder, Backbone) else "blocks"
    if not depth:
        raise ValueError(f"receptive field: {settings.backbone} tells no stages.")
    blocks = sorted({round(1 + (depth - 1) * i / (FIELD_COLUMNS - 1)) for i in range(FIELD_COLUMNS)})
    rows: list[np.ndarray] = []
    titles: list[str] = []
    for name, network in (("this encoder", encoder), ("untrained", untrained(encoder, seed))):
        fields = [
            receptive_field(middle_patch(network, block), images, seed)
            for block in track(blocks, "receptive fields", len(blocks), what)
        ]
        rows.append(_as_row(fields))
        titles.append(f"{name}\n{what} {', '.join(map(str, blocks))}")
    torch.manual_seed(seed)
    cnn = make_encoder(replace(settings, backbone="torchvision:resnet18", small_stem=False)).eval()
    fields = [receptive_field(middle_patch(cnn, stage), images, seed) for stage in range(1, 5)]
    rows.append(_as_row(fields[: len(blocks)]))
    titles.append(f"ResNet-18,\nuntrained,\nstages 1 to {len(blocks)}")
    return plot_images(out, rows, titles)


def middle_patch(encoder: Encoder, layer: int) -> Callable[[Tensor], Tensor]:
    """Make a function from images to the middle patch's token after a block, or the middle of a stage's feature map."""

    def features(images: Tensor) -> Tensor:
        if isinstance(encoder, Backbone):
            maps = encoder.maps(images, [layer])[1][layer]
        else:
            (block,) = encoder.intermediates(images, [layer])
            maps = block.patch_map()
        return maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]

    return features


def _as_row(fields: list[Tensor]) -> np.ndarray:
    """Color the square roots of the fields, so that weak influence is visible."""
    heat = torch.stack(fields).sqrt().numpy()
    return overlay_heat(np.zeros((len(fields), 1, *heat.shape[1:])), heat) / 0.7


def plot_predictions(table: DenseTable, val: MaskedImages, settings: EncoderSettings, out: str | Path) -> Path:
    """Plot the first validation images, their masks, and the predictions of each row of a segmentation table."""
    pairs = [val.read(number, settings) for number in range(len(next(iter(table.predictions.values()))))]
    images = np.stack([image.numpy() / 255 for image, _ in pairs])
    masks = {"mask": np.stack([mask for _, mask in pairs]), **table.predictions}
    colored = [mask_colors(mask, table.about["classes"]) for mask in masks.values()]
    return plot_images(out, [images, *colored], ["image", *masks])


def mask_colors(masks: np.ndarray, classes: list[int]) -> np.ndarray:
    """Convert class numbers 'b h w' to colors 'b 3 h w', one for each class; pixels without a label are white."""
    from matplotlib import colormaps

    colors = np.ones((*masks.shape, 3))
    for index, number in enumerate(classes):
        if len(classes) <= 20:
            color = colormaps["tab20"](index)[:3]
        else:
            color = colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, (0.9, 0.5)[index % 2], (0.95, 0.6)[index // 2 % 2])
        colors[masks == number] = color
    return colors.transpose(0, 3, 1, 2)

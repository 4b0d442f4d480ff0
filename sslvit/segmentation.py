"""Segmentation with frozen patch tokens from Python, with the same names and paths as on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslvit.data.overlap import refuse_or_warn, stored_files, warn_of_shared
from sslvit.evaluate import dense
from sslvit.evaluate.dense import DenseTable
from sslvit.evaluate.encoders import EncoderLike, Size, borrows_modules, open_encoder
from sslvit.evaluate.masks import MaskedImages
from sslvit.evaluate.probe import SAME_DATA, untrained
from sslvit.evaluate.scores import Scores, format_table, score_cells
from sslvit.evaluate.sources import view_in_words
from sslvit.files import check_new_picture, expand_path
from sslvit.messages import for_python
from sslvit.models import ViTEncoder, require_transformer
from sslvit.reports.show import plot_predictions
from sslvit.results import Result
from sslvit.settings.probe import Device, Precision


@dataclass(repr=False)
class SegmentationTable(Result):
    """Segmentation scores in percent.

    Args:
        scores: Row -> mean IoU, pixel accuracy, and the IoU of each class.
        about: Details needed to report the scores.
        figure: Picture of images, masks and predictions, if requested.
    """

    scores: Scores
    about: dict[str, Any]
    figure: Path | None = None

    def text(self) -> str:
        """The table, with the details needed to report it."""
        about = self.about
        lines = [
            f"Percent on {about['val_images']:,} images of {about['val']} (maps fitted on {about['train_images']:,} of "
            f"{about['train']});\nof each image and mask: {about['seen']}; L2 penalty {about['l2']}",
            format_table(self.scores),
            fitted_in_words(about["fitted_patches_percent"])
            + f"of the masks' labeled pixels, {about['labeled_pixels_seen_percent']:.1f} % are in these views"
            + (f"\n{SAME_DATA}" if about["same_data"] else "")
            + (f"\n{self.figure}" if self.figure else ""),
        ]
        return "\n\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The scores, and the details needed to report them."""
        return {"rows": self.scores, "about": self.about}

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """Titles and rows of the score table."""
        return score_cells(self.scores)


def fitted_in_words(percent: dict[str, float]) -> str:
    """A line with the percentage of patches that the maps of some rows were fitted on; empty if it was all of them."""
    of_rows = [f"{value:.3g} % of them ({row})" for row, value in percent.items() if value < 100]
    return f"maps fitted on random patches of the training images: {', '.join(of_rows)}\n" if of_rows else ""


@for_python
@borrows_modules
def segment(
    encoder: EncoderLike,
    train: str | Path,
    val: str | Path,
    *,
    batch: int = 16,
    baselines: bool = True,
    seed: int = 0,
    allow_same_data: bool = False,
    figure: str | Path | None = None,
    workers: int | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    crop_fraction: float | None = None,
    size: Size | None = None,
) -> SegmentationTable:
    """Score patch tokens by linear segmentation: mean IoU.

    Args:
        encoder: A vision transformer, or anything that `load_encoder` accepts.
        train: Folder with images/NAME.jpg and masks/NAME.png, used to fit the linear map. A mask has one class number
            per pixel, and 255 for pixels without a label.
        val: Folder of the same kind, used to compute the scores.
        batch: Images per forward pass.
        baselines: Also score raw pixels and the same architecture with untrained weights.
        seed: Seed of the untrained weights and of the choice of held-out images.
        allow_same_data: Allow the same images in both sets; the scores then say nothing about other images.
        figure: PNG file for images, masks and predictions.
        workers: Number of loader processes; None to choose by the device.
        device: auto, cpu or cuda.
        precision: float32 or bf16.
        crop_fraction: Side of the center crop as a fraction of the image's; None for the encoder's own.
        size: Input size in pixels, 64 or "48x64"; None for the encoder's own.

    Returns:
        The table.

    Raises:
        ValueError: Masks that do not match the images, the same images in both sets, or an encoder without patch
            tokens.
        FileNotFoundError: The encoder or the images do not exist.

    Example:
        table = sslvit.segment("runs/dino", "voc/train", "voc/val", figure="segments.png")
        print(table.scores["encoder"]["mean IoU"])
    """
    figure = figure and expand_path(figure)
    check_new_picture(figure)
    of_train, of_val = (MaskedImages.open(expand_path(folder)) for folder in (train, val))
    names, is_same = f"{of_train.folder} and {of_val.folder}", of_train.is_same(of_val)
    if is_same:
        refuse_or_warn(names, allow_same_data, "--allow-same-data")
    else:
        warn_of_shared(stored_files(of_train.images), stored_files(of_val.images), names)
    network = require_transformer(open_encoder(encoder, crop_fraction, size), "segment")
    rows: dict[str, ViTEncoder | None] = {"encoder": network}
    if baselines:
        rows = {"raw pixels": None, "untrained encoder": untrained(network, seed), **rows}
    found: DenseTable = dense.segment(
        rows, of_train, of_val, batch, seed=seed, device=device, workers=workers, precision=precision
    )
    about = found.about | {"same_data": is_same, "seen": view_in_words(network.settings, precision)}
    table = SegmentationTable(found.scores, about)
    if figure:
        table.figure = plot_predictions(found, of_val, network.settings, figure)
    return table

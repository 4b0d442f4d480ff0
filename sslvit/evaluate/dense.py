"""Dense probe: linear segmentation on frozen patch tokens, from images and masks in a folder, as mean IoU.

A patch's target is the share of each class among its labeled pixels, so the loss is that of all pixels under one
guess per patch. Guesses are stretched to the pixels before they are counted. What is fitted and scored is the part of
each image that the encoder sees, and of that part, all pixels with a label.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sslvit import rng
from sslvit.data.decode import decode_pixels
from sslvit.data.header import BadImage, read_header
from sslvit.data.resample import normalize
from sslvit.data.views import center_crops
from sslvit.environment import pick_device
from sslvit.evaluate.linear import NOT_CONVERGED, STRENGTHS, TRIAL_ITERATIONS, solved_in_all
from sslvit.evaluate.logistic import fit_logistic
from sslvit.evaluate.scores import Draws, format_table
from sslvit.models import ViTEncoder
from sslvit.progress import track
from sslvit.settings import EncoderSettings

logger = logging.getLogger(__name__)

IGNORED = 255  # in a mask: a pixel without a label
HELD_OUT_IMAGES = 5  # every fifth training image chooses the strength
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FIT = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass
class MaskedImages:
    """Images with a class number for every pixel.

    Args:
        folder: that holds images/ and masks/.
        names: of the images, without ending.
        images: their files.
        masks: the masks' files.
    """

    folder: Path
    names: list[str]
    images: list[Path]
    masks: list[Path]

    @classmethod
    def open(cls, folder: str | Path) -> MaskedImages:
        """The pairs in a folder: images/NAME.jpg (or .png, .webp, .bmp) with masks/NAME.png.

        Raises:
            FileNotFoundError: no such folders.
            ValueError: no images, or images without a mask.
        """
        folder = Path(folder)
        for part in ("images", "masks"):
            if not (folder / part).is_dir():
                raise FileNotFoundError(
                    f"{folder / part}: no such folder. Put NAME.jpg in images/, NAME.png in masks/."
                )
        images = sorted(file for file in (folder / "images").iterdir() if file.suffix.lower() in ENDINGS)
        masks = [folder / "masks" / f"{file.stem}.png" for file in images]
        if not images:
            raise ValueError(f"{folder / 'images'}: holds no images ({', '.join(ENDINGS)}).")
        missing = [mask.name for mask in masks if not mask.is_file()]
        if missing:
            raise ValueError(f"{folder / 'masks'}: {len(missing)} masks are missing, the first: {missing[0]}.")
        return cls(folder, [file.stem for file in images], images, masks)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int, settings: EncoderSettings) -> tuple[Tensor, np.ndarray]:
        """Image 'c h w' (bytes) and mask 'h w': the encoder's view of both, at its size."""
        size = (settings.image_size[1], settings.image_size[0])
        mask = self._mask(number)
        box = seen_box(mask, settings)
        pixels = self._image(number, mask.size, settings.channels).resize(size, FIT[settings.interpolation], box)
        classes = np.array(mask.resize(size, Image.Resampling.NEAREST, box))
        values = np.atleast_3d(np.asarray(pixels))
        return torch.from_numpy(values.copy()).permute(2, 0, 1), classes.astype(np.int64)

    def count_labeled(self, number: int, settings: EncoderSettings) -> tuple[int, int]:
        """Labeled pixels of a mask: those that the encoder sees, and all."""
        mask = self._mask(number)
        left, top, right, bottom = seen_box(mask, settings)
        is_labeled = np.array(mask) != IGNORED
        rows, columns = (np.arange(length) + 0.5 for length in is_labeled.shape)
        seen = np.outer((rows > top) & (rows < bottom), (columns > left) & (columns < right))
        return int((is_labeled & seen).sum()), int(is_labeled.sum())

    def _mask(self, number: int) -> Image.Image:
        try:
            with Image.open(self.masks[number], formats=("PNG",)) as mask:
                if mask.mode not in ("L", "P", "1", "I;16", "I"):
                    raise ValueError(
                        f"{self.masks[number]}: a mask of mode {mask.mode}. Expected one number per pixel."
                    )
                mask.load()
                return mask
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.masks[number]}: unreadable ({error}).") from error

    def _image(self, number: int, size: tuple[int, int], channels: int) -> Image.Image:
        """An image, upright or as stored, whichever its mask was drawn on."""
        content = self.images[number].read_bytes()
        try:
            headers = [read_header(content, upright=upright) for upright in (True, False)]
            header = next((header for header in headers if (header.width, header.height) == size), None)
            if header is None:
                sides = (headers[0].width, headers[0].height)
                raise ValueError(f"{self.masks[number]}: {size} pixels, but its image has {sides}.")
            pixels = decode_pixels(content, channels, header=header)
        except BadImage as error:
            raise ValueError(f"{self.images[number]}: unreadable ({error}).") from error
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def seen_box(image: Image.Image, settings: EncoderSettings) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the encoder sees of an image, in its pixels."""
    draw = center_crops(settings.crop_fraction, settings.crop_mode)
    box = draw(np.empty((1, 0)), np.array([image.height]), np.array([image.width]), settings.image_size)
    left, top = float(box.left[0]), float(box.top[0])
    right, bottom = min(left + float(box.width[0]), image.width), min(top + float(box.height[0]), image.height)
    return max(left, 0.0), max(top, 0.0), right, bottom


@dataclass
class DenseTable:
    """Scores in percent.

    Args:
        draws: what was probed -> mean IoU, pixel accuracy, and the IoU of each class.
        about: what a reader needs to quote them.
        guesses: per row, class numbers of the first reported images 'b h w', to be drawn.
    """

    draws: Draws
    about: dict[str, Any]
    guesses: dict[str, np.ndarray]

    def text(self) -> str:
        """The table for a terminal, and how much of the images it is of."""
        share = self.about["labeled_pixels_seen_percent"]
        return f"{format_table(self.draws)}\n\nof the masks' labeled pixels, {share:.1f} % are in these views"


@torch.no_grad()
def segment(
    encoders: dict[str, ViTEncoder | None], train: MaskedImages, val: MaskedImages, batch: int = 16, shown: int = 6,
    seed: int = 0, device: str = "auto",
) -> DenseTable:  # fmt: skip
    """Score frozen patch tokens by a linear map to classes.

    Args:
        encoders: by the name of their row; None stands for the patches' own pixels. One at least is an encoder.
        train: that the maps are fitted on; every fifth image chooses the strength of the penalty.
        val: that is reported, and chooses nothing.
        batch: images per forward pass.
        shown: how many guesses are kept to be drawn.
        seed: of the held-out images.
        device: that runs the encoder and fits the maps.

    Raises:
        ValueError: classes in `val` that are not in `train`, or fewer than two.
    """
    device = pick_device(device)
    settings = next(encoder.settings for encoder in encoders.values() if encoder is not None)
    (classes, with_labels, _), (counted, _, coverage) = _classes(train, settings), _classes(val, settings)
    if len(with_labels) < 2:
        raise ValueError(
            f"{train.folder}: {len(with_labels)} of {len(train)} images have labeled pixels in the encoder's view. Two "
            "or more are needed, since some choose the penalty."
        )
    if not len(counted):
        raise ValueError(f"{val.folder}: its masks label no pixel (all {IGNORED}).")
    if len(classes) < 2:
        raise ValueError(f"{train.folder}: its masks hold {len(classes)} classes. Two or more can be told apart.")
    unknown = sorted(set(counted) - set(classes))
    if unknown:
        raise ValueError(f"{val.folder}: class {unknown[0]} is in no training mask.")
    is_held = np.zeros(len(train), bool)
    some = rng.generator(seed, "dense").permutation(len(with_labels))[: max(1, len(with_labels) // HELD_OUT_IMAGES)]
    is_held[with_labels[some]] = True  # an image without labels could choose nothing
    draws: Draws = {}
    guesses = {}
    for row, encoder in encoders.items():
        logger.info(f"probing {row}")
        source = None if encoder is None else encoder.to(device).eval()
        tokens, shares, weight, of_image = [], [], [], []
        for number, (maps, masks) in enumerate(_maps(source, train, settings, batch, device)):
            share, labeled = _shares(masks, classes, maps.shape[2:])
            tokens.append(rearrange(maps, "b d rows columns -> (b rows columns) d").cpu())
            shares.append(share)
            weight.append(labeled)
            of_image += [number * batch + i for i in range(len(masks)) for _ in range(labeled.numel() // len(masks))]
        values, target, counts = torch.cat(tokens), torch.cat(shares), torch.cat(weight)
        held = torch.from_numpy(is_held[np.array(of_image)]) & (counts > 0)
        head = _fit(values.to(device), target.to(device), counts.to(device), held.to(device), len(classes))
        confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
        kept = []
        for maps, masks in _maps(source, val, settings, batch, device):
            logits = (
                torch.einsum("bdhw,cd->bchw", (maps.double() - head[2]) / head[3], head[0]) + head[1][:, None, None]
            )
            logits = F.interpolate(logits.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
            guess = logits.argmax(1).cpu()
            kept += [classes[one] for one in guess.numpy()]
            truth = torch.from_numpy(_renumbered(masks, classes))
            seen = truth >= 0
            confusion += torch.bincount(
                truth[seen] * len(classes) + guess[seen], minlength=len(classes) ** 2
            ).view_as(confusion)  # fmt: skip
        draws[row] = {name: [value] for name, value in measures(confusion, classes).items()}
        guesses[row] = np.stack(kept[:shown])
    about = {
        "train": str(train.folder), "train_images": len(train), "val": str(val.folder), "val_images": len(val),
        "classes": classes.tolist(), "view": settings.crop_in_words, "labeled_pixels_seen_percent": 100 * coverage,
        "strength": "chosen on held-out training images", "seed": seed,
    }  # fmt: skip
    return DenseTable(draws, about, guesses)


def measures(confusion: Int[Tensor, "classes classes"], classes: np.ndarray) -> dict[str, float]:
    """Mean IoU over the classes that occur or are guessed, pixel accuracy, and each class's IoU, in percent.

    A class that is guessed and occurs nowhere has an IoU of 0.

    Args:
        confusion: pixels by class (rows) and guess (columns), over the whole data set.
        classes: their numbers in the masks.
    """
    right, total = confusion.diagonal().double(), confusion.sum().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = 100 * right / union
    counts = union > 0
    found = {"mean IoU": float(iou[counts].mean()), "pixel accuracy": float(100 * right.sum() / total)}
    return found | {f"class {number}": float(iou[i]) for i, number in enumerate(classes.tolist()) if counts[i]}


def _classes(data: MaskedImages, settings: EncoderSettings) -> tuple[np.ndarray, np.ndarray, float]:
    """Class numbers in the views of a folder, which is thereby known to be readable; numbers of the images with any.

    The third result is the share of all labeled pixels that the views hold.
    """
    found: set[int] = set()
    with_labels, seen, total = [], 0, 0
    for number in track(range(len(data)), "reading masks", len(data)):
        of_image = set(np.unique(data.read(number, settings)[1]).tolist()) - {IGNORED}
        with_labels += [number] if of_image else []
        found |= of_image
        counts = data.count_labeled(number, settings)
        seen, total = seen + counts[0], total + counts[1]
    return np.array(sorted(found)), np.array(with_labels, int), seen / max(total, 1)


def _maps(encoder: ViTEncoder | None, data: MaskedImages, settings: EncoderSettings, batch: int, device: str):
    """Batches of patch features 'b d rows columns' and masks 'b h w'."""
    for start in track(range(0, len(data), batch), "features", len(data), each=batch):
        pairs = [data.read(number, settings) for number in range(start, min(start + batch, len(data)))]
        images = normalize(torch.stack([image for image, _ in pairs]).to(device), settings.mean, settings.std)
        if encoder is None:
            maps = F.pixel_unshuffle(images, max(settings.patch, 2))
        else:
            maps = encoder.patch_features(images).float()
        yield maps, np.stack([mask for _, mask in pairs])


def _renumbered(masks: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Class numbers -> places in the list of classes; -1 for pixels without a label."""
    place = np.searchsorted(classes, masks).clip(max=len(classes) - 1)
    return np.where(classes[place] == masks, place, -1)


def _shares(masks: np.ndarray, classes: np.ndarray, grid) -> tuple[Tensor, Tensor]:
    """Of every patch: the share of each class among its labeled pixels, and how many pixels are labeled."""
    places = torch.from_numpy(_renumbered(masks, classes))
    one_hot = torch.stack([(places == i).float() for i in range(len(classes))], 1)  # b classes h w
    counts = F.adaptive_avg_pool2d(one_hot, tuple(grid))
    counts = rearrange(counts, "b classes rows columns -> (b rows columns) classes")
    labeled = counts.sum(1)
    return counts / labeled.clamp(min=1e-12)[:, None], labeled


def _fit(
    values: Float[Tensor, "n d"], target: Float[Tensor, "n classes"], counts: Float[Tensor, "n"], held: Tensor,
    classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weight, bias, and mean and scale of each channel; the strength has the lowest loss on held-out images."""
    values = values.double()
    mean, scale = values.mean(0), values.std(0, correction=0).clamp(min=1e-12)
    values, counts = (values - mean) / scale, counts.double()
    tried = torch.tensor(STRENGTHS, dtype=torch.float64, device=values.device)
    used = (counts * ~held).expand(len(tried), -1)
    weight, bias, is_solved = fit_logistic(values, target, classes, tried, used, TRIAL_ITERATIONS)
    losses = []
    for i in range(len(tried)):
        logits = values[held] @ weight[i].T + bias[i]
        losses.append(float((F.cross_entropy(logits, target[held].double(), reduction="none") * counts[held]).sum()))
    best = min(solved_in_all(is_solved[None]), key=lambda i: losses[i])
    weight, bias, is_solved = fit_logistic(values, target, classes, tried[best : best + 1], counts[None])
    if not is_solved:
        logger.info(NOT_CONVERGED)
    return weight[0], bias[0], mean.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)

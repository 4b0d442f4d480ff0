"""Dense probe: linear segmentation on frozen patch tokens, from images and masks in a folder, as mean IoU.

A patch's target is the frequency of each class among its labeled pixels, so the loss is that of all pixels under one
prediction per patch. Predictions are interpolated to the pixels before they are counted. The map is fitted and scored
on the part of each image that the encoder sees, on all of its labeled pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvit import rng
from sslvit.data.resample import normalize
from sslvit.environment import pick_device, pick_workers
from sslvit.evaluate.linear import L2_GRID, NOT_CONVERGED, TRIAL_ITERATIONS, LinearMap, solved_in_all_folds
from sslvit.evaluate.logistic import fit_logistic
from sslvit.evaluate.masks import IGNORED, MaskedImages, MaskSummary, class_indices, patch_targets, summarize_masks
from sslvit.evaluate.scores import Scores
from sslvit.evaluate.sources import forward_precision, full_float32, in_pieces
from sslvit.models import ViTEncoder
from sslvit.progress import track
from sslvit.settings import EncoderSettings
from sslvit.settings.probe import Precision
from sslvit.stopping import obey_parent_alone

logger = logging.getLogger(__name__)

HELD_OUT_EVERY = 5  # one in this many training images is held out to select the penalty
# numbers in features and targets that a map is fitted on; each takes some 42 bytes, which makes 11 GB
MAX_FITTED = 2**28


@dataclass
class DenseTable:
    """A table of scores in percent.

    Args:
        scores: row -> mean IoU, pixel accuracy, and the IoU of each class.
        about: what a reader needs to quote them.
        predictions: per row, predicted class numbers of the first reported images 'b h w', for a figure.
    """

    scores: Scores
    about: dict[str, Any]
    predictions: dict[str, np.ndarray]


@dataclass
class PatchMaps:
    """Computes the patch features of images, with their masks.

    Args:
        encoder: The encoder, on the device; None for the patches' own pixels.
        settings: Settings of the view of each image.
        batch: Images per forward pass.
        device: Device of the features.
        workers: Number of loader processes; None to choose by the device (`pick_workers`).
        precision: Precision of the encoder's forward passes.
    """

    encoder: ViTEncoder | None
    settings: EncoderSettings
    batch: int
    device: str
    workers: int | None = None
    precision: Precision = "float32"

    def __call__(self, data: MaskedImages) -> Iterator[tuple[Float[Tensor, "b d rows columns"], np.ndarray]]:
        """Batches of patch features, and of masks 'b h w'."""
        loader = DataLoader(
            _Pairs(data, self.settings), self.batch, collate_fn=list, worker_init_fn=obey_parent_alone,
            num_workers=pick_workers(self.workers, torch.device(self.device).type),
        )  # fmt: skip
        for pairs in track(loader, "features", len(data), each=self.batch):
            images = torch.stack([image for image, _ in pairs]).to(self.device)
            yield self.features_of(images), np.stack([mask for _, mask in pairs])

    def features_of(self, images: Tensor) -> Float[Tensor, "b d rows columns"]:
        """Patch features of images with pixels from 0 to 255."""
        settings = self.settings
        images = normalize(images, settings.mean, settings.std)
        if self.encoder is None:
            return F.pixel_unshuffle(images, max(settings.patch, 2))
        maps = []
        with forward_precision(self.precision, self.device):
            for some in in_pieces(images, settings.largest_activation(images.shape[2], images.shape[3])):
                (block,) = self.encoder.intermediates(some, [settings.probed_layer], norm=True)
                maps.append(block.patch_map().float())
        return torch.cat(maps)


class _Pairs(Dataset[tuple[Tensor, np.ndarray]]):
    def __init__(self, data: MaskedImages, settings: EncoderSettings) -> None:
        self.data, self.settings = data, settings

    def __getitem__(self, number: int) -> tuple[Tensor, np.ndarray]:
        return self.data.read(number, self.settings)

    def __len__(self) -> int:
        return len(self.data)


@torch.no_grad()
def segment(
    encoders: dict[str, ViTEncoder | None], train: MaskedImages, val: MaskedImages, batch: int = 16, pictures: int = 6,
    seed: int = 0, device: str = "auto", workers: int | None = None, precision: Precision = "float32",
) -> DenseTable:  # fmt: skip
    """Score frozen patch tokens by a linear map to classes.

    An encoder of None stands for the patches' own pixels. A random fifth of `train` selects the penalty; `val` is only
    scored. The predictions of the first `pictures` images are kept for a figure.

    Raises:
        ValueError: `val` has classes that are not in `train`, or `train` has fewer than two.
    """
    device = pick_device(device)
    settings = next(encoder.settings for encoder in encoders.values() if encoder is not None)
    of_train, of_val = summarize_masks(train, settings), summarize_masks(val, settings)
    check_masks(train, val, of_train, of_val)
    classes = of_train.classes
    count = max(1, len(of_train.labeled) // HELD_OUT_EVERY)
    is_held_out = torch.zeros(len(train), dtype=torch.bool)
    # only labeled images, since others cannot help to select
    is_held_out[of_train.labeled[rng.generator(seed, "dense").permutation(len(of_train.labeled))[:count]]] = True
    scores: Scores = {}
    predictions = {}
    fitted_percent = {}
    for row, encoder in encoders.items():
        logger.info(f"probing {row}")
        maps_of = PatchMaps(encoder and encoder.to(device).eval(), settings, batch, device, workers, precision)
        head, fraction = _fit_on(maps_of, train, classes, is_held_out, seed)
        fitted_percent[row] = 100 * fraction
        confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
        kept: list[np.ndarray] = []
        for maps, masks in maps_of(val):
            of_patches = head.logits(maps.movedim(1, 3)).movedim(3, 1).float()
            logits = F.interpolate(of_patches, size=masks.shape[1:], mode="bilinear", align_corners=False)
            predicted = logits.argmax(1).cpu()
            kept += [classes[one] for one in predicted.numpy()[: max(0, pictures - len(kept))]]
            truth = torch.from_numpy(class_indices(masks, classes))
            is_labeled = truth >= 0
            confusion += torch.bincount(
                truth[is_labeled] * len(classes) + predicted[is_labeled], minlength=len(classes) ** 2
            ).view_as(confusion)
        scores[row] = {name: [value] for name, value in measures(confusion, classes).items()}
        predictions[row] = np.stack(kept)
    about = {
        "train": str(train.folder), "train_images": len(train), "val": str(val.folder), "val_images": len(val),
        "classes": classes.tolist(), "view": settings.crop_in_words, "precision": precision,
        "labeled_pixels_seen_percent": 100 * of_val.coverage, "l2": "selected on held-out training images",
        "fitted_patches_percent": fitted_percent, "seed": seed,
    }  # fmt: skip
    return DenseTable(scores, about, predictions)


def check_masks(train: MaskedImages, val: MaskedImages, of_train: MaskSummary, of_val: MaskSummary) -> None:
    """Refuse masks on which nothing can be fitted or scored."""
    if len(of_train.labeled) < 2:
        raise ValueError(
            f"{train.folder}: {len(of_train.labeled)} of {len(train)} images have labeled pixels in the encoder's "
            "view. Two or more are needed, since some select the penalty."
        )
    if not len(of_val.classes):
        raise ValueError(f"{val.folder}: its masks label no pixel (all {IGNORED}).")
    if len(of_train.classes) < 2:
        raise ValueError(f"{train.folder}: its masks hold {len(of_train.classes)} classes. Two or more are needed.")
    unknown = sorted(set(of_val.classes.tolist()) - set(of_train.classes.tolist()))
    if unknown:
        raise ValueError(
            f"{val.folder}: class {unknown[0]} is in no training mask, as the encoder sees them. Add training images "
            f"with it, or label its pixels {IGNORED} (not scored)."
        )


def measures(confusion: Int[Tensor, "classes classes"], classes: np.ndarray) -> dict[str, float]:
    """Mean IoU over the classes that occur or are predicted, pixel accuracy, and each class's IoU, in percent.

    A class that is predicted and occurs nowhere has an IoU of 0.

    Rows of the confusion matrix are classes, columns are predictions.
    """
    right, total = confusion.diagonal().double(), confusion.sum().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = 100 * right / union
    counts = union > 0
    found = {"mean IoU": float(iou[counts].mean()), "pixel accuracy": float(100 * right.sum() / total)}
    return found | {f"class {number}": float(iou[i]) for i, number in enumerate(classes.tolist()) if counts[i]}


@full_float32()
def fit_head(
    values: Float[Tensor, "n d"], target: Float[Tensor, "n classes"], weights: Float[Tensor, "n"],
    is_held_out: Bool[Tensor, "n"],
) -> LinearMap:  # fmt: skip
    """Fit a map on all patches, with the L2 penalty that has the lowest loss on held-out patches."""
    values, weights, classes = values.double(), weights.double(), target.shape[1]
    mean, scale = values.mean(0), values.std(0, correction=0).clamp(min=1e-12)
    values = (values - mean) / scale
    l2 = torch.tensor(L2_GRID, dtype=torch.float64, device=values.device)
    used = (weights * ~is_held_out).expand(len(l2), -1)
    weight, bias, is_solved = fit_logistic(values, target, classes, l2, used, TRIAL_ITERATIONS)
    losses = []
    for i in range(len(l2)):
        logits = values[is_held_out] @ weight[i].T + bias[i]
        loss = F.cross_entropy(logits, target[is_held_out].double(), reduction="none")
        losses.append(float((loss * weights[is_held_out]).sum()))
    best = min(solved_in_all_folds(is_solved[None]), key=lambda i: losses[i])
    weight, bias, is_solved = fit_logistic(values, target, classes, l2[best : best + 1], weights[None])
    if not is_solved:
        logger.info(NOT_CONVERGED)
    return LinearMap(mean, scale, weight[0], bias[0])


def _fit_on(
    maps_of: PatchMaps, train: MaskedImages, classes: np.ndarray, is_held_out: Bool[Tensor, "images"], seed: int
) -> tuple[LinearMap, float]:
    """`fit_head` on the patches of all training images, each weighted by its labeled pixels.

    Of more than MAX_FITTED numbers, a random part of the patches is used; the second result is its expected fraction.
    """
    values, targets, weights, held_out = [], [], [], []
    first = 0
    for number, (maps, masks) in enumerate(maps_of(train)):
        target, labeled = patch_targets(masks, classes, (maps.shape[2], maps.shape[3]))
        per_image = labeled.numel() // len(masks)
        fraction = min(1.0, MAX_FITTED / (len(train) * per_image * (maps.shape[1] + len(classes))))
        drawn = rng.uniform((seed, "fitted patches"), np.arange(first, first + len(labeled)), 1)[:, 0]
        kept, first = torch.from_numpy(drawn < fraction), first + len(labeled)
        values.append(rearrange(maps, "b d rows columns -> (b rows columns) d")[kept.to(maps.device)])
        targets.append(target[kept])
        weights.append(labeled[kept])
        of_batch = is_held_out[number * maps_of.batch :][: len(masks)]
        held_out.append((of_batch.repeat_interleave(per_image) & (labeled > 0))[kept])
    columns = (torch.cat(batches).to(maps_of.device) for batches in (values, targets, weights, held_out))
    return fit_head(*columns), fraction

"""Settings of the training data: images, batches and views."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sslvit.files import brief, expand_path
from sslvit.settings.choices import check_bounds, checked
from sslvit.settings.views import VIEW_CHOICE, CropSettings, ViewSettings

MAX_PIXELS = 100_000_000  # a header that promises more is a decompression bomb, not a training image
MIN_STEPS_PER_EPOCH = 4  # to keep when a batch size is chosen or lowered
PIPE = "pipe:"  # prefix of a command
GZIPPED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MIN_IMAGES_PER_RANK = 4  # up to this, a chosen batch may leave fewer steps per epoch
# the name of a data set or function given from Python
IN_WORDS = re.compile(r"^\S+ of .+ given from Python( \([0-9a-f]{8}\))?$")


def is_given(name: str | None) -> bool:
    """Whether a name stands for a data set given from Python."""
    return name is not None and bool(IN_WORDS.match(name))


def one_source(names: str | Path | Sequence[str | Path] | None) -> str | None:
    """Join names of data into a single name: several files, as a shell expands *.tar, become a pattern.

    Raises:
        ValueError: There are several folders, or names that a pattern cannot contain.
    """
    if not names:
        return None
    if isinstance(names, (str, Path)):
        return str(names)
    words = [str(name) for name in names]
    if len(words) == 1:
        return words[0]
    other = next((name for name in words if not name.endswith(".tar")), None)
    if other is not None:
        raise ValueError(
            f"--data: {len(words)} names, and {brief(other)} is no .tar file. Give one folder, or mix several: "
            "--data.mixture '{A: 1, B: 1}'"
        )
    odd = next((name for name in words if set(name) & set("{},")), None)
    if odd is not None:
        raise ValueError(f"--data: {brief(odd)}: braces and commas in a name of several. Give their folder instead.")
    return f"{{{','.join(words)}}}"


@dataclass
@checked("data.")
class DataSettings:
    """The stream of batches."""

    shards: str | None = None
    """Folder of shards, pattern such as shards/{000000..000099}.tar, address of either (https, s3, gs), or folder of
    images (packed into the cache first).
    """
    mixture: dict[str, float] | None = None
    """Several data sets with their sampling weights in every batch, such as {shards/a: 3, shards/b: 1}; takes the place
    of data.shards.
    """
    view: Annotated[ViewSettings, VIEW_CHOICE] = field(default_factory=CropSettings)
    """How the views of an image are made; its kind picks the other keys."""
    global_batch_size: int | None = 4096
    """Number of images per optimizer step, over all ranks and micro-batches; null for a power of two on each rank that
    leaves a few steps per epoch, up to a task's usual size (MAE 1024, DINO 256, iGPT 128).
    """
    fit_batch: bool = False
    """Lower global_batch_size if the data set holds fewer images. In a recipe, the default is true unless
    global_batch_size is given on the command line; config.yaml records the batch size that was used.
    """
    fit_normalization: bool = False
    """Take encoder.mean and encoder.std from the index. In a recipe, the default is true for inputs of other than 1 or
    3 channels, unless they are given.
    """
    limit: int | None = None
    """Number of images to use, selected by the seed; null for all. A larger limit includes those of a smaller one."""
    limit_per_class: int | None = None
    """Number of images of each class to use, selected by the seed; null for all."""
    resolutions: list[int] | None = None
    """Image sides in pixels, one of which is sampled for each step; null for encoder.image_size."""
    resolution_fractions: list[float] | None = None
    """Fractions of the run, summing to 1, that use each of data.resolutions in turn, for a cheap start with small
    images (FastMIM, arXiv 2212.06593; FastDINOv2, arXiv 2507.03779). null samples one for each step.
    """
    workers: int | None = None
    """Number of loader processes per rank, which does not affect the order of the data. On a GPU, null means the rank's
    share of this machine's cores minus one, at most 16; on a CPU, whose cores the encoder needs, it means 0.
    """
    memory_limit_mb: int = 1024
    """Maximum size in MB of a data set of small, equally sized images that is decoded once and kept in memory."""
    cache_on_device: Literal["auto", True, False] = "auto"
    """Keep the training images on the device and make batches there; they must be decoded once (data.memory_limit_mb)
    and seen through a view without RandAugment or a function of your own. Pixels differ by at most 1/255 from those of
    the loader. auto does so on a GPU if the images take at most 5 % of its memory.
    """
    lanes: int | None = None
    """Number of positions in the data set that are read in parallel; null for one permutation of everything up to a
    million samples, and for the greatest common divisor of 64 and the batch size above that.
    """
    window_shards: int = 4
    """Number of shards of a lane that are shuffled together."""
    color_on: Literal["auto", "device", "workers"] = "auto"
    """Where color augmentation runs; auto is the training device if that is a GPU, otherwise the workers."""
    cache: str = "~/.cache/sslvit"
    """Folder for remote shards and for packed image folders."""
    cache_gb: float = 200
    """Maximum size in GB of network shards in data.cache. Packed image folders do not count and are never deleted."""
    stream_samples: int | None = None
    """Approximate number of images in gzipped tars and pipes, which cannot be indexed."""
    allow_pipe: bool = False
    """Run commands given as pipe:COMMAND. They can do anything that you can."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image; a larger image counts as unreadable."""
    max_unreadable_fraction: float = 0.01
    """Fraction of unreadable samples above which the run stops."""
    ledger: bool = False
    """Record the samples that every step reads."""

    def __post_init__(self) -> None:
        self.shards = self.shards and expand_path(self.shards)
        self.mixture = self.mixture and {expand_path(source): share for source, share in self.mixture.items()}
        if self.cache != DataSettings.cache:  # without a home folder, the default is elsewhere
            self.cache = expand_path(self.cache)
        if self.shards and self.mixture:
            raise ValueError("data.shards and data.mixture exclude each other. Name the shards in the mixture only.")
        check_bounds(self, "data.", "1 or more", "global_batch_size", "limit", "limit_per_class")
        if self.limit is not None and self.limit_per_class is not None:
            raise ValueError("data.limit and data.limit_per_class exclude each other: give one of them.")
        if self.mixture and self.has_limit:
            raise ValueError(
                "data.limit and data.limit_per_class draw from one data set (data.shards), not from a mixture. Leave "
                "them out."
            )
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers: {self.workers} must be 0 or more; 0 loads in the main process.")
        for key in ("lanes", "window_shards", "cache_gb", "stream_samples", "max_pixels"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"data.{key}: {value} must be positive.")
        if self.cache_on_device not in ("auto", False) and self.color_on == "workers":
            raise ValueError(
                "data.cache_on_device true: colors then change on the device, not where data.color_on says (workers). "
                "Set data.color_on to auto."
            )
        if self.resolutions is not None and not (self.resolutions and min(self.resolutions) > 0):
            raise ValueError(f"data.resolutions: {brief(self.resolutions)} must be a list of sides in pixels.")
        fractions = self.resolution_fractions
        if fractions is not None and len(fractions) != len(self.resolutions or []):
            raise ValueError(
                f"data.resolution_fractions: {brief(fractions)} must be one fraction of the run for each of "
                f"data.resolutions ({brief(self.resolutions)})."
            )
        if fractions is not None and not (min(fractions) > 0 and math.isclose(sum(fractions), 1, abs_tol=1e-6)):
            raise ValueError(f"data.resolution_fractions: {brief(fractions)} must be positive and sum to 1.")

    @property
    def is_stream(self) -> bool:
        """Whether the data can only be read from end to end."""
        name = self.shards or ""
        return name.startswith(PIPE) or (name.endswith(GZIPPED) and not Path(name).is_dir())

    @property
    def has_limit(self) -> bool:
        """Whether only a part of the data set is used."""
        return self.limit is not None or self.limit_per_class is not None

    @property
    def largest_side(self) -> int | None:
        """The largest side of the main views in the run; None for the encoder's own size."""
        return max(self.resolutions) if self.resolutions else None

    @property
    def fractions_of_sides(self) -> dict[int | None, float]:
        """Side of the main views -> fraction of the run; None stands for the encoder's own size."""
        if self.resolutions is None:
            return {None: 1.0}
        fractions = self.resolution_fractions or [1 / len(self.resolutions)] * len(self.resolutions)
        found: dict[int | None, float] = {}
        for side, fraction in zip(self.resolutions, fractions, strict=True):
            found[side] = found.get(side, 0.0) + fraction
        return found

    def images_of(self, images: int, location: str, classes: int | None = None) -> int:
        """Number of images that the limits select; an upper bound for a limit per class.

        Args:
            images: Number of images in the data set.
            location: Name of the data set, for the message.
            classes: Number of classes in the data set.

        Raises:
            ValueError: data.limit is above the number of images.
        """
        if self.limit is not None and self.limit > images:
            raise ValueError(f"data.limit: {self.limit} is more than the {images} images of {location}. Leave it out.")
        if self.limit_per_class is not None and classes is not None:
            return min(images, self.limit_per_class * classes)
        return images if self.limit is None else self.limit

    def batch_for(self, images: int, usual: int, multiple_of: int = 1) -> int:
        """Batch size for a data set of `images` images: the given one, or a chosen one that the data set fills.

        A chosen batch size is a power of two times the smallest one and leaves a few steps per epoch.

        Args:
            images: Number of images in the data set.
            usual: Largest batch size to choose if none is given (`Usual.batch`).
            multiple_of: Smallest batch size: one image or one micro-batch on each rank.
        """
        given = self.global_batch_size
        if given is not None and not (self.fit_batch and images < given):
            return given
        batch, most = multiple_of, usual if given is None else given
        while 2 * batch <= min(images, most) and (
            2 * batch * MIN_STEPS_PER_EPOCH <= images or 2 * batch <= MIN_IMAGES_PER_RANK * multiple_of
        ):
            batch *= 2
        return batch if given is None else min(batch, given)

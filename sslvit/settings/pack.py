"""How images become shards, and what only the user knows of images and of shards that others wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sslvit.files import printable
from sslvit.settings.choices import Arg, check_bounds, checked
from sslvit.settings.data import MAX_PIXELS


@dataclass
@checked("--")
class PackSettings:
    """How images become shards."""

    shard_mb: float = 256
    """Size in MB at which a new shard is begun."""
    resize: int | None = None
    """Length in pixels that the shorter side of larger images is shrunk to; null for no resizing."""
    encode: Literal["keep", "jpg", "png", "webp"] = "keep"
    """Format that images are encoded in; keep leaves each as it is."""
    quality: int = 92
    """Quality of encoded jpg and webp images."""
    orientation: Literal["upright", "stored"] = "upright"
    """Orientation of images: upright (turned as EXIF says when they are read or resized) or stored (as their pixels
    lie)."""
    decode: bool = False
    """Decode every image fully to find damage inside; otherwise only its header and end are checked."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is packed."""

    def __post_init__(self) -> None:
        if not 0 < self.shard_mb < 2**20:
            raise ValueError(f"--shard-mb {self.shard_mb}: must be in (0, 2**20).")
        check_bounds(self, "--", "1 or more", "resize", "max_pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: must be in [1, 100].")

    def describe(self) -> str:
        """What happens to the images, in words; empty for nothing."""
        if not self.resize and self.encode == "keep":
            return ""
        size = f"shorter side at most {self.resize} (bicubic), " if self.resize else ""
        kind = "re-encoded in their own format" if self.encode == "keep" else f"encoded as {self.encode}"
        quality = "" if self.encode == "png" else f", quality {self.quality}"
        return f"{size}{kind}{quality}; arrays of other numbers of channels as they are"


@dataclass
@checked("--")
class SourceOptions:
    """What only the user knows of a source; None where it tells by itself."""

    labels: Annotated[str | None, Arg("KEY")] = None
    """Array of labels in an .npz, or a file of them."""
    label_column: Annotated[str | None, Arg("NAME", is_path=False)] = None
    """Column of labels in a list or in a data set of Hugging Face; null for the one that its name tells."""
    images: Annotated[str | None, Arg("KEY", is_path=False)] = None
    """Array of images in an .npz."""
    layout: Literal["nhw", "nhwc", "nchw"] | None = None
    """Layout of an array; null for what its shape tells."""
    convert: Literal["unit", "signed", "byte", "deep"] | None = None
    """Values of an array that are not 8 or 16 bits: unit (0 to 1), signed (-1 to 1), byte (0 to 255) or deep (0 to
    65,535)."""

    split: Annotated[str | None, Arg("NAME", is_path=False)] = None
    """Split of a data set of Hugging Face or torchvision, such as train."""
    root: Annotated[str | None, Arg("FOLDER")] = None
    """Folder with the files of a data set of torchvision."""
    download: bool = False
    """Fetch the files of a data set of torchvision that are not there."""

    def reject_unused(self, source: str | Path, kind: str, *usable: str) -> None:
        """Raise ValueError if an option is given that this kind of source has no use for."""
        for name, value in vars(self).items():
            if value not in (None, False) and name not in usable:
                given = name.replace("_", "-") + ("" if value is True else f" {value}")
                raise ValueError(f"--{given}: {printable(source)} is {kind}. Omit the option.")


@dataclass
@checked("--")
class IndexOptions:
    """What only the user knows of shards that others wrote."""

    labels: Annotated[str | None, Arg("FIELD", is_path=False)] = None
    """Field with the class number or name of an image; null for cls, or txt where that holds few names."""
    image: Annotated[str | None, Arg("FIELD", is_path=False)] = None
    """Field with the image, such as left.jpg, where a key has several."""
    orientation: Literal["upright", "stored"] | None = None
    """Orientation of images: upright (turned as EXIF says) or stored (as their pixels lie); null for what an earlier
    index says, otherwise upright."""

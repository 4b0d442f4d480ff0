"""Settings for packing images into shards, and options for reading image sources and existing shards."""

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
    """How images are stored in shards."""

    shard_mb: float = 256
    """Maximum size of a shard in MB."""
    resize: int | None = None
    """Length in pixels to which the shorter side of larger images is resized; null for no resizing."""
    encode: Literal["keep", "jpg", "png", "webp"] = "keep"
    """Format in which images are encoded; keep does not change it."""
    quality: int = 92
    """Quality of encoded jpg and webp images."""
    orientation: Literal["upright", "stored"] = "upright"
    """Orientation of images: upright (rotated by EXIF when they are read or resized) or stored (pixels as stored)."""
    decode: bool = False
    """Decode every image completely to find damaged ones; otherwise only the header and end are checked."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image; larger images are skipped."""

    def __post_init__(self) -> None:
        if not 0 < self.shard_mb < 2**20:
            raise ValueError(f"--shard-mb {self.shard_mb}: must be in (0, 2**20).")
        check_bounds(self, "--", "1 or more", "resize", "max_pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: must be in [1, 100].")

    def describe(self) -> str:
        """Describe the changes to the images; empty if there are none."""
        if not self.resize and self.encode == "keep":
            return ""
        size = f"shorter side at most {self.resize} (bicubic), " if self.resize else ""
        kind = "re-encoded in their own format" if self.encode == "keep" else f"encoded as {self.encode}"
        quality = "" if self.encode == "png" else f", quality {self.quality}"
        return f"{size}{kind}{quality}; arrays of other numbers of channels as they are"


@dataclass
@checked("--")
class SourceOptions:
    """Options for reading a source of images; None where they can be inferred."""

    labels: Annotated[str | None, Arg("KEY")] = None
    """Array of labels in an .npz, or a file of labels."""
    label_column: Annotated[str | None, Arg("NAME", is_path=False)] = None
    """Column of labels in a list or in a data set of Hugging Face; null for a column with a usual name."""
    images: Annotated[str | None, Arg("KEY", is_path=False)] = None
    """Array of images in an .npz."""
    layout: Literal["nhw", "nhwc", "nchw"] | None = None
    """Layout of an array; null for the one inferred from its shape."""
    convert: Literal["unit", "signed", "byte", "deep"] | None = None
    """Range of values in an array that is not uint8 or uint16: unit (0 to 1), signed (-1 to 1), byte (0 to 255) or deep
    (0 to 65,535)."""

    split: Annotated[str | None, Arg("NAME", is_path=False)] = None
    """Split of a data set of Hugging Face or torchvision, such as train."""
    root: Annotated[str | None, Arg("FOLDER")] = None
    """Folder with the files of a data set of torchvision."""
    download: bool = False
    """Download missing files of a data set of torchvision."""

    def reject_unused(self, source: str | Path, kind: str, *usable: str) -> None:
        """Raise ValueError if an option is given that does not apply to this kind of source."""
        for name, value in vars(self).items():
            if value not in (None, False) and name not in usable:
                given = name.replace("_", "-") + ("" if value is True else f" {value}")
                raise ValueError(f"--{given}: {printable(source)} is {kind}. Omit the option.")


@dataclass
@checked("--")
class IndexOptions:
    """Options for indexing shards written by other tools."""

    labels: Annotated[str | None, Arg("FIELD", is_path=False)] = None
    """Field with the class number or name of an image; null for cls, or txt if it holds few different names."""
    image: Annotated[str | None, Arg("FIELD", is_path=False)] = None
    """Field with the image, such as left.jpg, where a key has several."""
    orientation: Literal["upright", "stored"] | None = None
    """Orientation of images: upright (rotated by EXIF) or stored (pixels as stored); null for that of an earlier index,
    otherwise upright."""

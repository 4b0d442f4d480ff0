"""Whatever a path names -> images to pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sslvit.data.array_images import CONVERSIONS
from sslvit.data.arrays import LAYOUTS, array_source, idx_source
from sslvit.data.folders import folder_source
from sslvit.data.lists import LISTS, list_source
from sslvit.data.sources import ImageSource
from sslvit.data.tars import COMPRESSED_TARS
from sslvit.files import printable


@dataclass
class SourceOptions:
    """What only the user knows of a source; None where it tells by itself.

    Args:
        labels: array of labels in an .npz, or a file of them.
        label_column: of a list.
        images: array of images in an .npz.
        layout: of arrays: nhw, nhwc or nchw.
        convert: how the values of an array become pixels: unit, signed, byte or deep.
    """

    labels: str | None = None
    label_column: str | None = None
    images: str | None = None
    layout: str | None = None
    convert: str | None = None

    def __post_init__(self) -> None:
        for key, known in (("layout", LAYOUTS), ("convert", tuple(CONVERSIONS))):
            value = getattr(self, key)
            if value is not None and value not in known:
                raise ValueError(f"--{key} {value}: expected one of {', '.join(known)}.")

    def reject_unused(self, source: Path, kind: str, *usable: str) -> None:
        """Raise ValueError if an option is given that this kind of source has no use for."""
        for name, value in vars(self).items():
            if value is not None and name not in usable:
                raise ValueError(f"--{name.replace('_', '-')} {value}: {printable(source)} is {kind}. Omit the option.")


def read_source(source: str | Path, options: SourceOptions | None = None) -> ImageSource:
    """Samples and class names of whatever a path names: a folder, a list, an array or an IDX file.

    Raises:
        ValueError: nothing there that is known, or an option that is for another kind of source.
    """
    path, options = Path(source), options or SourceOptions()
    if path.is_dir():
        options.reject_unused(path, "a folder")
        return folder_source(path)
    if not path.exists():
        raise ValueError(f"{printable(path)}: no such file or folder.")
    name = path.name.lower()
    if path.suffix.lower() in LISTS:
        options.reject_unused(path, "a list", "label_column")
        return list_source(path, options.label_column)
    if path.suffix.lower() in (".npy", ".npz"):
        options.reject_unused(path, "an array", "labels", "images", "layout", "convert")
        return array_source(path, options.labels, options.images, options.layout, options.convert)
    if "ubyte" in name or ".idx" in name or "-idx" in name:
        options.reject_unused(path, "an IDX file")
        return idx_source(path)
    if name.endswith((".tar", ".zip", *COMPRESSED_TARS)):
        raise ValueError(
            f"{printable(path)}: an archive. Unpack it and pack the folder; a .tar in WebDataset's format needs no "
            f"packing: sslvit shards index {printable(path.parent)}"
        )
    raise ValueError(
        f"{printable(path)}: neither a folder, nor a list ({', '.join(LISTS)}), nor an array (.npy, .npz), nor an IDX "
        "file."
    )

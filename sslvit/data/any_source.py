"""Read any kind of image source for packing, chosen by its path or name."""

from __future__ import annotations

from pathlib import Path

from sslvit.data.arrays import array_source, idx_source
from sslvit.data.dataset_source import (
    HUGGING_FACE,
    TORCHVISION,
    hugging_face_source,
    is_saved,
    torchvision_source,
)
from sslvit.data.folders import folder_source
from sslvit.data.lists import LISTS, list_source
from sslvit.data.shard_images import holds_shards, shard_source
from sslvit.data.sources import ImageSource
from sslvit.data.tars import COMPRESSED_TARS
from sslvit.files import printable
from sslvit.settings.pack import SourceOptions


def read_source(source: str | Path, options: SourceOptions | None = None) -> ImageSource:
    """Read samples and class names from a folder, shards, a list, an array, an IDX file or a library's data set.

    Raises:
        ValueError: the source is missing or of an unknown kind, or an option does not apply to it.
    """
    path, options = Path(source), options or SourceOptions()
    name = str(source)
    if name.startswith(HUGGING_FACE) or is_saved(path):
        options.reject_unused(name, "a data set of Hugging Face", "label_column", "split")
        return hugging_face_source(name, options)
    if name.startswith(TORCHVISION):
        options.reject_unused(name, "a data set of torchvision", "split", "root", "download")
        return torchvision_source(name, options)
    if path.is_dir():
        options.reject_unused(path, "a folder")
        return shard_source(path) if holds_shards(path) else folder_source(path)
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

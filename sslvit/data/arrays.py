"""Samples from arrays (.npy, .npz) and IDX files; layout, value range and labels are detected or given by options."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from sslvit.data.array_images import CONVERSIONS, RANGES, array_samples
from sslvit.data.header import MODES, read_npy_header
from sslvit.data.labels import LABEL_NAMES, NotClasses, Unlabeled, brief_names, labels_in, number_labels
from sslvit.data.sources import ImageSource, Sample
from sslvit.files import brief, printable

IDX_BYTES = 0x08  # the IDX type code of unsigned bytes
MAX_INFLATION = 1032  # highest compression ratio of deflate: a file that claims more is damaged


def array_source(
    path: Path, labels: str | None = None, images: str | None = None, layout: str | None = None,
    convert: str | None = None,
) -> ImageSource:  # fmt: skip
    """Read images from an .npy file, or images and optional labels from an .npz file.

    Args:
        path: The file.
        labels: Name of the label array in an .npz, or a file of labels; None to look for a matching array.
        images: Name of the image array in an .npz; None if there is only one.
        layout: nhw, nhwc or nchw; None to infer it from the shape.
        convert: One of CONVERSIONS; None for arrays of uint8 or uint16.

    Raises:
        ValueError: there is not exactly one image array, or its layout or value range must be given.
    """
    headers = _headers(path)
    name = _images_in(path, headers, images)
    shape, dtype = headers[name]
    notes: list[str] = []
    label_array, classes, numbers = _labels_in(path, headers, labels, name, shape[0], notes)
    unused = [other for other in headers if other not in (name, label_array)]
    if unused:
        remedy = "" if label_array else f" (for labels: --labels {printable(unused[0])})"
        notes.append(f"arrays that are not used: {brief_names(unused)}{remedy}")
    axes_order = _layout_of(path, shape, layout, notes)
    if dtype not in (np.uint8, np.uint16) and dtype.kind not in "biuf":
        raise ValueError(f"{printable(path)}: {printable(name)} holds {dtype}, not pixels.")
    array = _load(path, name)
    convert = _conversion_of(path, array, convert, notes)
    if axes_order == "nchw":
        array = array.transpose(0, 2, 3, 1)
    return ImageSource(_samples(path, array, numbers, convert), classes, notes=notes)


def idx_source(path: Path) -> ImageSource:
    """Read an IDX file of images (the format of MNIST), with labels if their file lies beside it.

    The labels of train-images-idx3-ubyte are expected in train-labels-idx1-ubyte; both files may be gzipped.
    """
    images = _read_idx(path)
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"{printable(path)}: its header says {brief(images.shape)}, and images are 'n h w'.")
    beside = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    candidates = [path.with_name(name) for name in (beside, f"{beside}.gz")]
    file = next((file for file in candidates if file.exists() and file.name != path.name), None)
    classes, numbers, notes = None, None, []
    if file is not None and beside != path.name.removesuffix(".gz"):
        labels = _read_idx(file)
        try:
            classes, numbers = number_labels(labels_in(labels, len(images)))
            notes.append(f"labels: {printable(file.name)}")
        except NotClasses as error:
            raise ValueError(f"{printable(file)}: {error}.") from error
    return ImageSource(_samples(path, images, numbers), classes, notes=notes)


def _samples(path: Path, images: np.ndarray, labels: list[int] | None, convert: str | None = None) -> list[Sample]:
    """Make samples that carry the modification time of the file they come from."""
    try:
        samples = array_samples(images, labels, convert=convert)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from error
    modified = os.stat(path).st_mtime_ns
    for sample in samples:
        sample.modified_ns = modified
    return samples


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array in a file, read from the headers alone.

    Raises:
        ValueError: the file is damaged or holds pickled objects.
    """
    try:
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                shape, dtype = _read_header(file)
                if math.prod(shape) * dtype.itemsize > os.path.getsize(path) - file.tell():
                    raise ValueError("it is shorter than it says")
                return {"images": (shape, dtype)}
        with zipfile.ZipFile(path) as archive:
            headers = {}
            for entry in archive.infolist():
                if not entry.filename.endswith(".npy"):
                    continue
                with archive.open(entry) as file:
                    shape, dtype = _read_header(file)
                if math.prod(shape) * dtype.itemsize > entry.file_size or entry.file_size > (
                    MAX_INFLATION * entry.compress_size + 1024
                ):
                    raise ValueError(f"{printable(entry.filename)} is shorter than it says")
                headers[entry.filename.removesuffix(".npy")] = shape, dtype
            return headers
    except Exception as error:  # zip, header and pickle errors; numpy parses headers with Python's parser
        reason = printable(error, 120) or type(error).__name__
        raise ValueError(f"{printable(path)}: not a readable array ({reason}).") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    shape, dtype = read_npy_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, and loading those could run code")
    return shape, dtype


def _load(path: Path, name: str) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except Exception as error:
        reason = printable(error, 120) or f"{type(error).__name__}: too large for this machine's memory?"
        raise ValueError(f"{printable(path)}: not a readable array ({reason}).") from error


def _images_in(path: Path, headers: dict, requested: str | None) -> str:
    if requested is not None:
        if requested not in headers:
            raise ValueError(f"--images {requested}: not in {printable(path)} (it holds {brief_names(headers)}).")
        return requested
    found = [name for name, (shape, _) in headers.items() if len(shape) in (3, 4) and 0 not in shape]
    if len(found) == 1:
        return found[0]
    shapes = ", ".join(f"{printable(name, 40)} {shape}" for name, (shape, _) in list(headers.items())[:8])
    remedy = f" Choose: --images {printable(found[0])}" if found else ""
    raise ValueError(f"{printable(path)}: expected one array of images, found {shapes or 'none'}.{remedy}")


def _labels_in(
    path: Path, headers: dict, requested: str | None, images: str, count: int, notes: list[str]
) -> tuple[str | None, list[str] | None, list[int] | None]:
    """Name of the label array, class names and class numbers; all None without labels."""
    if requested is not None:
        file = Path(requested)
        if requested not in headers and not file.is_file():
            raise ValueError(
                f"--labels {requested}: neither an array of {printable(path)} ({brief_names(headers)}) nor a file."
            )
        try:
            array = _load(path, requested) if requested in headers else _label_file(file)
            classes, numbers = number_labels(labels_in(array, count))
        except Unlabeled as error:
            raise ValueError(f"--labels {requested}: {error}. Leave it out to pack them without labels.") from error
        except NotClasses as error:
            raise ValueError(f"--labels {requested}: {error}.") from error
        notes.append(f"labels: {printable(requested)}")
        return requested, classes, numbers
    candidates = [
        name for name, (shape, _) in headers.items() if name != images and len(shape) <= 2 and shape[:1] == (count,)
    ]
    named = [name for name in candidates if _is_label_name(name)]
    name = next(iter(named or candidates), None) if len(named or candidates) == 1 else None
    if name is None:
        return None, None, None
    try:
        classes, numbers = number_labels(labels_in(_load(path, name), count))
    except NotClasses as error:
        notes.append(f"{printable(name)} is not used for labels: {error}")
        return name, None, None
    notes.append(f"labels: {printable(name)}")
    return name, classes, numbers


def _is_label_name(name: str) -> bool:
    """Whether an array's name suggests labels, such as y_train or train_labels."""
    words = name.lower().replace("-", "_").split("_")
    return name.lower() in LABEL_NAMES or any(word in LABEL_NAMES for word in words)


def _label_file(file: Path) -> np.ndarray:
    return _load(file, "") if file.suffix.lower() == ".npy" else _read_idx(file)


def _layout_of(path: Path, shape: tuple[int, ...], requested: str | None, notes: list[str]) -> str:
    """The layout: the requested one, or the one inferred from the shape.

    Raises:
        ValueError: the shape is ambiguous, or does not fit the requested layout.
    """
    possible = ("nhw",) if len(shape) == 3 else ("nhwc", "nchw")
    if requested is not None:
        if requested not in possible:
            raise ValueError(
                f"--layout {requested}: {printable(path)} has the shape {brief(shape)}, so {' or '.join(possible)}."
            )
        return requested
    if len(shape) == 3:
        if shape[2] in (3, 4) and shape[0] > 4:
            raise ValueError(
                f"{printable(path)}: the shape {brief(shape)} is that of one image 'h w c', or of {shape[0]} images of "
                f"{shape[1]} x {shape[2]}. Store it as an image, or pass --layout nhw."
            )
        return "nhw"
    first, last = shape[1] in MODES, shape[3] in MODES
    if not first and (last or shape[3] < min(shape[1], shape[2])):
        return "nhwc"
    if not last and (first or shape[1] < min(shape[2], shape[3])):
        notes.append(
            f"read as 'n c h w': {shape[1]} channels first, from the shape {brief(shape)} (override with --layout)"
        )
        return "nchw"
    raise ValueError(
        f"{printable(path)}: the shape {brief(shape)} could be 'n h w c' or 'n c h w'. Choose one: --layout nhwc "
        "or --layout nchw."
    )


def _conversion_of(path: Path, array: np.ndarray, requested: str | None, notes: list[str]) -> str | None:
    """The requested conversion; None for pixels of uint8 or uint16.

    Raises:
        ValueError: a conversion is needed and none is given; the message lists those that fit the values.
    """
    if requested is None and array.dtype in (np.uint8, np.uint16):
        return None
    if requested is not None:
        notes.append(f"values {CONVERSIONS[requested][0]} (--convert {requested})")
        return requested
    low, high = (float(f(array[:: max(1, len(array) // 256)])) for f in (np.min, np.max))
    usable = [name for name, (lowest, highest) in RANGES.items() if lowest <= low and high <= highest]
    remedies = "; ".join(f"--convert {name} ({CONVERSIONS[name][0]})" for name in usable)
    raise ValueError(
        f"{printable(path)}: values of {array.dtype} from {low:g} to {high:g}, and images are uint8 or uint16. "
        + (f"Choose a conversion: {remedies}" if remedies else "Scale them to 0 to 255 and store them as uint8.")
    )


def _read_idx(path: Path) -> np.ndarray:
    """Read IDX: two zero bytes, type, number of axes, axis lengths as big-endian 32-bit integers, then the values."""
    compressed = os.path.getsize(path)
    is_gzipped = path.suffix.lower() == ".gz"
    with (gzip.open if is_gzipped else open)(path, "rb") as file:
        try:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != IDX_BYTES:
                raise ValueError(f"{printable(path)}: not an IDX file of unsigned bytes.")
            axes = file.read(4 * head[3])
            if len(axes) < 4 * head[3]:
                raise ValueError(f"{printable(path)}: ends within its header.")
            shape = struct.unpack(f">{head[3]}I", axes)
            count = math.prod(shape)
            if count > (MAX_INFLATION if is_gzipped else 1) * compressed:
                raise ValueError(f"{printable(path)}: {compressed} bytes, but its header says {brief(shape)}.")
            content = file.read(count + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{printable(path)}: not readable ({printable(error, 80)}).") from error
    if len(content) != count:
        found = f"more than {count}" if len(content) > count else f"{len(content)} values"
        raise ValueError(f"{printable(path)}: {found}, but its header says {brief(shape)}.")
    return np.frombuffer(content, np.uint8).reshape(shape)

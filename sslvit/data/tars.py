"""List the members of a tar file by offset and find the images: WebDataset's keys and fields, with exceptions.

WebDataset splits a name at its first dot: photo.jpg is the field jpg of the key photo. Other tars have names with dots
(photo.0001.jpg), several images per key (7.left.jpg, 7.right.jpg) or links. Each of these is an image by its last
suffix, and is either a sample or reported as skipped.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from sslvit.data.header import IMAGE_SUFFIXES
from sslvit.files import printable

PICKLES = {".pyd", ".pkl", ".pickle", ".pth", ".pt"}  # unpickling these could run code
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "a gzip file", b"BZh": "a bzip2 file", b"\xfd7zXZ\0": "an xz file", b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\3\4": "a zip file", b"\x89HDF": "an HDF5 file",
}  # fmt: skip
CHUNK = 2**20
MAX_LABEL_BYTES = 256  # of a class name
FRAME_NUMBER = re.compile(r"[\d._-]+")  # the part of a name between its first and last dot


@dataclass
class TarImage:
    """A member that looks like an image.

    Args:
        name: Name of the member.
        key: Name up to its first dot, with its folder.
        field: Rest of the name after that dot.
        stem: Whole name without its last suffix.
        offset: Offset of its content.
        size: Length of its content.
    """

    name: str
    key: str
    field: str
    stem: str
    offset: int
    size: int


class TarMembers:
    """The members of a tar file."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file, self.length = file, length
        self.images: list[TarImage] = []
        self.texts: dict[tuple[str, str], str] = {}  # by stem and field
        self.fields: Counter = Counter()  # of members that are not images
        self.skipped: dict[str, str] = {}
        self._spans: dict[str, tuple[int, int]] = {}  # of regular files, as targets of links

    def read(self, name: str) -> None:
        """Read all members, also those of concatenated archives; stops at damage and reports it."""
        start: int | None = 0
        try:
            while start is not None:
                start = self._next_archive(self._read_archive(start, name))
        except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError) as error:
            found = len(self.images)
            self.skipped[name] = f"truncated tar: {found} images read, what follows is lost ({printable(error, 80)})"

    def _read_archive(self, start: int, name: str) -> int:
        """Read members up to the next end mark; returns its offset."""
        self.file.seek(start)
        with tarfile.open(fileobj=self.file, mode="r:") as tar:
            end = start
            for member in tar:
                if member.size < 0 or member.offset < end or member.offset_data + member.size > self.length:
                    raise tarfile.ReadError("a member ends beyond the file")
                end = member.offset_data + (member.size if member.isreg() else 0)
                if problem := self._add_member(member, tar):
                    self.skipped[f"{name}/{member.name}"] = problem
            self.file.seek(tar.offset)  # tarfile stops silently at a damaged header
            if self.file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark after the last member")
            return tar.offset

    def _next_archive(self, end: int) -> int | None:
        """Offset of the next archive after an end mark, or None."""
        self.file.seek(end)
        while chunk := self.file.read(CHUNK):
            rest = chunk.lstrip(b"\0")
            if rest:
                position = self.file.tell() - len(rest)
                return position - position % tarfile.BLOCKSIZE
        return None

    def _add_member(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> str:
        """Record an image or a text; returns the reason if the member is skipped, otherwise an empty string."""
        if member.isdir():
            return ""
        path = PurePosixPath(member.name)
        suffix = path.suffix.lower()
        looks_like_image = suffix in IMAGE_SUFFIXES
        if path.is_absolute() or ".." in path.parts:
            return "a path that leads out of its folder"
        if suffix in PICKLES:
            return "a pickle, which would run code"
        if path.name.startswith("._") or "__MACOSX" in path.parts:
            return "a leftover of macOS" if looks_like_image else ""
        span = (member.offset_data, member.size)
        if member.islnk() or member.issym():
            target = member.linkname if member.islnk() else os.path.normpath(path.parent / member.linkname)
            if target not in self._spans:
                return f"a link to {printable(target)}, which is not before it in the tar" if looks_like_image else ""
            span = self._spans[target]
        elif member.issparse() or not member.isreg():
            return "a sparse file" if member.issparse() else "not a regular file"
        self._spans[member.name] = span
        stem, _, field_name = path.name.partition(".")
        key, whole = str(path.parent / stem), str(path.with_suffix(""))
        if looks_like_image:
            if span[1] >= 2**32:
                return "more than 4 GB"
            self.images.append(TarImage(member.name, key, field_name.lower(), whole, *span))
            return ""
        self.fields[field_name.lower()] += 1
        if span[1] <= MAX_LABEL_BYTES:
            self.file.seek(span[0])
            text = self.file.read(span[1]).decode("utf-8", "surrogateescape").strip()
            self.texts[whole, suffix.removeprefix(".")] = text
            self.texts[key, field_name] = text
        return ""

    def labels(self, images: list[TarImage], name: str) -> list[str]:
        """The label of each image in the field of this name, as text; empty for none."""
        return [self.texts.get((image.stem, name), self.texts.get((image.key, name), "")) for image in images]


def choose_images(members: TarMembers, tar: str, field: str | None) -> tuple[list[TarImage], dict[str, str]]:
    """Choose the images that are samples; also returns the skipped ones with the reason.

    A plain field (photo.jpg) is the image of its key. A name with more dots is a separate sample if the part between
    its dots is a number (photo.0001.jpg) or if it is the only image of its key and in no other key beside one.
    Otherwise it is another field of its key, such as 7.seg.png beside 7.jpg, or one of several from which the user has
    to choose.
    """
    skipped: dict[str, str] = {}
    selected: list[TarImage] = []
    by_key: dict[str, list[TarImage]] = {}
    for image in members.images:
        by_key.setdefault(image.key, []).append(image)
    others: Counter = Counter()
    for key, images in by_key.items():
        if field is not None:
            requested = [image for image in images if image.field == field.lower()]
            others.update(image.field for image in images if image not in requested)
        else:
            requested, left = _select_for_key(images)
            fields = {image.field for image in left}
            if requested:
                for image in left:
                    if "." in image.field:
                        others[image.field] += 1
                    else:
                        skipped[f"{tar}/{image.name}"] = "a second image of its key"
            elif left:
                choices = ", ".join(sorted(fields)[:3])
                skipped[f"{tar}/{key}.*"] = (
                    f"{len(left)} images of one key ({printable(choices)}): choose one, as with --image {min(fields)}"
                )
        selected += requested
    if field is None:  # 8.seg.png without 8.jpg is no more an image than 7.seg.png beside 7.jpg
        lone = [image for image in selected if image.field in others]
        others.update(image.field for image in lone)
        selected = [image for image in selected if image.field not in others]
    for name, count in others.items():
        skipped[f"{tar}/*.{name}"] = (
            f"{count} images in another field of their keys (--image '{name}' takes these instead)"
        )
    selected.sort(key=lambda image: image.offset)
    return selected, skipped


def _select_for_key(images: list[TarImage]) -> tuple[list[TarImage], list[TarImage]]:
    """(samples, others) among the images of one key."""
    plain: list[TarImage] = []
    numbered: list[TarImage] = []
    named: list[TarImage] = []
    for image in images:
        middle = image.field.rpartition(".")[0]  # between the first and the last dot, empty for most
        kind = plain if not middle else numbered if FRAME_NUMBER.fullmatch(middle) else named
        kind.append(image)
    if plain or numbered:
        return plain[:1] + numbered, plain[1:] + named
    return (named, []) if len(named) == 1 else ([], named)


def compressed_kind(file: BinaryIO) -> str:
    """The kind of a compressed or other known file, from its first bytes; empty if unknown."""
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    return next((kind for magic, kind in COMPRESSION_MAGIC.items() if start.startswith(magic)), "")

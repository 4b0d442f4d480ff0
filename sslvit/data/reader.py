"""Address -> bytes by offset -> images; small sets decoded once and kept in memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sslvit.data.decode import BadImage, decode
from sslvit.data.index import ShardIndex
from sslvit.data.views import SMALL_SIDE
from sslvit.progress import track

OPEN_SHARDS = 64  # files kept open per process


class ShardReader:
    """Images of a data set by sample number.

    Args:
        index: of the shards.
        channels: of the images handed out.
        memory_limit_mb: sets of small equal images are decoded once if they fit.
    """

    def __init__(self, index: ShardIndex, channels: int = 3, memory_limit_mb: int = 1024) -> None:
        self.index = index
        self.channels = channels
        self.files: OrderedDict[str, int] = OrderedDict()
        self.decoded: Tensor | None = None
        self.bad: dict[int, str] = {}
        size = index.image_size
        if size is not None and max(size) <= SMALL_SIDE:
            wanted = len(index) * channels * size[0] * size[1]
            if wanted <= memory_limit_mb * 2**20:
                self.decoded = self._decode_all(size)

    def read(self, sample: int) -> bytes:
        """The image's bytes.

        Raises:
            BadImage: the shard ends before them.
        """
        path, offset, size = self.index.locate(sample)
        content = os.pread(self._open(path), size, offset)
        if len(content) < size:
            raise BadImage("shard ends early")
        return content

    def images(self, samples: Sequence[int]) -> tuple[Tensor | list[Tensor], dict[int, str]]:
        """uint8 images of the given samples, and for unreadable ones the reason by place.

        Returns:
            One tensor 'b c h w' for a set kept in memory, else a list of 'c h w'. An unreadable image is replaced
            by the next readable one of the same call (black if there is none), so that shapes and order stay.
        """
        if self.decoded is not None:
            bad = {i: self.bad[s] for i, s in enumerate(samples) if s in self.bad} if self.bad else {}
            images: Tensor | list = self.decoded[torch.as_tensor(samples)]
        else:
            bad, images = {}, []
            for i, sample in enumerate(samples):
                try:
                    images.append(decode(self.read(int(sample)), self.channels))
                except BadImage as error:
                    bad[i] = str(error)
                    images.append(None)
        readable = [i for i in range(len(samples)) if i not in bad] if bad else []
        for i in bad:
            if readable:
                images[i] = images[next((k for k in readable if k > i), readable[0])]
            elif images[i] is None:
                images[i] = torch.zeros(self.channels, SMALL_SIDE, SMALL_SIDE, dtype=torch.uint8)
        return images, bad

    def _open(self, path: Path) -> int:
        """The shard's file descriptor; the least recently used is closed when there are many."""
        file = self.files.pop(path.name, None)
        if file is None:
            file = os.open(path, os.O_RDONLY)
            if len(self.files) >= OPEN_SHARDS:
                os.close(self.files.popitem(last=False)[1])
        self.files[path.name] = file
        return file

    def _decode_all(self, size: list[int]) -> Tensor:
        everything = torch.zeros(len(self.index), self.channels, *size, dtype=torch.uint8)
        for sample in track(range(len(self.index)), "decoding", len(self.index)):
            try:
                image = decode(self.read(sample), self.channels)
                if list(image.shape[1:]) != size:
                    raise BadImage(f"{list(image.shape[1:])} pixels, the index says {size}")
                everything[sample] = image
            except BadImage as error:
                self.bad[sample] = str(error)
        return everything

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": OrderedDict()}  # a worker opens its own files

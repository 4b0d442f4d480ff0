"""Names and types of the keyword arguments that Python functions pass to a settings dataclass, for type checkers.

Defaults and descriptions are in the dataclasses; a test compares the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from sslvit.settings.probe import Device, Pooling, Precision
from sslvit.settings.protocols import ProtocolSettings


class KNNKeywords(TypedDict, total=False):
    """Keywords of `KNNSettings`."""

    layer: int | None
    pooling: Pooling | None
    blocks: int
    batch: int
    device: Device
    workers: int | None
    precision: Precision
    max_unreadable_fraction: float
    neighbors: Sequence[int]
    temperature: float
    whiten: bool
    baselines: bool
    seeds: int
    seed: int
    cache: str | None
    cache_gb: float
    allow_same_data: bool


class ProbeKeywords(KNNKeywords, total=False):
    """Keywords of `ProbeSettings`."""

    labels_per_class: int | None
    labels_percent: float | None
    draws: int
    protocol: str | Mapping[str, Any] | ProtocolSettings | None


class SampleKeywords(TypedDict, total=False):
    """Keywords of `SampleSettings`."""

    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    batch: int


class PackKeywords(TypedDict, total=False):
    """Keywords of `PackSettings` and `SourceOptions`."""

    shard_mb: float
    resize: int | None
    encode: Literal["keep", "jpg", "png", "webp"]
    quality: int
    orientation: Literal["upright", "stored"]
    decode: bool
    max_pixels: int
    labels: str | None
    label_column: str | None
    images: str | None
    layout: Literal["nhw", "nhwc", "nchw"] | None
    convert: Literal["unit", "signed", "byte", "deep"] | None
    split: str | None
    root: str | None
    download: bool

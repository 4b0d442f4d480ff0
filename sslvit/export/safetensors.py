"""sslvit's own format: encoder.json + encoder.safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sslvit.checkpoint import load_encoder, save_encoder
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings


def check(settings: EncoderSettings) -> None:
    """It holds every encoder."""


def write(encoder: ViTEncoder, folder: Path) -> None:
    save_encoder(encoder, folder)


def reopen(folder: Path) -> Callable[[Tensor], Tensor]:
    return load_encoder(folder).features

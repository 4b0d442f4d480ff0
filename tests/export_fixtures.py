"""Small encoders on disk, for exports."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sslvit.checkpoint import save_encoder
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

SMALL = {"image_size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2}


def shaken(module: nn.Module) -> nn.Module:
    """With no weight at its neutral start, so that each can be missed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def saved(folder: Path, **changes) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = shaken(ViTEncoder(EncoderSettings(**SMALL | changes)))
    save_encoder(encoder, folder, {"task": "mae", "step": 7, "data": {"samples": 9, "fingerprint": "f00d"},
                                   "settings": {"optim": {"base_lr": 1e-3}, "out": "/home/me/runs"}})  # fmt: skip
    return encoder

"""sslvit's own format: encoder.json + encoder.safetensors, and head.safetensors if there is a classifier."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sslvit.checkpoint import HEAD, load_encoder, save_encoder
from sslvit.exporters.cropping import IMAGE_CHANNELS
from sslvit.exporters.exported import Exported, with_outputs
from sslvit.models import require_transformer


def check(exported: Exported, size: str | None) -> bool:
    """Whether the encoder takes images of one size only; the format supports every encoder."""
    if size == "fixed":
        raise ValueError("--size fixed: is for other formats; safetensors holds the encoder as it is.")
    settings = exported.settings
    if size == "dynamic" and settings.has_fixed_size:
        raise ValueError(
            f"--size dynamic: a pixel sequence with encoder.pos_embed {settings.pos_embed} is tied to its size."
        )
    return settings.has_fixed_size


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    """Write encoder.json, encoder.safetensors and, with a classifier, head.safetensors."""
    save_encoder(exported.encoder, folder, exported.provenance)
    if exported.head is not None:
        weights = {f"head.{key}": value.contiguous() for key, value in exported.head.state_dict().items()}
        save_file(weights, folder / HEAD, {"classes": json.dumps(exported.classes)})


def reopen(folder: Path, exported: Exported) -> Exported:
    """Load the encoder with sslvit, including its classifier."""
    return with_outputs(require_transformer(load_encoder(folder), str(folder)), folder, exported.outputs)


def weights(folder: Path, exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expected tensors, and the tensors in the export."""
    return exported.state_dict(), reopen(folder, exported).state_dict()


def usage(exported: Exported, is_fixed: bool) -> str:
    """Lines of Python that load and run the export."""
    lines = ["import sslvit", "", 'encoder = sslvit.load_encoder(".")']
    if exported.outputs == "logits":
        lines = ["from safetensors.torch import load_file", *lines, f'head = load_file("{HEAD}")']
    call = {
        "tokens": "encoder(images)", "features": "encoder.features(images)",
        "logits": 'encoder.pool(encoder(images)) @ head["head.weight"].T + head["head.bias"]',
    }  # fmt: skip
    photo = '"photo.jpg"'
    if exported.settings.channels not in (*IMAGE_CHANNELS, 4):  # a photo may have alpha, or gets it
        lines = ["import numpy as np", *lines]
        photo = f"np.zeros(({', '.join(map(str, (*exported.settings.size, exported.settings.channels)))}), np.uint8)"
    lines.append(f"images = encoder.preprocess({photo})")
    return "\n".join([*lines, f"{exported.outputs} = {call[exported.outputs]}"])

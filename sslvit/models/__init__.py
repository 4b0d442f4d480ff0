"""Models in plain torch.nn, shared by all tasks."""

from sslvit.models.backbone import Backbone, Encoder, device_and_dtype, make_encoder, require_transformer
from sslvit.models.encoder import ViTEncoder
from sslvit.settings import PRESETS, preset

__all__ = [
    "PRESETS", "Backbone", "Encoder", "ViTEncoder", "device_and_dtype", "make_encoder", "preset", "require_transformer",
]  # fmt: skip

"""Plain torch.nn, shared by every task."""

from sslvit.models.encoder import ViTEncoder
from sslvit.settings import PRESETS, preset

__all__ = ["PRESETS", "ViTEncoder", "preset"]

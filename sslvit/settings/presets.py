"""Named encoder settings: ViT-Ti to ViT-H (Dosovitskiy et al. 2021; Touvron et al. 2021) and iGPT-S to iGPT-L."""

from __future__ import annotations

from typing import Any

from sslvit.settings.choices import not_one_of
from sslvit.settings.encoder import EncoderSettings

INIT = "init"  # stands for the encoder of --init
PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"width": 1280, "depth": 32, "heads": 16},
}
_IGPT = {
    "image_size": 32, "tokens": "pixel", "patch": 1, "norm": "rms", "norm_eps": 1e-5, "mlp": "quick_gelu",
    "bias": False, "causal": True, "class_token": False, "prefix_positions": "none", "pooling": "mean",
    "feature_norm": "next", "init": "scaled", "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip
PRESETS |= {
    "igpt_small": {**_IGPT, "width": 512, "depth": 24, "heads": 8},
    "igpt_medium": {**_IGPT, "width": 1024, "depth": 36, "heads": 8},
    "igpt_large": {**_IGPT, "width": 1536, "depth": 48, "heads": 16},
}


def preset_values(name: str) -> dict[str, Any]:
    """The settings of a preset."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"encoder.preset: {not_one_of(name, [*PRESETS, INIT])}")
    return dict(PRESETS[name])


def preset(name: str, **changes: Any) -> EncoderSettings:
    """The settings of a named encoder, with changes: ``preset("vit_tiny", patch=4, image_size=32)``."""
    return EncoderSettings(**{**preset_values(name), **changes})

"""timm: a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

config.json         architecture, its arguments and the preprocessing
model.safetensors   the weights, under the names they already have
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sslvit.layouts.timm import model_arguments
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

ARCHITECTURE = "vit_base_patch16_224"  # any plain ViT: the arguments below replace all that it says


def check(settings: EncoderSettings) -> None:
    """Raise ValueError if timm's plain ViT cannot hold this encoder, ImportError if timm is not there."""
    model_arguments(settings)
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError("--format timm: timm is not installed. Run: pip install 'sslvit[timm]'") from error


def write(encoder: ViTEncoder, folder: Path) -> None:
    settings = encoder.settings
    arguments = model_arguments(settings)
    weights = {key: value.contiguous() for key, value in encoder.state_dict().items() if key != "mask_token"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    about = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": settings.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [settings.channels, *settings.image_size], "fixed_input_size": False,
            "interpolation": settings.interpolation, "crop_pct": 1.0, "mean": settings.mean, "std": settings.std,
            "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")


def reopen(folder: Path) -> Callable[[Tensor], Tensor]:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

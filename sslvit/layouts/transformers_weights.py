"""Weights of transformers' ViT, Dinov2 and Dinov2WithRegisters without their folder (model.safetensors alone).

What config.json and preprocessor_config.json would say is taken from the released models, with a note.
"""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.transformers import from_sslvit as named
from sslvit.layouts.transformers import rename
from sslvit.layouts.vit import Converted, settings_from_shapes

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def recognise(keys: set[str]) -> bool:
    return "embeddings.patch_embeddings.projection.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """transformers -> ours; the pooler and the classifier become the extras."""
    notes: list[str] = []
    encoder, extras = rename(state)
    is_dinov2 = any(".ls1." in key for key in encoder)
    ignored = []
    if not is_dinov2 and encoder.pop("mask_token", None) is not None:
        ignored.append("embeddings.mask_token")
    is_rgb = encoder["patch_embed.proj.weight"].shape[1] == 3
    assumed = {"norm_eps": 1e-6 if is_dinov2 else 1e-12, "interpolation": "bicubic" if is_dinov2 else "bilinear"}
    assumed |= (IMAGENET if is_dinov2 else HALF) if is_rgb else {}
    kind = "dinov2" if is_dinov2 else "ViT"
    if open_questions := [key for key in assumed if key not in changes]:
        notes.append(
            f"settings: no config.json of transformers was read; as in its released {kind} models: "
            f"{', '.join(f'{key} {assumed[key]}' for key in open_questions)}. Give the folder if it says otherwise."
        )
    found = {
        **assumed, "prefix_positions": "class", "interpolate_antialias": "reg_token" in encoder, **changes,
    }  # fmt: skip
    return Converted(settings_from_shapes(encoder, heads, notes, **found), encoder, extras, notes, ignored, len(state))


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of the model that holds these weights."""
    is_dinov2 = any(".ls1." in key for key in encoder)
    kind = "dinov2_with_registers" if "reg_token" in encoder else "dinov2" if is_dinov2 else "vit"
    return named(encoder, kind) | extras

"""timm's VisionTransformer. Our names are timm's, so the weights pass through untouched."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslvit.layouts.vit import HEADS, Converted, settings_from_shapes, split_by_prefix


def recognize(keys: set[str]) -> bool:
    """Whether patch embedding and first block have timm's names."""
    return "patch_embed.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """Convert from timm's names; the classifier becomes the extras."""
    notes: list[str] = []
    encoder, head = split_by_prefix(state, HEADS)
    return Converted(settings_from_shapes(encoder, heads, notes, **changes), encoder, head, notes)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to timm, which has no mask token."""
    return {key: value for key, value in encoder.items() if key != "mask_token"} | extras

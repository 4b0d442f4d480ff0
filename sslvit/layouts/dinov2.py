"""The layout of DINOv2's released checkpoints.

With registers, positions are resampled to the exact size with antialiasing; without, by a scale factor with an offset
of 0.1 and no antialiasing. Registers have no position.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslvit.layouts.vit import HEADS, Converted, convert_vit, inverted, is_gated, require, split_by_prefix

REGISTERS = {"register_tokens": "reg_token"}
GATED = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}


def recognize(keys: set[str]) -> bool:
    """Whether there are a mask token and LayerScale, but no MAE decoder."""
    return {"mask_token", "cls_token", "blocks.0.ls1.gamma"} <= keys and "decoder_pos_embed" not in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """DINOv2 names -> ours; training heads are returned as extras."""
    backbone, training_heads = split_by_prefix(state, HEADS)
    encoder = _rename(backbone, REGISTERS | GATED, (1, 1, -1))
    require(encoder, "norm.weight", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma")
    has_registers = "reg_token" in encoder
    known = {
        "interpolate_antialias": has_registers,
        "interpolate_offset": 0.0 if has_registers else 0.1,
        "prefix_positions": "class",
    }
    return convert_vit("dinov2", encoder, training_heads, heads, changes, **known)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> DINOv2's."""
    names = REGISTERS | (GATED if is_gated(encoder) else {})
    return _rename(encoder, inverted(names), (1, -1)) | extras


def _rename(state: dict[str, Tensor], names: dict[str, str], mask_shape: tuple[int, ...]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        found[key] = value.view(mask_shape) if key == "mask_token" else value
    return found

"""The layout of DINOv2's released checkpoints.

With registers, positions are resampled to the size itself with antialiasing; without, by a scale factor with
an offset of 0.1 and no antialiasing. Registers have no position.
"""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.preprocessing import assumed
from sslvit.layouts.vit import HEADS, Converted, demand, settings_from_shapes, split

NAMES = {"register_tokens": "reg_token", "mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}


def recognize(keys: set[str]) -> bool:
    return {"mask_token", "cls_token", "blocks.0.ls1.gamma"} <= keys and "decoder_pos_embed" not in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """DINOv2 names -> ours; heads of training become the extras."""
    notes: list[str] = []
    encoder = {}
    backbone, heads_of_training = split(state, HEADS)
    for key, value in backbone.items():
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        encoder[key] = value.view(1, 1, -1) if key == "mask_token" else value
    demand(encoder, "norm.weight", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma")
    prepared = assumed("dinov2", encoder["patch_embed.proj.weight"].shape[1], "DINOv2's own evaluation", changes, notes)
    has_registers = "reg_token" in encoder
    found = {
        **prepared,
        "interpolate_antialias": has_registers,
        "interpolate_offset": 0.0 if has_registers else 0.1,
        "prefix_positions": "class",
        **changes,
    }
    return Converted(settings_from_shapes(encoder, heads, notes, **found), encoder, heads_of_training, notes)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> DINOv2's."""
    is_gated = encoder["blocks.0.mlp.fc1.weight"].shape[0] == 2 * encoder["blocks.0.mlp.fc2.weight"].shape[1]
    found = {}
    for key, value in encoder.items():
        key = key.replace("reg_token", "register_tokens")
        if is_gated:
            key = key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
        found[key] = value.view(1, -1) if key == "mask_token" else value
    return found | extras

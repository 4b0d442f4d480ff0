"""The layout of DINO's released checkpoints: a backbone alone, or student and teacher with heads.

Positions are resampled by a scale factor of (cells + 0.1) / trained cells, without antialiasing.
"""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.preprocessing import assumed
from sslvit.layouts.vit import HEADS, Converted, demand, settings_from_shapes, split


def recognize(keys: set[str]) -> bool:
    return any(key.removeprefix("module.").startswith("backbone.") for key in keys)


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """DINO names -> ours; `module.` and `backbone.` prefixes go, the projection head becomes the extras."""
    notes: list[str] = []
    state = {key.removeprefix("module."): value for key, value in state.items()}
    encoder, head = split(state, HEADS)
    encoder = {key.removeprefix("backbone."): value for key, value in encoder.items()}
    demand(encoder, "norm.weight")
    prepared = assumed("dino", encoder["patch_embed.proj.weight"].shape[1], "DINO's own evaluation", changes, notes)
    found = {**prepared, "interpolate_antialias": False, "interpolate_offset": 0.1, **changes}
    return Converted(settings_from_shapes(encoder, heads, notes, **found), encoder, head, notes)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> DINO's: the bare backbone, or `backbone.` and `head.` where there is a head."""
    return {f"backbone.{key}": value for key, value in encoder.items()} | extras if extras else dict(encoder)


def head_shape(head: dict[str, Tensor]) -> dict[str, int | bool]:
    """Fields of DINOSettings that the head's weights tell.

    Raises:
        ValueError: there is no head.
    """
    if "head.last_layer.weight_v" not in head:
        raise ValueError("these weights hold no projection head (head.last_layer.weight_v).")
    out_dim, bottleneck = head["head.last_layer.weight_v"].shape
    matrices = [value for key, value in sorted(head.items()) if key.startswith("head.mlp") and value.ndim == 2]
    return {
        "out_dim": out_dim, "bottleneck": bottleneck, "head_layers": len(matrices),
        "head_width": matrices[0].shape[0], "batch_norm": any("running_mean" in key for key in head),
        "norm_last_layer": bool((head["head.last_layer.weight_g"] == 1).all()),
    }  # fmt: skip

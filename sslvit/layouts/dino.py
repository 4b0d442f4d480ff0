"""The layout of DINO's released checkpoints: a backbone alone, or student and teacher with heads.

Positions are resampled by a scale factor of (cells + 0.1) / trained cells, without antialiasing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslvit.layouts.vit import HEADS, Converted, convert_vit, require, split_by_prefix


def recognize(keys: set[str]) -> bool:
    """Whether names have the prefix `backbone.`, as in files with a projection head."""
    return any(key.removeprefix("module.").startswith("backbone.") for key in keys)


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """DINO names -> ours, without the prefixes `module.` and `backbone.`; the projection head is returned as extras."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    encoder, head = split_by_prefix(state, HEADS)
    encoder = {key.removeprefix("backbone."): value for key, value in encoder.items()}
    require(encoder, "norm.weight")
    return convert_vit("dino", encoder, head, heads, changes, interpolate_antialias=False, interpolate_offset=0.1)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> DINO's: the bare backbone, or `backbone.` and `head.` if there is a head."""
    return {f"backbone.{key}": value for key, value in encoder.items()} | extras if extras else dict(encoder)


def head_shape(head: dict[str, Tensor]) -> dict[str, int | bool]:
    """Fields of DINOSettings, inferred from the head's weights."""
    if "head.last_layer.weight_v" not in head:
        raise ValueError("these weights hold no projection head (head.last_layer.weight_v).")
    out_dim, bottleneck = head["head.last_layer.weight_v"].shape
    matrices = [value for key, value in sorted(head.items()) if key.startswith("head.mlp") and value.ndim == 2]
    return {
        "out_dim": out_dim, "bottleneck": bottleneck, "head_layers": len(matrices),
        "head_width": matrices[0].shape[0], "batch_norm": any("running_mean" in key for key in head),
        "norm_last_layer": bool((head["head.last_layer.weight_g"] == 1).all()),
    }  # fmt: skip

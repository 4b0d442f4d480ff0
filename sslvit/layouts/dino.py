"""The layout of DINO's released checkpoints: a backbone alone, or student and teacher with heads.

Positions are resampled by a scale factor of (cells + 0.1) / trained cells, without antialiasing.
"""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.vit import Converted, settings_from_shapes, split


def recognise(keys: set[str]) -> bool:
    return any(key.removeprefix("module.").startswith("backbone.") for key in keys)


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """DINO names -> ours; `module.` and `backbone.` prefixes go, the projection head becomes the extras."""
    notes: list[str] = []
    state = {key.removeprefix("module."): value for key, value in state.items()}
    encoder, head = split(state, ("head.",))
    encoder = {key.removeprefix("backbone."): value for key, value in encoder.items()}
    found = {"interpolate_antialias": False, "interpolate_offset": 0.1, **changes}
    return Converted(settings_from_shapes(encoder, heads, notes, **found), encoder, head, notes)

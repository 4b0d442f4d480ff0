"""For weights that no layout recognizes: find the nearest layout and its missing names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from sslvit.files import printable
from sslvit.layouts.unwrap import shared_prefix
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, preset

if TYPE_CHECKING:
    from sslvit.layouts import Layout

tiny = partial(EncoderSettings, image_size=[4, 4], patch=2, width=4, depth=1, heads=1)
EXAMPLES = {  # encoders of one block; mae and dino have timm's names
    "timm": tiny(),
    "transformers": tiny(),
    "dinov2": tiny(layer_scale=1.0, mask_token=True),
    "dinov3": tiny(layer_scale=1.0, mask_token=True, pos_embed="rotary_2d_normalized", key_bias=False, registers=4),
    "openai_igpt": preset("igpt_small", width=4, depth=1, heads=1, image_size=4),
}


def nearest_layout(keys: set[str], layouts: Mapping[str, Layout]) -> str:
    """A sentence on the layout that matches best; empty if less than a third of every layout's names are present."""
    prefix = shared_prefix(keys)
    keys = keys | {key.removeprefix(prefix) for key in keys}
    found = {name: expected_names(layouts[name], settings) for name, settings in EXAMPLES.items()}
    name, expected = max(found.items(), key=lambda item: len(item[1] & keys) / len(item[1]))
    if len(expected & keys) < len(expected) / 3:
        return ""
    missing = sorted(expected - keys)
    if not missing:
        return f"All names of {name} are there. "
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    names = printable(", ".join(missing[:3]))
    return f"Nearest: {name}, {len(expected & keys)} of {len(expected)} names there; missing: {names}{more}. "


def expected_names(layout: Layout, settings: EncoderSettings) -> set[str]:
    """The names that every encoder of a layout has, in its first block and outside the blocks."""
    with torch.device("meta"):
        encoder = ViTEncoder(settings)
    return set(layout.from_sslvit(encoder.state_dict(), {}))

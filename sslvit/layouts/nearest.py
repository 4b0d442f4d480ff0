"""Names that no layout knows: which one comes nearest, and what is missing for it."""

from __future__ import annotations

import torch

from sslvit.files import printable
from sslvit.layouts import dinov2, openai_igpt, timm, transformers_weights
from sslvit.layouts.unwrap import shared_prefix
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, preset

TINY = {"image_size": 4, "patch": 2, "width": 4, "depth": 1, "heads": 1}
EXAMPLES = {  # of one block each; mae and dino have timm's names
    "timm": (timm, EncoderSettings(**TINY)),
    "transformers": (transformers_weights, EncoderSettings(**TINY)),
    "dinov2": (dinov2, EncoderSettings(**TINY, layer_scale=1.0, mask_token=True)),
    "openai_igpt": (openai_igpt, preset("igpt_small", width=4, depth=1, heads=1, image_size=4)),
}


def nearest_layout(keys: set[str]) -> str:
    """A sentence on the layout that most of these names belong to; empty where none has a third of its own there."""
    prefix = shared_prefix(keys)
    keys = keys | {key.removeprefix(prefix) for key in keys}
    found = {name: expected_names(name) for name in EXAMPLES}
    name, expected = max(found.items(), key=lambda item: len(item[1] & keys) / len(item[1]))
    if len(expected & keys) < len(expected) / 3:
        return ""
    missing = sorted(expected - keys)
    if not missing:
        return f"All names of {name} are there. "
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    shown = printable(", ".join(missing[:3]))
    return f"Nearest: {name}, {len(expected & keys)} of {len(expected)} names there; missing: {shown}{more}. "


def expected_names(name: str) -> set[str]:
    """The names that every encoder of a layout has, in its first block and around the blocks."""
    layout, settings = EXAMPLES[name]
    with torch.device("meta"):
        encoder = ViTEncoder(settings)
    return set(layout.from_sslvit(encoder.state_dict(), {}))

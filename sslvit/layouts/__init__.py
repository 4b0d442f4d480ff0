"""Convert foreign state dicts to ours and back, by renaming and reshaping. One file per layout."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sslvit.files import printable
from sslvit.layouts import dino, dinov2, dinov3, mae, openai_igpt, timm, transformers, vit_mae
from sslvit.layouts.preprocessing import SATELLITE, SATELLITE_IMAGES, guess_from_file_name
from sslvit.layouts.unwrap import shared_prefix, unwrap
from sslvit.layouts.vit import HEADS, Converted, describe_architecture
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, preset


class Layout(Protocol):
    """Names and shapes of a family's released weights. A module of this package with these functions is a layout."""

    def recognize(self, keys: set[str]) -> bool:
        """Whether weights with these names have this layout."""

    def to_sslvit(self, state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
        """Convert foreign weights. `heads` and `changes` are settings that cannot be inferred from weights.

        Raises:
            KeyError: Weights are missing.
        """

    def from_sslvit(self, encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert our encoder and other modules to this layout's names."""


LAYOUTS: dict[str, Layout] = {  # from the most specific to the most general
    "mae": mae, "openai_igpt": openai_igpt, "dinov3": dinov3, "dinov2": dinov2, "dino": dino, "timm": timm,
    "transformers": transformers,
}  # fmt: skip
_tiny = partial(EncoderSettings, image_size=[4, 4], patch=2, width=4, depth=1, heads=1)
EXAMPLES = {  # encoders of one block, to name the layout nearest to unknown weights; mae and dino have timm's names
    "timm": _tiny(),
    "transformers": _tiny(),
    "dinov2": _tiny(layer_scale=1.0, mask_token=True),
    "dinov3": _tiny(layer_scale=1.0, mask_token=True, pos_embed="rotary_2d_normalized", key_bias=False, registers=4),
    "openai_igpt": preset("igpt_small", width=4, depth=1, heads=1, image_size=4),
}


def find_layout(name: str) -> Layout:
    """Look up a layout by name."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: '{name}' is not one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def recognize_layout(keys: set[str], source: str) -> str:
    """The name of the first layout that recognizes these weights.

    Raises:
        ValueError: None does; the message lists some of the names, the nearest layout and the names missing for it.
    """
    for name, layout in LAYOUTS.items():
        if layout.recognize(keys):
            return name
    some = printable(", ".join(sorted(keys)[:4]))
    raise ValueError(
        f"{source}: no known layout has these weights ({some}, ...). {nearest_layout(keys)}Known: {', '.join(LAYOUTS)}."
    )


def nearest_layout(keys: set[str]) -> str:
    """A sentence on the layout that matches best; empty if less than a third of every layout's names are present."""
    prefix = shared_prefix(keys)
    keys = keys | {key.removeprefix(prefix) for key in keys}
    found = {name: expected_names(LAYOUTS[name], settings) for name, settings in EXAMPLES.items()}
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


def from_sslvit(encoder: dict[str, Tensor], layout: str, extras: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Convert our weights, and other modules of the model, to the names of a layout.

    Only names and shapes change; building a model with matching settings is up to the caller.
    """
    return find_layout(layout).from_sslvit(encoder, extras or {})


def to_sslvit(
    content: dict[str, Any],
    layout: str | None = None,
    heads: int | None = None,
    network: str | None = None,
    source: str = "the file",
    **changes: Any,
) -> Converted:
    """Convert a foreign state dict.

    Args:
        content: The state dict, or the content of a file that contains it (unwrap.py).
        layout: Name of its layout; recognized from the names if None.
        heads: Attention heads, if they cannot be inferred from the weights.
        network: Which network to read from a file with several.
        source: Its origin, for messages and as a hint on preprocessing.
        changes: Settings that the file does not state.

    Raises:
        ValueError: No layout has these names, some are missing, or the file has no such network.
    """
    if layout is not None:
        find_layout(layout)
    found = unwrap(content, source, network)
    heads_beside = {key: value for key, value in found.beside.items() if key.startswith(HEADS)}
    others = {key: value for key, value in found.beside.items() if key not in heads_beside}
    name = layout or recognize_layout(set(found.weights), source)
    is_dino = layout is None and name == "timm" and "backbone" in found.prefix.split(".")
    name = "dino" if is_dino else name
    try:
        if name == "transformers" and vit_mae.has_decoder(set(others)):
            channels = found.weights["embeddings.patch_embeddings.projection.weight"].shape[1]
            prepared, notes = vit_mae.assumed_settings(channels, changes)
        else:
            prepared, notes = _guess_preprocessing(name, found.weights, source, changes)
        converted = LAYOUTS[name].to_sslvit(found.weights | heads_beside, heads, **{**prepared, **changes})
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{source}: layout {name}: {printable(error)} is missing. "
            f"{nearest_layout(set(found.weights))}Is the file complete, and of this layout?"
        ) from error
    converted.extras |= others
    converted.num_read = len(found.everything)
    converted.notes = [*found.notes, *converted.notes, *notes]
    if name == "timm":
        converted.notes.append(describe_architecture(converted.settings))
    if is_dino:
        converted.notes.append(
            "layout: taken for DINO's, as its names begin with backbone. Give the layout if it is not."
        )
    if layout is None and name == "timm":
        converted.notes.append(
            "layout: taken for timm's. Bare encoders of MAE and DINO have the same names but resample positions in "
            "other ways; give the layout (mae, dino) if it is one of them."
        )
    return converted


def _guess_preprocessing(
    name: str, weights: dict[str, Tensor], source: str, changes: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Guess preprocessing from the file name, for timm's names and DINOv3; also returns notes on it."""
    if name == "dinov3" and SATELLITE in source:
        return dict(SATELLITE_IMAGES), [
            f"preprocessing: mean and std of satellite images, as its name has {SATELLITE}."
        ]
    if name != "timm":
        return {}, []
    _, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    rows = weights["pos_embed"].shape[1] if "pos_embed" in weights and weights["pos_embed"].ndim == 3 else 0
    size = changes.get("image_size", math.isqrt(rows) * patch)
    prepared, note = guess_from_file_name(source, channels, size if isinstance(size, int) else max(size), changes)
    return prepared, [note] if note else []

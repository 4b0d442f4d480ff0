"""Foreign state dicts <-> ours, by renaming and reshaping. One file per layout."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sslvit.files import printable
from sslvit.layouts import dino, dinov2, mae, openai_igpt, timm, transformers_weights
from sslvit.layouts.nearest import nearest_layout
from sslvit.layouts.preprocessing import by_file_name
from sslvit.layouts.unwrap import unwrap
from sslvit.layouts.vit import HEADS, Converted, as_read

LAYOUTS = {
    "mae": mae, "openai_igpt": openai_igpt, "dinov2": dinov2, "dino": dino, "timm": timm,
    "transformers": transformers_weights,
}  # fmt: skip


def recognize_layout(keys: set[str], source: str) -> str:
    """The first layout that knows these names; the table goes from the most special to the plainest.

    Raises:
        ValueError: none does; the message shows some of the names, the nearest layout and what is missing for it.
    """
    for name, layout in LAYOUTS.items():
        if layout.recognize(keys):
            return name
    shown = printable(", ".join(sorted(keys)[:4]))
    raise ValueError(
        f"{source}: no known layout has these weights ({shown}, ...). {nearest_layout(keys)}"
        f"Known: {', '.join(LAYOUTS)}."
    )


def from_sslvit(encoder: dict[str, Tensor], layout: str, extras: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The way back: our weights, and other parts of the model, under the names of a layout.

    Only names and shapes change; settings are for whoever builds the model there.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is not one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[layout].from_sslvit(encoder, extras or {})


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
        content: the state dict, or what a file holds around it (unwrap.py).
        layout: recognized from the names unless given.
        heads: of attention, where the weights do not say them.
        network: which one, of a file with several.
        source: for messages.
        changes: settings that the file does not say.

    Raises:
        ValueError: no layout has these names, some are missing, or there is no such network.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is not one of {', '.join(LAYOUTS)}.")
    found = unwrap(content, source, network)
    heads_beside = {key: value for key, value in found.beside.items() if key.startswith(HEADS)}
    others = {key: value for key, value in found.beside.items() if key not in heads_beside}
    name = layout or recognize_layout(set(found.weights), source)
    is_dino = layout is None and name == "timm" and "backbone" in found.prefix.split(".")
    name = "dino" if is_dino else name
    try:
        prepared, said = _prepared(name, found.weights, source, changes)
        changes = prepared | changes
        converted = LAYOUTS[name].to_sslvit(found.weights | heads_beside, heads, **changes)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{source}: layout {name}: {printable(error)} is missing. {nearest_layout(set(found.weights))}"
            "Is the file complete, and of this layout?"
        ) from error
    converted.extras |= others
    converted.read = len(found.everything)
    converted.notes = [*found.notes, *converted.notes, *said]
    if name == "timm":
        converted.notes.append(as_read(converted.settings))
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


def _prepared(name: str, weights: dict[str, Tensor], source: str, changes: dict[str, Any]) -> tuple[dict, list[str]]:
    """Preprocessing of a file in timm's names, as far as its own name says it, and a line on it."""
    if name != "timm":
        return {}, []
    _, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    rows = weights["pos_embed"].shape[1] if "pos_embed" in weights and weights["pos_embed"].ndim == 3 else 0
    size = changes.get("image_size", math.isqrt(rows) * patch)
    prepared, note = by_file_name(source, channels, size if isinstance(size, int) else max(size), changes)
    return prepared, [note] if note else []

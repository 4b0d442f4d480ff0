"""Foreign state dicts <-> ours, by renaming and reshaping. One file per layout."""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts import dino, dinov2, mae, openai_igpt, timm
from sslvit.layouts.vit import Converted

LAYOUTS = {"mae": mae, "openai_igpt": openai_igpt, "dinov2": dinov2, "dino": dino, "timm": timm}


def recognise_layout(keys: set[str]) -> str:
    """The first layout that knows these names; the table goes from the most special to the plainest.

    Raises:
        ValueError: none does; the message shows some of the names.
    """
    for name, layout in LAYOUTS.items():
        if layout.recognise(keys):
            return name
    shown = ", ".join(sorted(keys)[:4])
    raise ValueError(f"no known layout has these weights ({shown}, ...). Known: {', '.join(LAYOUTS)}.")


def from_sslvit(encoder: dict[str, Tensor], layout: str, extras: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The way back: our weights, and other parts of the model, under the names of a layout.

    Only names and shapes change; settings are for whoever builds the model there.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is not one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[layout].from_sslvit(encoder, extras or {})


def to_sslvit(state: dict[str, Tensor], layout: str | None = None, heads: int | None = None, **changes) -> Converted:
    """Convert a foreign state dict; the layout is recognised from the names unless given."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is not one of {', '.join(LAYOUTS)}.")
    name = layout or recognise_layout(set(state))
    try:
        converted = LAYOUTS[name].to_sslvit(state, heads, **changes)
    except (KeyError, IndexError) as error:
        raise ValueError(f"layout {name}: {error} is missing. Is the file complete, and of this layout?") from error
    converted.read = len(state)
    if layout is None and name == "timm":
        converted.notes.append(
            "layout: taken for timm's. Bare encoders of MAE and DINO have the same names but resample positions in "
            "other ways; give the layout (mae, dino) if it is one of them."
        )
    return converted

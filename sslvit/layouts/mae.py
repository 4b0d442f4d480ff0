"""The layout of MAE's released checkpoints: the encoder alone, with its decoder, or as a downstream ViT.

The position table of pretraining is fixed (sine-cosine); it is resampled bicubically without antialiasing.
"""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.preprocessing import assumed
from sslvit.layouts.vit import HEADS, Converted, count_blocks, demand, settings_from_shapes, split

DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}


def recognize(keys: set[str]) -> bool:
    return "decoder_pos_embed" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """Official MAE names -> ours. With a decoder its parts are the extras, under the names of tasks/mae.py."""
    notes: list[str] = []
    encoder, decoder = split(state, tuple(DECODER))
    encoder, head = split(encoder, HEADS)
    demand(encoder, "norm.weight|fc_norm.weight")
    prepared = assumed("mae", encoder["patch_embed.proj.weight"].shape[1], "MAE's own evaluation", changes, notes)
    found = {
        **prepared,
        "pos_embed": "sincos_2d" if decoder else "learned_1d",
        "interpolate_antialias": False,
        **changes,
    }
    settings = settings_from_shapes(encoder, heads, notes, **found)
    extras = {_rename(key, DECODER): value for key, value in decoder.items()} | head
    return Converted(settings, encoder, extras, notes)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> official MAE names."""
    back = {ours: theirs for theirs, ours in DECODER.items()}
    return encoder | {_rename(key, back): value for key, value in extras.items()}


def decoder_shape(extras: dict[str, Tensor]) -> dict[str, int | float]:
    """Fields of MAESettings that the decoder's weights tell.

    Raises:
        ValueError: there is no decoder, or not all of it.
    """
    embed, inner = (extras.get(f"decoder.{key}.weight") for key in ("embed", "blocks.0.mlp.fc1"))
    if embed is None or inner is None:
        raise ValueError("this checkpoint has an encoder only; load_mae needs one with its decoder.")
    width = embed.shape[0]
    return {
        "decoder_width": width, "decoder_depth": count_blocks(extras, "decoder.blocks."),
        "decoder_mlp_ratio": inner.shape[0] / width,
    }  # fmt: skip


def _rename(key: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key

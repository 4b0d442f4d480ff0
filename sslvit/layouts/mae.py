"""The layout of MAE's released checkpoints: the encoder alone, with its decoder, or as a downstream ViT.

The position table of pretraining is fixed (sine-cosine); it is resampled bicubically without antialiasing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslvit.layouts.vit import HEADS, Converted, convert_vit, inverted, rename_prefix, require, split_by_prefix
from sslvit.weight_files import count_blocks

DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}


def recognize(keys: set[str]) -> bool:
    """Whether the weights include MAE's decoder."""
    return "decoder_pos_embed" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """Official MAE names -> ours. A decoder is returned as extras, under the names in models/mae.py."""
    encoder, decoder = split_by_prefix(state, tuple(DECODER))
    encoder, head = split_by_prefix(encoder, HEADS)
    require(encoder, "norm.weight|fc_norm.weight")
    extras = {rename_prefix(key, DECODER): value for key, value in decoder.items()} | head
    pos_embed = "sincos_2d" if decoder else "learned_1d"
    return convert_vit("mae", encoder, extras, heads, changes, pos_embed=pos_embed, interpolate_antialias=False)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> official MAE names."""
    return encoder | {rename_prefix(key, inverted(DECODER)): value for key, value in extras.items()}


def decoder_shape(extras: dict[str, Tensor]) -> dict[str, int | float]:
    """Fields of MAESettings, inferred from the decoder's weights."""
    embed, inner = (extras.get(f"decoder.{key}.weight") for key in ("embed", "blocks.0.mlp.fc1"))
    if embed is None or inner is None:
        raise ValueError("this checkpoint has an encoder only; load_mae needs one with its decoder.")
    width = embed.shape[0]
    return {
        "decoder_width": width, "decoder_depth": count_blocks(extras, "decoder.blocks."),
        "decoder_mlp_ratio": inner.shape[0] / width,
    }  # fmt: skip

"""transformers' ViTMAE, the form in which MAE's weights lie on the hub: a ViT, and for pretraining MAE's decoder.

Its position tables are fixed (sine-cosine) and resampled as in MAE's own files; its decoder's blocks are named as the
encoder's.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from sslvit.layouts import mae
from sslvit.layouts.preprocessing import assume_preprocessing
from sslvit.layouts.transformers import fill_biases, rename, to_transformers
from sslvit.layouts.vit import inverted, rename_prefix
from sslvit.settings import MAESettings

KNOWN: dict[str, Any] = {"pos_embed": "sincos_2d", "interpolate_antialias": False}
"""What every ViTMAE has besides what every ViT of transformers has."""
USUAL_EPS = 1e-12  # of the layer norms of the released models
DECODER = {f"decoder.{theirs}": ours for theirs, ours in mae.DECODER.items()}
# of files up to its fourth version, and of its fifth one in memory and in files
LAYER = re.compile(r"^decoder\.decoder_(?:layers|encoder\.layer)\.(\d+\..+)$")
SHAPE = {
    "decoder_hidden_size": "decoder_width", "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_heads", "mask_ratio": "mask_ratio",
}  # fmt: skip
"""Keys of config.json -> fields of MAESettings."""


def has_decoder(names: set[str]) -> bool:
    """Whether MAE's decoder is among these names."""
    return "decoder.decoder_embed.weight" in names


def assumed_settings(channels: int, changes: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What config.json and the processor's file would state of weights with a decoder, and a line on it."""
    notes: list[str] = []
    prepared = assume_preprocessing("mae", channels, changes, notes)
    return {**KNOWN, "norm_eps": USUAL_EPS, **prepared}, notes


def mae_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of MAESettings that a config.json states."""
    found = {ours: config[theirs] for theirs, ours in SHAPE.items()}
    target = "normalized" if config["norm_pix_loss"] else "raw"
    return found | {
        "target": target, "decoder_mlp_ratio": config["decoder_intermediate_size"] / config["decoder_hidden_size"],
    }  # fmt: skip


def mae_arguments(settings: MAESettings, mlp_width: int) -> dict[str, Any]:
    """The inverse of `mae_settings`, for a decoder whose MLPs have so many hidden units."""
    return {theirs: getattr(settings, ours) for theirs, ours in SHAPE.items()} | {
        "norm_pix_loss": settings.target == "normalized", "decoder_intermediate_size": mlp_width,
    }  # fmt: skip


def decoder_to_sslvit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder among these weights under the names of models/mae.py; without one, nothing.

    Raises:
        KeyError: A query, key or value is missing.
    """
    layers = {f"layers.{found[1]}": value for key, value in state.items() if (found := LAYER.match(key))}
    blocks, _ = rename(layers)
    fill_biases(blocks)
    others = {rename_prefix(key, DECODER): value for key, value in state.items() if key.startswith(tuple(DECODER))}
    return others | {f"decoder.{key}": value for key, value in blocks.items()}


def to_vit_mae(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder, with one row of positions for its class token, and decoder under ViTMAEForPreTraining's names."""
    blocks = {key.removeprefix("decoder."): value for key, value in decoder.items() if ".blocks." in key}
    layers = {
        key.replace("encoder.layer.", "decoder.decoder_layers.", 1): value
        for key, value in to_transformers(blocks, "vit").items()
    }
    others = {rename_prefix(key, inverted(DECODER)): value for key, value in decoder.items() if ".blocks." not in key}
    return {f"vit.{key}": value for key, value in to_transformers(encoder, "vit").items()} | others | layers

"""transformers' ViTMAE, the format of MAE's weights on the Hugging Face hub: a ViT, for pretraining with MAE's decoder.

Its position tables are fixed (sine-cosine) and resampled as for MAE's own files; the decoder's blocks have the same
names as the encoder's.
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
"""Settings in which every ViTMAE differs from transformers' ViT."""
USUAL_EPS = 1e-12  # of the layer norms in the released models
DECODER = {f"decoder.{theirs}": ours for theirs, ours in mae.DECODER.items()}
# in files of transformers up to version 4, and in memory and files of version 5
LAYER = re.compile(r"^decoder\.decoder_(?:layers|encoder\.layer)\.(\d+\..+)$")
SHAPE = {
    "decoder_hidden_size": "decoder_width", "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_heads", "mask_ratio": "mask_ratio",
}  # fmt: skip
"""Keys of config.json -> fields of MAESettings."""


def has_decoder(names: set[str]) -> bool:
    """Whether these names include MAE's decoder."""
    return "decoder.decoder_embed.weight" in names


def assumed_settings(channels: int, changes: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings to assume for weights with a decoder without config.json and processor file, and notes on them."""
    notes: list[str] = []
    prepared = assume_preprocessing("mae", channels, changes, notes)
    return {**KNOWN, "norm_eps": USUAL_EPS, **prepared}, notes


def mae_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of MAESettings from a config.json."""
    found = {ours: config[theirs] for theirs, ours in SHAPE.items()}
    target = "normalized" if config["norm_pix_loss"] else "raw"
    return found | {
        "target": target, "decoder_mlp_ratio": config["decoder_intermediate_size"] / config["decoder_hidden_size"],
    }  # fmt: skip


def mae_arguments(settings: MAESettings, mlp_width: int) -> dict[str, Any]:
    """The inverse of `mae_settings`, for a decoder with MLPs of this hidden width."""
    return {theirs: getattr(settings, ours) for theirs, ours in SHAPE.items()} | {
        "norm_pix_loss": settings.target == "normalized", "decoder_intermediate_size": mlp_width,
    }  # fmt: skip


def decoder_to_sslvit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder in these weights under the names of models/mae.py; empty if there is none.

    Raises:
        KeyError: A query, key or value is missing.
    """
    layers = {f"layers.{found[1]}": value for key, value in state.items() if (found := LAYER.match(key))}
    blocks, _ = rename(layers)
    fill_biases(blocks)
    others = {rename_prefix(key, DECODER): value for key, value in state.items() if key.startswith(tuple(DECODER))}
    return others | {f"decoder.{key}": value for key, value in blocks.items()}


def to_vit_mae(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder, with a position row for its class token, and decoder under the names of ViTMAEForPreTraining."""
    blocks = {key.removeprefix("decoder."): value for key, value in decoder.items() if ".blocks." in key}
    layers = {
        key.replace("encoder.layer.", "decoder.decoder_layers.", 1): value
        for key, value in to_transformers(blocks, "vit").items()
    }
    others = {rename_prefix(key, inverted(DECODER)): value for key, value in decoder.items() if ".blocks." not in key}
    return {f"vit.{key}": value for key, value in to_transformers(encoder, "vit").items()} | others | layers

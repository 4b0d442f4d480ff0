"""Weights of transformers' ViT, Dinov2 and Dinov2WithRegisters without their folder (model.safetensors alone).

What config.json and preprocessor_config.json would say is taken from the released models, with a note.
"""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.preprocessing import released, words
from sslvit.layouts.transformers import ALWAYS, fill_biases, rename
from sslvit.layouts.transformers import from_sslvit as named
from sslvit.layouts.vit import Converted, demand, settings_from_shapes

NAMES = {"vit": "ViT", "dinov2": "Dinov2"}


def recognize(keys: set[str]) -> bool:
    return "embeddings.patch_embeddings.projection.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """transformers -> ours; the pooler and the classifier become the extras."""
    notes: list[str] = []
    encoder, extras = rename(state)
    is_dinov2 = any(".ls1." in key for key in encoder)
    ignored = []
    if not is_dinov2 and encoder.pop("mask_token", None) is not None:
        ignored.append("embeddings.mask_token")
    if not any(key.endswith("attn.qkv.bias") for key in encoder):
        fill_biases(encoder)
        notes.append("biases: the file has none of queries, keys and values; they are zero (qkv_bias: false).")
    demand(encoder, "norm.weight")
    channels = encoder["patch_embed.proj.weight"].shape[1]
    kind = "dinov2" if is_dinov2 else "vit"
    usual = {"norm_eps": 1e-6 if is_dinov2 else 1e-12, **released(kind, channels)}
    if open_questions := {key: value for key, value in usual.items() if key not in changes}:
        eps = f"norm_eps {open_questions['norm_eps']:g}; " if "norm_eps" in open_questions else ""
        notes.append(
            f"settings: no config.json of transformers was read; as in its released {NAMES[kind]} models: {eps}"
            f"{words(open_questions)}. Give the folder if it says otherwise."
        )
    found = {**usual, **ALWAYS, "interpolate_antialias": "reg_token" in encoder, **changes}
    return Converted(settings_from_shapes(encoder, heads, notes, **found), encoder, extras, notes, ignored, len(state))


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of the model that holds these weights."""
    is_dinov2 = any(".ls1." in key for key in encoder)
    kind = "dinov2_with_registers" if "reg_token" in encoder else "dinov2" if is_dinov2 else "vit"
    return named(encoder, kind) | extras

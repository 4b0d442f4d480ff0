"""Options of an encoder that the plain ViTs of other libraries support, and its weights in their form."""

from __future__ import annotations

import torch
from torch import Tensor

from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings

TABLES = ("learned_1d", "learned_2d", "sincos_1d", "sincos_2d")


def is_dinov3(settings: EncoderSettings) -> bool:
    """Whether an encoder has DINOv3's positions, which other libraries support only in their DINOv3 models."""
    return settings.pos_embed == "rotary_2d_normalized"


def unsupported_options(settings: EncoderSettings, outputs: str) -> dict[str, bool]:
    """Options that other libraries' ViTs do not support -> whether this encoder's outputs depend on them."""
    is_pooled = outputs in ("features", "logits")
    positions = (*TABLES, "none", *(() if outputs == "reconstruction" else ("rotary_2d_normalized",)))
    return {
        f"tokens: {settings.tokens}": settings.tokens != "patch",
        f"pos_embed: {settings.pos_embed}": settings.pos_embed not in positions,
        f"norm: {settings.norm}": settings.norm != "layer",
        "causal: true": settings.causal,
        "locality_self_attention: true": settings.locality_self_attention,
        "pre_norm: true": settings.pre_norm,
        "patch_bias: false": not settings.patch_bias,
        "pooling: attention": is_pooled and settings.pooling == "attention",
        f"feature_layer: {settings.feature_layer}": outputs == "features"
        and settings.feature_layer not in (None, settings.depth),
    }


def refuse_options(
    model: str, options: dict[str, bool], instead: str = "Use --format onnx, torch or safetensors"
) -> None:
    """Raise ValueError with all unsupported options of this encoder, and an alternative."""
    refused = "; ".join(option for option, applies in options.items() if applies)
    if refused:
        raise ValueError(f"{model} cannot hold this encoder ({refused}). {instead}.")


def resampling_difference(settings: EncoderSettings, antialias: bool) -> str | None:
    """The setting that makes positions at other sizes differ from plain resampling to the exact size, or None."""
    if settings.pos_embed not in TABLES:
        return None
    if settings.interpolate_offset:
        return f"interpolate_offset: {settings.interpolate_offset:g}"
    if settings.interpolate_antialias != antialias:
        return f"interpolate_antialias: {str(settings.interpolate_antialias).lower()}"
    return None


def is_fixed_size(library: str, size: str | None, difference: str | None) -> bool:
    """Whether images have one size only: on request, or because the library resamples positions differently."""
    if size == "dynamic" and difference:
        raise ValueError(f"--size dynamic: {library} resamples positions differently ({difference}). Use --size fixed.")
    return size == "fixed" or difference is not None


def state_with_table(encoder: ViTEncoder, rows: int, outputs: str) -> dict[str, Tensor]:
    """Equivalent weights with a single position table that has `rows` rows in front of those of the patches.

    Further rows of prefix tokens are added to the tokens themselves; missing rows are zero.
    """
    settings = encoder.settings
    skipped = ("pos_embed",) if outputs in ("features", "logits") else ("pos_embed", "fc_norm.", "attn_pool.")
    state = {key: value for key, value in encoder.state_dict().items() if not key.startswith(skipped)}
    prefix, patches = encoder.position_table(settings.grid)
    if patches is None:
        return state
    if prefix is None:
        prefix = patches.new_zeros(0, settings.width)
    names = ["cls_token"] * settings.class_token + ["reg_token"] * bool(settings.registers)
    if rows < len(prefix):
        tokens = torch.cat([state[name] for name in names], 1).clone()
        tokens[0, rows : len(prefix)] += prefix[rows:]
        pieces = tokens.split([state[name].shape[1] for name in names], 1)
        state |= {name: piece.contiguous() for name, piece in zip(names, pieces, strict=True)}
    first = torch.cat([prefix[:rows], prefix.new_zeros(max(rows - len(prefix), 0), settings.width)])
    state["pos_embed"] = torch.cat([first, patches])[None].detach()
    return state

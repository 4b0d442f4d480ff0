"""timm's VisionTransformer. Our names are timm's, so the weights pass through untouched."""

from __future__ import annotations

from torch import Tensor

from sslvit.layouts.vit import Converted, settings_from_shapes, split
from sslvit.settings import EncoderSettings


def recognise(keys: set[str]) -> bool:
    return "patch_embed.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """timm -> ours; the classifier is the extras."""
    notes: list[str] = []
    encoder, head = split(state, ("head.",))
    return Converted(settings_from_shapes(encoder, heads, notes, **changes), encoder, head, notes)


def model_arguments(settings: EncoderSettings) -> dict:
    """Arguments of timm's VisionTransformer for these settings.

    Raises:
        ValueError: timm's plain ViT cannot hold an option; all such options are named.
    """
    rows = settings.position_rows
    cannot = {
        f"tokens: {settings.tokens}": settings.tokens != "patch",
        f"positions: {settings.positions}": settings.positions not in ("learned_1d", "sincos_1d", "sincos_2d"),
        "prefix_positions that differ between class token and registers": 0 < rows < settings.prefix,
        f"norm: {settings.norm}": settings.norm != "layer",
        f"norm_eps: {settings.norm_eps}": settings.norm_eps != 1e-6,
        f"mlp: {settings.mlp}": settings.mlp != "gelu",
        "bias: false": not settings.bias,
        "causal: true": settings.causal,
        "locality: true": settings.locality,
        "pooling: attention": settings.pooling == "attention",
        "both final_norm and fc_norm": settings.final_norm and settings.fc_norm,
        "neither final_norm nor fc_norm": not settings.final_norm and not settings.fc_norm,
        "interpolate_antialias: false": not settings.interpolate_antialias,
        f"interpolate_offset: {settings.interpolate_offset}": settings.interpolate_offset != 0,
        f"feature_layer: {settings.feature_layer}": settings.feature_layer not in (None, settings.depth),
    }
    if any(cannot.values()):
        refused = "; ".join(option for option, is_refused in cannot.items() if is_refused)
        raise ValueError(f"timm's VisionTransformer cannot hold this encoder ({refused}). Use --format safetensors.")
    arguments = {
        "img_size": list(settings.image_size), "patch_size": settings.patch, "in_chans": settings.channels,
        "embed_dim": settings.width, "depth": settings.depth, "num_heads": settings.heads,
        "mlp_ratio": settings.mlp_width / settings.width, "qk_norm": settings.qk_norm,
        "init_values": settings.layer_scale, "class_token": settings.class_token,
        "reg_tokens": settings.registers, "no_embed_class": rows < max(settings.prefix, 1),
        "global_pool": {"class": "token", "mean": "avg"}[settings.pooling],
        "fc_norm": settings.fc_norm, "dynamic_img_size": True,
        "final_norm": True,  # timm: one norm, behind the pooling with fc_norm and before it without
    }  # fmt: skip
    return arguments

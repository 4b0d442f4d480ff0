"""ViTs of transformers: the options that each supports, and an encoder's settings and weights under its names.

Besides ViT, Dinov2 and DINOv3, these are ViTMAE with MAE's decoder, I-JEPA (no class token), DeiT (the distillation
token is a register with a position), and the vision towers of CLIP and SigLIP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslvit.exporters import plain_vit
from sslvit.exporters.exported import Exported
from sslvit.layouts import clip, dinov3, vit_mae
from sslvit.layouts.transformers import to_transformers
from sslvit.layouts.vit import inverted
from sslvit.settings import EncoderSettings

CLASSES = {"vit_mae": "ViTMAE", "ijepa": "IJepa", "deit": "DeiT", "clip_vision_model": "CLIPVision",
           "siglip_vision_model": "SiglipVision"}  # fmt: skip
ACTIVATIONS = inverted(clip.ACTIVATIONS) | {"gelu_tanh": "gelu_pytorch_tanh"}  # transformers has two names for it


def position_rows(kind: str) -> int:
    """Rows for prefix tokens in a model's position table."""
    return {"ijepa": 0, "siglip_vision_model": 0, "dinov3_vit": 0, "deit": 2}.get(kind, 1)


def arguments(kind: str, settings: EncoderSettings, outputs: str) -> dict[str, Any]:
    """Arguments of a model's config for these settings; refuses all options that it does not support."""
    is_clip, is_siglip = kind == "clip_vision_model", kind == "siglip_vision_model"
    is_dinov2, is_dinov3 = kind.startswith("dinov2"), kind == "dinov3_vit"
    activations = ["gelu", "swiglu"] if is_dinov2 or is_dinov3 else [*ACTIVATIONS]
    registers = settings.registers if is_dinov2 or is_dinov3 else 1 if kind == "deit" else 0
    is_pooled, has_head = outputs in ("features", "logits"), is_siglip and settings.pooling == "attention"
    height, width = settings.size
    refused = plain_vit.unsupported_options(settings, outputs) | {
        "pos_embed: none": settings.pos_embed == "none",
        f"mlp: {settings.mlp}": settings.mlp not in activations,
        f"mlp_ratio: {settings.mlp_ratio:g}, which is no whole number": is_dinov2 and settings.mlp_ratio % 1 != 0,
        "bias: false": not settings.bias and not is_dinov3,
        "qk_norm: true": settings.qk_norm,
        f"layer_scale: {settings.layer_scale}": settings.layer_scale is not None and not (is_dinov2 or is_dinov3),
        f"registers: {settings.registers}": settings.registers != registers,
        f"class_token: {str(settings.class_token).lower()}": settings.class_token == (kind == "ijepa" or is_siglip),
        f"pre_norm: {str(settings.pre_norm).lower()}": settings.pre_norm != is_clip,
        f"patch_bias: {str(settings.patch_bias).lower()}": settings.patch_bias == is_clip,
        "final_norm: false": not settings.final_norm,
        "fc_norm: true": settings.fc_norm and is_pooled,
        "pooling: attention": is_pooled and settings.pooling == "attention" and not (has_head and settings.pool_mlp),
        f"image_size: {settings.image_size}, which is no square": height != width and kind not in ("vit", "dinov3_vit"),
    }
    instead = ("Use --outputs features",) if outputs == "reconstruction" else ()
    plain_vit.refuse_options(f"transformers' {kind}", refused, *instead)
    if outputs == "logits" and kind in CLASSES and kind != "ijepa":
        raise ValueError(f"--outputs logits: transformers' {kind} has another classifier. Use --format onnx or torch.")
    found: dict[str, Any] = {
        "hidden_size": settings.width, "num_hidden_layers": settings.depth, "num_attention_heads": settings.heads,
        "layer_norm_eps": settings.norm_eps, "patch_size": settings.patch, "num_channels": settings.channels,
        "image_size": height if height == width else [height, width],
    }  # fmt: skip
    is_gated = settings.mlp == "swiglu"
    if is_dinov2:
        stated = {"num_register_tokens": registers} if registers else {}
        return found | stated | {"mlp_ratio": int(settings.mlp_ratio), "use_swiglu_ffn": is_gated}
    found["intermediate_size"] = settings.mlp_width
    if is_dinov3:
        return found | {
            "use_gated_mlp": is_gated, "hidden_act": "silu" if is_gated else "gelu",
            "num_register_tokens": registers, "rope_theta": dinov3.BASE,
            "key_bias": settings.key_bias and settings.bias,
            **{f"{layer}_bias": settings.bias for layer in ("query", "value", "proj", "mlp")},
        }  # fmt: skip
    head = {"vision_use_head": is_pooled and has_head} if is_siglip else {}
    return found | head | {"hidden_act": ACTIVATIONS[settings.mlp]}


def tensors_of(kind: str, exported: Exported) -> dict[str, Tensor]:
    """All exported tensors except a classifier, under transformers' names."""
    state = plain_vit.state_with_table(exported.encoder, position_rows(kind), exported.outputs)
    if kind == "vit_mae":
        return vit_mae.to_vit_mae(state, decoder_state(exported))
    if kind == "dinov3_vit":
        return dinov3.to_transformers(state, exported.settings.key_bias)
    if kind in clip.DEFAULTS:
        state.pop("mask_token", None)  # not part of these models
        return clip.from_sslvit(state)
    return to_transformers(state, kind)


def decoder_arguments(exported: Exported) -> dict[str, Any]:
    """Arguments of ViTMAE's config for the decoder and the loss."""
    hidden = exported.mae.state_dict()["decoder.blocks.0.mlp.fc1.bias"].shape[0]
    return vit_mae.mae_arguments(exported.mae.settings, hidden)


def decoder_state(exported: Exported) -> dict[str, Tensor]:
    """The decoder's weights under the names of models/mae.py, without the HOG predictor."""
    state = exported.mae.decoder.state_dict()
    return {f"decoder.{key}": value for key, value in state.items() if not key.startswith("hog.")}

"""The vision towers of CLIP and SigLIP under transformers' names, with or without their text towers.

CLIP normalizes the tokens before the first block and has no bias in its patch projection; SigLIP has no class token and
uses attention pooling followed by an MLP. transformers returns CLIP's tokens without the final norm, which it applies
only to the class token; here, as in timm, the final norm acts on all tokens, so that features equal transformers'
`pooler_output`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.files import brief
from sslvit.layouts.transformers import ALWAYS, rename, rename_back
from sslvit.layouts.vit import split_by_prefix

KINDS = {"clip": "clip_vision_model", "clip_vision_model": "clip_vision_model", "siglip": "siglip_vision_model",
         "siglip_vision_model": "siglip_vision_model"}  # fmt: skip
"""model_type in a config.json -> model_type of the vision tower alone."""
DEFAULTS: dict[str, dict[str, Any]] = {  # transformers' defaults, which its files leave out
    "clip_vision_model": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
}
COMMON_DEFAULTS = {"num_attention_heads": 12, "image_size": 224, "num_channels": 3}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""transformers' names of activations -> ours."""
NAMES = {
    "embeddings.class_embedding": "cls_token", "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed", "pre_layrnorm.": "norm_pre.", "post_layernorm.": "norm.",
}  # fmt: skip
HEAD = {"head.attention.out_proj.": "attn_pool.proj.", "head.layernorm.": "attn_pool.norm.",
        "head.mlp.": "attn_pool.mlp."}  # fmt: skip
BLOCK = {"layer_norm1.": "norm1.", "layer_norm2.": "norm2.", "self_attn.out_proj.": "attn.proj.", "mlp.": "mlp."}
THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OTHERS = ("text_model.", "visual_projection.", "text_projection.", "logit_", "classifier.")
BUFFERS = ("embeddings.position_ids",)  # of older files


def vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the vision tower in a config.json, completed with transformers' defaults."""
    kind = KINDS[config["model_type"]]
    stated = config.get("vision_config", {}) if config["model_type"] in ("clip", "siglip") else config
    if not isinstance(stated, dict):
        raise TypeError(f"vision_config {brief(stated)} is no record of settings")
    return {**COMMON_DEFAULTS, **DEFAULTS[kind], **stated, "model_type": kind}


def settings_of(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of a vision tower from its `vision_config`, in addition to those inferred from shapes."""
    is_clip = config["model_type"] == "clip_vision_model"
    activation = config["hidden_act"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act {brief(activation)} is none of {', '.join(ACTIVATIONS)}.")
    has_head = not is_clip and config["vision_use_head"]
    return ALWAYS | {
        "image_size": config["image_size"], "norm_eps": config["layer_norm_eps"], "mlp": ACTIVATIONS[activation],
        "patch_bias": not is_clip, "pre_norm": is_clip, "class_token": is_clip, "interpolate_antialias": False,
        "pool_mlp": has_head, "pooling": "class" if is_clip else "attention" if has_head else "mean",
    }  # fmt: skip


def to_sslvit(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The encoder under our names, other modules (a text tower, projections), and names that are not weights.

    Raises:
        KeyError: A query, key or value is missing.
    """
    state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    state, extras = split_by_prefix(state, OTHERS)
    ignored = [key for key in state if key in BUFFERS]
    tower, pool = split_by_prefix(state, (*BUFFERS, "head.probe", "head.attention.in_proj"))
    encoder, unknown = rename(tower, NAMES | HEAD, BLOCK)
    encoder |= unknown  # loading them fails
    for key, ndim in (("cls_token", 1), ("pos_embed", 2)):
        if key in encoder and encoder[key].ndim == ndim:
            encoder[key] = encoder[key].view(1, -1, encoder[key].shape[-1])
    return encoder | _pool_query(pool), extras, ignored


def _pool_query(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value weights of SigLIP's attention pool; the projection of the query is multiplied out."""
    if "head.probe" not in state:
        return {}
    weight, bias = state["head.attention.in_proj_weight"], state["head.attention.in_proj_bias"]
    width = weight.shape[1]
    return {
        "attn_pool.query": state["head.probe"] @ weight[:width].T + bias[:width],
        "attn_pool.kv.weight": weight[width:].contiguous(), "attn_pool.kv.bias": bias[width:].contiguous(),
    }  # fmt: skip


def from_sslvit(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder under the names of a vision tower; the query projection of the attention pool is the identity."""
    tower, _ = split_by_prefix(encoder, ("attn_pool.query", "attn_pool.kv."))
    found = rename_back(tower, NAMES | HEAD, BLOCK, "encoder.layers", THIRDS)
    if "cls_token" in encoder:
        found["embeddings.class_embedding"] = encoder["cls_token"].flatten()
    found["embeddings.position_embedding.weight"] = encoder["pos_embed"][0]
    if "attn_pool.query" in encoder:
        width = encoder["attn_pool.query"].shape[-1]
        found["head.probe"] = encoder["attn_pool.query"]
        found["head.attention.in_proj_weight"] = torch.cat([torch.eye(width), encoder["attn_pool.kv.weight"]])
        found["head.attention.in_proj_bias"] = torch.cat([torch.zeros(width), encoder["attn_pool.kv.bias"]])
    return found

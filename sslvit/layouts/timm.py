"""timm's VisionTransformer. Our names are timm's, so the weights stay unchanged except for two tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslvit.layouts.transformers import fill_biases
from sslvit.layouts.vit import HEADS, Converted, settings_from_shapes, split_by_prefix

# the reason why BEiT's weights are refused
OWN_BIAS = "each of its blocks learns a relative position bias with entries for the class token, and has no key bias"


def recognize(keys: set[str]) -> bool:
    """Whether the patch embedding and the first block have timm's names."""
    return "patch_embed.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """Convert from timm's names; the classifier is returned as extras.

    Raises:
        ValueError: The weights are those of a BEiT.
    """
    notes: list[str] = []
    if any(key.endswith("relative_position_bias_table") for key in state):
        raise ValueError(f"a BEiT, which cannot be held: {OWN_BIAS}. Take MAE's, DINO's or DINOv2's of that size.")
    encoder, head = split_by_prefix(_renamed(state), HEADS)
    known: dict[str, Any] = {"patch_bias": "patch_embed.proj.bias" in encoder}
    if "attn_pool.query" in encoder:
        known |= {"pooling": "attention", "pool_mlp": "attn_pool.mlp.fc1.weight" in encoder}
    if "blocks.0.attn.proj.bias" in encoder and fill_biases(encoder):
        notes.append("no biases of queries, keys and values: zeros take their place")
    settings = settings_from_shapes(encoder, heads, notes, **{**known, **changes})
    if settings.pooling != "attention":
        encoder, pool = split_by_prefix(encoder, ("attn_pool.",))
        head |= pool
    return Converted(settings, encoder, head, notes)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename DeiT's distillation token to a register, and multiply out the query projection of an attention pool."""
    names = {"dist_token": "reg_token", "attn_pool.latent": "attn_pool.query"}
    found = {names.get(key, key): value for key, value in state.items() if not key.startswith("attn_pool.q.")}
    if "attn_pool.q.weight" in state and "attn_pool.query" in found:
        query = found["attn_pool.query"] @ state["attn_pool.q.weight"].T
        found["attn_pool.query"] = query + state["attn_pool.q.bias"] if "attn_pool.q.bias" in state else query
    return found


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to timm's names; timm has no mask token."""
    return {key: value for key, value in encoder.items() if key != "mask_token"} | extras

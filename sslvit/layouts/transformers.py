"""Names of transformers' ViT and its variants, Dinov2 and Dinov2WithRegisters, also for weights without their folder.

Without config.json and preprocessor_config.json, settings are those of the released models, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslvit.layouts.preprocessing import describe_preprocessing, released_preprocessing
from sslvit.layouts.vit import Converted, inverted, is_gated, rename_prefix, require, settings_from_shapes
from sslvit.weight_files import count_blocks

PREFIX = re.compile(r"^(vit|deit|ijepa|dinov2|dinov2_with_registers|transformer)\.")
NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.", "layernorm.": "norm.",
}  # fmt: skip
BLOCK = {
    "attention.output.dense.": "attn.proj.", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip
VIT_BLOCK = {
    "layernorm_before.": "norm1.", "layernorm_after.": "norm2.", "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}  # fmt: skip
GATED = {"mlp.weights_in.": "mlp.fc1.", "mlp.weights_out.": "mlp.fc2."}
# from transformers 5 on, names in memory (a saved state_dict) differ from those in its own files
IN_MEMORY = {"attention.o_proj.": "attn.proj.", "mlp.down_proj.": "mlp.fc2."}
EVERY_BLOCK = BLOCK | VIT_BLOCK | GATED | IN_MEMORY
DISTILLATION = "embeddings.distillation_token"  # of DeiT; here a register with a position
LAYER = re.compile(r"^(?:encoder\.layers?|layers)\.(\d+)\.(.+)$")
PIECE = re.compile(
    r"^(?:attention\.attention\.(query|key|value)|(?:attention|self_attn)\.([qkv]_proj)|mlp\.(gate_proj|up_proj))"
    r"\.(weight|bias)$"
)
PIECES = {"attn.qkv": (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")),
          "mlp.fc1": (("gate_proj", "up_proj"),)}  # fmt: skip
ALWAYS: dict[str, Any] = {
    "class_token": True, "final_norm": True, "pos_embed": "learned_1d", "prefix_positions": "class",
    "pooling": "class", "fc_norm": False, "qk_norm": False, "bias": True,
}  # fmt: skip
"""Settings of every ViT and Dinov2 in transformers."""
TITLES = {"vit": "ViT", "dinov2": "Dinov2"}


def recognize(keys: set[str]) -> bool:
    """Whether the patch embedding has transformers' name."""
    return "embeddings.patch_embeddings.projection.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """Convert from transformers' names; the pooler and the classifier are returned as extras."""
    notes: list[str] = []
    encoder, extras = rename(state)
    is_dinov2 = any(".ls1." in key for key in encoder)
    ignored = [] if is_dinov2 else remove_mask_token(encoder)
    if fill_biases(encoder):
        notes.append("biases: the file has none of queries, keys and values; they are zero (qkv_bias: false).")
    require(encoder, "norm.weight")
    channels = encoder["patch_embed.proj.weight"].shape[1]
    family = "dinov2" if is_dinov2 else "vit"
    usual = {"norm_eps": 1e-6 if is_dinov2 else 1e-12, **released_preprocessing(family, channels)}
    if assumed := {key: value for key, value in usual.items() if key not in changes}:
        eps = f"norm_eps {assumed['norm_eps']:g}; " if "norm_eps" in assumed else ""
        notes.append(
            f"settings: no config.json of transformers was read; as in its released {TITLES[family]} models: {eps}"
            f"{describe_preprocessing(assumed)}. Give the folder if it says otherwise."
        )
    found = {**usual, **ALWAYS, "interpolate_antialias": "reg_token" in encoder, **changes}
    return Converted(settings_from_shapes(encoder, heads, notes, **found), encoder, extras, notes, ignored, len(state))


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to the names of the model in transformers that fits these weights."""
    is_dinov2 = any(".ls1." in key for key in encoder)
    kind = "dinov2_with_registers" if "reg_token" in encoder else "dinov2" if is_dinov2 else "vit"
    return to_transformers(encoder, kind) | extras


def to_transformers(encoder: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Convert to the names of vit, ijepa, deit, dinov2 or dinov2_with_registers; the position table must fit the kind.

    The last two always have LayerScale and a mask token, which are set to one and zero if our encoder has none.
    """
    is_dinov2 = kind.startswith("dinov2")
    block = BLOCK | (VIT_BLOCK if not is_dinov2 else GATED if is_gated(encoder) else {})
    thirds = [f"attention.attention.{name}" for name in ("query", "key", "value")]
    found = rename_back(with_neutral(encoder) if is_dinov2 else encoder, NAMES, block, "encoder.layer", thirds)
    if is_dinov2:
        return found | {"embeddings.mask_token": found["embeddings.mask_token"].view(1, -1)}
    found.pop("embeddings.mask_token", None)
    if kind == "deit":
        found[DISTILLATION] = found.pop("embeddings.register_tokens")
    return found


def with_neutral(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add modules that Dinov2 and DINOv3 always have, unless present: LayerScale of one, a mask token of zero."""
    width, blocks = encoder["norm.weight"].shape[0], range(count_blocks(encoder, "blocks."))
    scales = {f"blocks.{number}.ls{which}.gamma": torch.ones(width) for number in blocks for which in (1, 2)}
    return scales | {"mask_token": torch.zeros(1, 1, width)} | encoder


def rename_back(
    encoder: dict[str, Tensor], names: dict[str, str], block: dict[str, str], layers: str, thirds: Sequence[str]
) -> dict[str, Tensor]:
    """The inverse of `rename`; `layers` is the prefix of block numbers, `thirds` the names of query, key and value."""
    found: dict[str, Tensor] = {}
    for key, value in encoder.items():
        if not key.startswith("blocks."):
            found[rename_prefix(key, inverted(names))] = value
            continue
        _, number, name = key.split(".", 2)
        if name.startswith("attn.qkv."):
            for module, third in zip(thirds, value.chunk(3), strict=True):
                found[f"{layers}.{number}.{module}.{name.rsplit('.', 1)[1]}"] = third.contiguous()
        else:
            found[f"{layers}.{number}.{rename_prefix(name, inverted(block))}"] = value
    return found


def rename(
    state: dict[str, Tensor], names: dict[str, str] = NAMES, block: dict[str, str] = EVERY_BLOCK
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder under our names, and other modules (pooler, classifier) under their original names.

    `names` and `block` map foreign names outside and inside the blocks to ours.
    """
    encoder: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        key = PREFIX.sub("", key)
        layer = LAYER.match(key)
        if layer is None:
            ours = "reg_token" if key == DISTILLATION else rename_prefix(key, names)
            found = extras if ours == key else encoder
            found[ours] = value.view(1, 1, -1) if ours == "mask_token" else value
            continue
        number, name = layer.groups()
        if piece := PIECE.match(name):
            ours = "mlp.fc1" if piece[3] else "attn.qkv"
            pieces.setdefault(f"blocks.{number}.{ours}.{piece[4]}", {})[piece[1] or piece[2] or piece[3]] = value
        else:
            encoder[f"blocks.{number}.{rename_prefix(name, block)}"] = value
    for key, by_name in pieces.items():
        order = next(names for names in PIECES[".".join(key.split(".")[2:4])] if by_name.keys() & set(names))
        if missing := [name for name in order if name not in by_name]:
            raise KeyError(f"{', '.join(missing)} of {key}")
        encoder[key] = torch.cat([by_name[name] for name in order])
    return encoder, extras


def remove_mask_token(encoder: dict[str, Tensor]) -> list[str]:
    """Remove a ViT's mask token, which only its pretraining used; returns its name in a list, empty if absent."""
    return ["embeddings.mask_token"] if encoder.pop("mask_token", None) is not None else []


def fill_biases(encoder: dict[str, Tensor]) -> bool:
    """Add zero biases of queries, keys and values unless the model has them; returns whether it had none."""
    if any(key.endswith("attn.qkv.bias") for key in encoder):
        return False
    for key in [key for key in encoder if key.endswith("attn.proj.bias")]:
        encoder[key.replace("proj", "qkv")] = torch.zeros(3 * len(encoder[key]))
    return True

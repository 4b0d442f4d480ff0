"""DINOv3's ViTs (Siméoni et al. 2025) with three sets of names: those of its released files, timm and transformers.

Its positions are rotary and have no weights: coordinates go from -1 to 1 along each side, with periods from 1 to 100.
The bias of the keys is zero: the released files mask it, and the libraries leave it out.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from sslvit.layouts.preprocessing import assume_preprocessing
from sslvit.layouts.transformers import fill_biases, rename_back, with_neutral
from sslvit.layouts.vit import (
    HEADS,
    Converted,
    inverted,
    is_gated,
    rename_prefix,
    settings_from_shapes,
    split_by_prefix,
)
from sslvit.weight_files import count_blocks

BASE = 100.0  # base of the periods of its positions
NORM_EPS = 1e-5
ALWAYS: dict[str, Any] = {"pos_embed": "rotary_2d_normalized", "norm_eps": NORM_EPS, "pooling": "class"}
IMAGE_SIZE = 224  # pixels, of the released models; their positions work for any size
REQUIRED = ("cls_token", "reg_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma",
            "blocks.0.ls2.gamma", "norm.weight")  # fmt: skip
# periods of the positions (computed here), masks of biases that must stay zero (checked here), and a norm that is used
# only in training, for local crops
PERIODS, MASK, LOCAL_NORM = "rope_embed.periods", "attn.qkv.bias_mask", "local_cls_norm."

LAYER = re.compile(r"^(?:blocks|(?:model\.)?layer)\.(\d+)\.(.+)$")
RELEASED = {"storage_tokens": "reg_token"}
TRANSFORMERS = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token", "embeddings.patch_embeddings.": "patch_embed.proj.",
}  # fmt: skip
RELEASED_BLOCK = {"mlp.w3.": "mlp.fc2."}
TIMM_BLOCK = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
TRANSFORMERS_BLOCK = {
    "attention.o_proj.": "attn.proj.", "mlp.down_proj.": "mlp.fc2.", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip
# parts that form one tensor here, in order
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
RELEASED_GATED, TIMM_GATED, TRANSFORMERS_GATED = (
    ("mlp.w1", "mlp.w2"), ("mlp.fc1_g", "mlp.fc1_x"), ("mlp.gate_proj", "mlp.up_proj")
)  # fmt: skip
# keys of transformers' config.json -> modules whose biases they state
BIASES = {
    "query_bias": QKV[:1], "key_bias": QKV[1:2], "value_bias": QKV[2:], "proj_bias": ("attention.o_proj",),
    "mlp_bias": (*TRANSFORMERS_GATED, "mlp.down_proj"),
}  # fmt: skip
WIDTH_7B, HEADS_7B = 4096, 32  # the only model with 128 channels per head
TIMM_BIAS = ("attn.q_bias", "attn.k_bias", "attn.v_bias")


def recognize(keys: set[str]) -> bool:
    """Whether names are those of DINOv3 in released files (registers, positions, masks), timm or transformers."""
    is_released = "patch_embed.proj.weight" in keys and bool({"storage_tokens", PERIODS, f"blocks.0.{MASK}"} & keys)
    is_timm = {"reg_token", "blocks.0.gamma_1"} <= keys and "pos_embed" not in keys
    return is_released or is_timm or "embeddings.patch_embeddings.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes: Any) -> Converted:
    """Convert from any of the three sets of names; training heads are returned as extras."""
    notes: list[str] = []
    backbone, training_heads = split_by_prefix(state, HEADS)
    encoder, ignored = rename(backbone, notes)
    if missing := [name for name in REQUIRED if name not in encoder]:
        raise KeyError(", ".join(missing))
    width = encoder["patch_embed.proj.weight"].shape[0]
    if PERIODS in backbone:
        told = width // (4 * len(backbone[PERIODS]))
        if heads not in (None, told):
            raise ValueError(
                f"heads: {heads}, but the periods in the file ({PERIODS}) are those of {told}. Leave heads out."
            )
        heads = told
    elif heads is None and width == WIDTH_7B:
        heads = HEADS_7B
        notes.append(f"heads: not in the file; those of the 7B model ({HEADS_7B}).")
    if fill_biases(encoder):
        notes.append("biases: the file has none of queries, keys and values; they are zero (as in the 7B model).")
    prepared = assume_preprocessing("dinov3", encoder["patch_embed.proj.weight"].shape[1], changes, notes)
    known = {**ALWAYS, "image_size": IMAGE_SIZE, "key_bias": has_key_bias(encoder), **prepared, **changes}
    settings = settings_from_shapes(encoder, heads, notes, **known)
    return Converted(settings, encoder, training_heads, notes, ignored)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to the names of the released files, without the periods."""
    found: dict[str, Tensor] = {}
    for key, value in _split_and_rename(encoder, RELEASED_GATED, RELEASED_BLOCK if is_gated(encoder) else {}).items():
        found[rename_prefix(key, inverted(RELEASED))] = value.view(1, -1) if key == "mask_token" else value
        if key.endswith("attn.qkv.bias") and not has_key_bias(encoder):
            found[f"{key}_mask"] = _mask_like(value)
    return found | extras


def to_timm(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to timm's names; timm has no mask token and no bias of the keys."""
    found: dict[str, Tensor] = {}
    for key, value in _split_and_rename(encoder, TIMM_GATED, TIMM_BLOCK).items():
        if key.endswith("attn.qkv.bias"):
            query, _, value_bias = value.chunk(3)
            found |= {
                key.replace("attn.qkv.bias", name): piece.contiguous()
                for name, piece in zip(TIMM_BIAS[::2], (query, value_bias), strict=True)
            }
        elif key != "mask_token":
            found[key] = value
    return found


def to_transformers(encoder: dict[str, Tensor], key_bias: bool) -> dict[str, Tensor]:
    """Convert to transformers' names.

    Modules that are optional here but not there are neutral: LayerScale of one, a mask token of zero, no registers.
    """
    block = TRANSFORMERS_BLOCK | ({} if is_gated(encoder) else {f"{TRANSFORMERS_GATED[1]}.": "mlp.fc1."})
    registers = {"reg_token": torch.zeros(1, 0, encoder["norm.weight"].shape[0])}
    renamed = _split_and_rename(registers | with_neutral(encoder), TRANSFORMERS_GATED, {})
    found = rename_back(renamed, TRANSFORMERS, block, "layer", QKV)
    return {key: value for key, value in found.items() if key_bias or not key.endswith(f"{QKV[1]}.bias")}


def rename(state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, from any of the three sets of names, and ignored names.

    Raises:
        KeyError: A part of a tensor is missing.
        ValueError: Positions, a mask of biases or a norm that this encoder does not support.
    """
    names = RELEASED_BLOCK | TIMM_BLOCK | TRANSFORMERS_BLOCK
    found: dict[str, Tensor] = {}
    ignored = [key for key in state if key == PERIODS or key.endswith(MASK) or key.startswith(LOCAL_NORM)]
    if PERIODS in state:
        notes += _check_periods(state[PERIODS])
    if any(key.startswith("cls_norm.") for key in state):
        raise ValueError("cls_norm: the class token has a norm of its own there, which this encoder has not.")
    for key in (key for key in state if key not in ignored):
        layer, value = LAYER.match(key), state[key]
        if layer is None:
            ours = rename_prefix(key, RELEASED | TRANSFORMERS)
            found[ours] = value.view(1, 1, -1) if ours == "mask_token" else value
        else:
            found[f"blocks.{layer[1]}.{rename_prefix(layer[2], names)}"] = value
    if "reg_token" in found and not found["reg_token"].numel():
        del found["reg_token"]  # transformers' model without registers
    with_key_bias = any(key.endswith(f"{QKV[1]}.bias") for key in found)
    for number in range(count_blocks(found, "blocks.")):
        _join_block(found, f"blocks.{number}.", with_key_bias)
        if (mask := state.get(f"blocks.{number}.{MASK}")) is not None:
            bias = found[f"blocks.{number}.attn.qkv.bias"]
            if not torch.equal(mask.to(bias), _mask_like(bias)):
                raise ValueError(f"blocks.{number}.{MASK}: masks other biases than the keys', which is not done here.")
            found[f"blocks.{number}.attn.qkv.bias"] = bias * mask.to(bias)
    return found, ignored


def has_key_bias(encoder: dict[str, Tensor]) -> bool:
    """Whether any bias of keys is nonzero; False for meta tensors."""
    biases = [value.chunk(3)[1] for key, value in encoder.items() if key.endswith("attn.qkv.bias")]
    return any(not bias.is_meta and bool(bias.any()) for bias in biases)


def _join_block(found: dict[str, Tensor], block: str, with_key_bias: bool) -> None:
    """Join a block's linear layers that are stored in parts with separate names."""
    for kind in ("weight", "bias"):
        can_lack_keys = kind == "bias" and not with_key_bias
        _join(found, block, [f"{name}.{kind}" for name in QKV], f"attn.qkv.{kind}", can_lack_keys)
        for names in (RELEASED_GATED, TIMM_GATED, TRANSFORMERS_GATED):
            _join(found, block, [f"{name}.{kind}" for name in names], f"mlp.fc1.{kind}")
    _join(found, block, list(TIMM_BIAS), "attn.qkv.bias", True)


def _join(found: dict[str, Tensor], block: str, names: list[str], ours: str, can_lack_keys: bool = False) -> None:
    """Concatenate the parts of one tensor; with `can_lack_keys`, a missing second part is zero."""
    pieces = [found.pop(block + name, None) for name in names]
    if all(piece is None for piece in pieces):
        return
    if names[1].startswith(TRANSFORMERS_GATED[1]) and pieces[0] is None:
        pieces = pieces[1:]  # transformers' MLP without a gate
    if can_lack_keys and pieces[1] is None and pieces[0] is not None:
        pieces[1] = torch.zeros_like(pieces[0])
    if lacking := [name for name, piece in zip(names, pieces, strict=False) if piece is None]:
        raise KeyError(block + lacking[0])
    found[block + ours] = torch.cat([piece for piece in pieces if piece is not None])


def _split_and_rename(encoder: dict[str, Tensor], gated: tuple[str, str], names: dict[str, str]) -> dict[str, Tensor]:
    """Rename the weights of blocks to another layout, and split the first layer of gated MLPs into two parts."""
    found: dict[str, Tensor] = {}
    for key, value in encoder.items():
        if not key.startswith("blocks."):
            found[key] = value
            continue
        _, number, name = key.split(".", 2)
        if name.startswith("mlp.fc1.") and is_gated(encoder):
            kind = name.rsplit(".", 1)[1]
            for name_of_half, half in zip(gated, value.chunk(2), strict=True):
                found[f"blocks.{number}.{name_of_half}.{kind}"] = half.contiguous()
        else:
            found[f"blocks.{number}.{rename_prefix(name, inverted(names))}"] = value
    return found


def _mask_like(bias: Tensor) -> Tensor:
    """A mask: one for the biases of queries and values, zero for those of keys."""
    query, key, value = torch.ones_like(bias).chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def _check_periods(periods: Tensor) -> list[str]:
    """Refuse periods other than those of rotary_2d_normalized; returns a note if they are rounded."""
    number = periods.numel()
    expected = BASE ** (torch.arange(number, dtype=torch.float64) / number)
    is_row = periods.ndim == 1 and number > 0
    difference = float((periods.double() / expected - 1).abs().max()) if is_row else math.inf
    if not difference < 2**-8:  # rounding error of bfloat16
        raise ValueError(f"{PERIODS}: are not the powers of {BASE:g} that this encoder's positions have.")
    if difference < 1e-6:
        return []
    return [
        "positions: the periods in the file are rounded to bfloat16; here, as in timm and transformers, they are not."
    ]

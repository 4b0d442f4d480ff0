"""Common code for released ViTs: infer settings from the shapes of a state dict with timm's names."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sslvit.layouts.preprocessing import assume_preprocessing
from sslvit.settings import EncoderSettings
from sslvit.weight_files import count_blocks

EVERY_VIT = ("cls_token", "pos_embed", "blocks.0.attn.qkv.bias")
HEADS = (
    "head.", "heads.", "head_dist.", "fc.", "classifier.", "linear.", "linear_head.", "linear_classifier.", "mlp_head.",
    "lm_head.", "score.", "pooler.", "pre_logits.", "projector.", "projection_head.", "predictor.", "prediction_head.",
    "last_layer.", "dino_head.", "ibot_head.",
)  # fmt: skip
"""Prefixes of modules that training adds after an encoder: classifiers, projections, predictors."""


@dataclass
class Converted:
    """A converted checkpoint.

    Args:
        settings: Settings of the encoder.
        encoder: State dict of ViTEncoder.
        extras: Other modules under our names ("decoder....", "head....").
        notes: Inferred settings and other remarks for the user, one line each.
        ignored: Names in the file that are not weights (masks, counters).
        num_read: Number of tensors in the file.
    """

    settings: EncoderSettings
    encoder: dict[str, Tensor]
    extras: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    num_read: int = 0

    def summary(self) -> str:
        """A line that accounts for every tensor of the file."""
        loaded = self.num_read - len(self.extras) - len(self.ignored)
        modules = Counter(key.split(".")[0] for key in self.extras)
        others = f"; not the encoder's: {', '.join(f'{name} ({n})' for name, n in modules.items())}" if modules else ""
        names = ", ".join(self.ignored[:3]) + (", ..." if len(self.ignored) > 3 else "")
        ignored = f"; ignored: {len(self.ignored)} ({names})" if self.ignored else ""
        return f"{self.num_read} tensors: {loaded} loaded, none missing{others}{ignored}"


def convert_vit(
    family: str,
    encoder: dict[str, Tensor],
    extras: dict[str, Tensor],
    heads: int | None,
    changes: dict[str, Any],
    **known: Any,
) -> Converted:
    """Convert a released ViT with timm's names; preprocessing is that of its authors' evaluation.

    `known` are settings of all models of the family, `changes` settings given by the user, which take precedence.
    """
    notes: list[str] = []
    prepared = assume_preprocessing(family, encoder["patch_embed.proj.weight"].shape[1], changes, notes)
    settings = settings_from_shapes(encoder, heads, notes, **{**prepared, **known, **changes})
    return Converted(settings, encoder, extras, notes)


def infer_heads(width: int, heads: int | None, notes: list[str]) -> int:
    """The number of heads, which weights do not show: as given, or the usual 64 channels per head, with a note."""
    if heads is not None:
        return heads
    if width % 64:
        raise ValueError(
            f"heads: not in the file, and width {width} is not a multiple of 64. Give --heads N; for --init, make an "
            "encoder of it first: sslvit import FILE FOLDER --heads N."
        )
    notes.append(f"heads: not in the file; assumed {width // 64} (64 channels each). Give heads= if that is wrong.")
    return width // 64


def is_gated(encoder: dict[str, Tensor]) -> bool:
    """Whether the MLPs are gated: the first layer has twice as many outputs as the second has inputs."""
    return encoder["blocks.0.mlp.fc1.weight"].shape[0] == 2 * encoder["blocks.0.mlp.fc2.weight"].shape[1]


def settings_from_shapes(
    state: dict[str, Tensor], heads: int | None, notes: list[str], **changes: Any
) -> EncoderSettings:
    """Infer the settings of a plain ViT from the shapes of its weights, in timm's names; `changes` override them.

    Appends a note for every setting that is only assumed. A missing weight that every ViT has is a KeyError.
    """
    if "palette" in changes:
        raise ValueError("palette: is for models of pixels (iGPT), and this one reads patches. Remove it.")
    patches = state["patch_embed.proj.weight"]
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise ValueError(f"patch_embed.proj.weight: {tuple(patches.shape)} is no convolution of square patches.")
    width, channels, patch, _ = patches.shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    has_class = "cls_token" in state
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    gated = is_gated(state)
    fc_norm = "fc_norm.weight" in state
    found: dict[str, Any] = {
        "channels": channels, "patch": patch, "width": width, "depth": count_blocks(state, "blocks."),
        "heads": infer_heads(width, heads, notes), "mlp": "swiglu" if gated else "gelu",
        "mlp_ratio": hidden / width, "bias": "blocks.0.attn.qkv.bias" in state,
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state, "class_token": has_class, "registers": registers,
        "mask_token": "mask_token" in state, "final_norm": "norm.weight" in state, "fc_norm": fc_norm,
        "pooling": "class" if has_class and not fc_norm else "mean",
        "pre_norm": "norm_pre.weight" in state,
    }  # fmt: skip
    if gated:
        found["mlp_ratio"] = 4.0 if (int(4 * width * 2 / 3) + 7) // 8 * 8 == hidden else 1.5 * hidden / width
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        found |= _position_grid(state["pos_embed"].shape[1], patch, has_class, registers, notes, changes)
    elif not any(key.startswith("pos_embed") for key in state):
        found["pos_embed"] = "none"
    return EncoderSettings(**{**found, **changes})


def require(state: dict[str, Tensor], *names: str) -> None:
    """Raise KeyError if names that every encoder of a layout has are missing; "a|b" accepts either name."""
    missing = [name for name in (*EVERY_VIT, *names) if not any(each in state for each in name.split("|"))]
    if missing:
        raise KeyError(", ".join(name.replace("|", " or ") for name in missing))


def describe_architecture(settings: EncoderSettings) -> str:
    """The architecture inferred from a bare file, in words, so that users notice modules that may be missing."""
    modules = {
        "class token": settings.class_token, "a bias of the patches": settings.patch_bias,
        "positions": settings.pos_embed != "none", "biases": settings.bias,
        "last norm": settings.final_norm or settings.fc_norm, "registers": settings.registers > 0,
        "LayerScale": settings.layer_scale is not None, "query-key norm": settings.qk_norm,
    }  # fmt: skip
    lacking = ", ".join(name for name, exists in modules.items() if not exists)
    without = f"; without {lacking}. If it had one of these, the file is incomplete" if lacking else ""
    height, width = settings.size
    return (
        f"architecture: inferred from the weights: {settings.depth} blocks of width {settings.width}, patch "
        f"{settings.patch}, {height} x {width} pixels, {settings.pooling} pooling{without}."
    )


def _position_grid(
    length: int, patch: int, has_class: bool, registers: int, notes: list[str], changes: dict[str, Any]
) -> dict[str, Any]:
    """Infer image size and prefix rows from the length of a position table; without image_size, the grid is square."""
    rows = {"class": int(has_class), "all": int(has_class) + registers, "none": 0}
    kinds = [changes["prefix_positions"]] if "prefix_positions" in changes else list(rows)
    size = changes.get("image_size")
    for kind in kinds:
        patches = length - rows[kind]
        side = math.isqrt(patches)
        if size is None and side * side == patches:
            if kind == "none" and has_class:
                notes.append(f"pos_embed: taken for {side} x {side} patches without a row for the class token.")
            return {"image_size": side * patch, "prefix_positions": kind}
        if size is not None:
            height, width = [size, size] if isinstance(size, int) else size
            if (height // patch) * (width // patch) == patches:
                return {"prefix_positions": kind}
    raise ValueError(
        f"pos_embed: {length} rows are no {'square grid' if size is None else f'grid of {size} pixels'} of patches of "
        f"{patch} with {rows['all']} prefix tokens. Give --image-size HEIGHT WIDTH."
    )


def rename_prefix(key: str, names: dict[str, str]) -> str:
    """Replace the first matching prefix from a table in a name."""
    for old, new in names.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def inverted(names: dict[str, str]) -> dict[str, str]:
    """The inverse of a table of names."""
    return {new: old for old, new in names.items()}


def split_by_prefix(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict: the entries without any of the prefixes, and the entries with one."""
    others = {key: value for key, value in state.items() if key.startswith(prefixes)}
    return {key: value for key, value in state.items() if key not in others}, others

"""What the released ViTs have in common: settings read from the shapes of a state dict in timm's names."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings


@dataclass
class Converted:
    """A foreign checkpoint in our terms.

    Args:
        settings: of the encoder.
        encoder: state dict of ViTEncoder.
        extras: other parts under our names ("decoder....", "head....").
        notes: what was inferred, one line each, for the reader.
        ignored: names in the file that are no weights of any part (masks, counters).
        read: tensors in the file.
    """

    settings: EncoderSettings
    encoder: dict[str, Tensor]
    extras: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    read: int = 0

    def account(self) -> str:
        """Where every tensor of the file went, in one line."""
        loaded = self.read - len(self.extras) - len(self.ignored)
        parts = Counter(key.split(".")[0] for key in self.extras)
        aside = f"; not the encoder's: {', '.join(f'{part} ({n})' for part, n in parts.items())}" if parts else ""
        shown = ", ".join(self.ignored[:3]) + (", ..." if len(self.ignored) > 3 else "")
        ignored = f"; ignored: {len(self.ignored)} ({shown})" if self.ignored else ""
        return f"{self.read} tensors: {loaded} loaded, none missing{aside}{ignored}"


def infer_heads(width: int, heads: int | None, notes: list[str]) -> int:
    """Heads are not visible in the weights: as given, or the usual 64 channels a head with a note."""
    if heads is not None:
        return heads
    if width % 64:
        raise ValueError(
            f"heads: the file does not say them, and width {width} is not a multiple of 64. Give heads= (--heads)."
        )
    notes.append(f"heads: not in the file; assumed {width // 64} (64 channels each). Give heads= if that is wrong.")
    return width // 64


def settings_from_shapes(state: dict[str, Tensor], heads: int | None, notes: list[str], **changes) -> EncoderSettings:
    """Settings of a plain ViT from its weights' shapes, in timm's names.

    Args:
        state: the state dict.
        heads: attention heads, or None to infer them.
        notes: gets a line for everything inferred.
        changes: settings that the file does not say, or that override what it seems to say.

    Raises:
        ValueError: the position table fits no square grid (give image_size), or the patches are no squares.
        KeyError: a weight that every ViT has is missing.
    """
    if "palette" in changes:
        raise ValueError("palette: is for models of pixels (iGPT), and this one reads patches. Leave it out.")
    patches = state["patch_embed.proj.weight"]
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise ValueError(f"patch_embed.proj.weight: {tuple(patches.shape)} is no convolution of square patches.")
    width, channels, patch, _ = patches.shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    has_class = "cls_token" in state
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    fc_norm = "fc_norm.weight" in state
    found = {
        "channels": channels, "patch": patch, "width": width, "depth": count_blocks(state, "blocks."),
        "heads": infer_heads(width, heads, notes), "mlp": "swiglu" if gated else "gelu",
        "mlp_ratio": hidden / width, "bias": "blocks.0.attn.qkv.bias" in state,
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state, "class_token": has_class, "registers": registers,
        "mask_token": "mask_token" in state, "final_norm": "norm.weight" in state, "fc_norm": fc_norm,
        "pooling": "class" if has_class and not fc_norm else "mean",
    }  # fmt: skip
    if gated:
        found["mlp_ratio"] = 4.0 if (int(4 * width * 2 / 3) + 7) // 8 * 8 == hidden else 1.5 * hidden / width
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        found |= _grid_of_positions(state["pos_embed"].shape[1], patch, has_class, registers, notes, changes)
    elif not any(key.startswith("pos_embed") for key in state):
        found["pos_embed"] = "none"
    return EncoderSettings(**{**found, **changes})


EVERY_VIT = ("cls_token", "pos_embed", "blocks.0.attn.qkv.bias")


def demand(state: dict[str, Tensor], *names: str) -> None:
    """Refuse weights that lack a part which every encoder of a layout has: it was lost, and is no choice.

    Raises:
        KeyError: with the names; a name "a|b" stands for one of both.
    """
    missing = [name for name in (*EVERY_VIT, *names) if not any(each in state for each in name.split("|"))]
    if missing:
        raise KeyError(", ".join(name.replace("|", " or ") for name in missing))


def as_read(settings: EncoderSettings) -> str:
    """What the names and shapes of a bare file were taken for, so that a reader sees what may have been lost."""
    parts = {
        "class token": settings.class_token, "positions": settings.pos_embed != "none", "biases": settings.bias,
        "last norm": settings.final_norm or settings.fc_norm, "registers": settings.registers > 0,
        "LayerScale": settings.layer_scale is not None, "query-key norm": settings.qk_norm,
    }  # fmt: skip
    lacking = ", ".join(part for part, is_there in parts.items() if not is_there)
    without = f"; without {lacking}. Where it has one of these, the file is not complete" if lacking else ""
    return (
        f"architecture: as the weights have it: {settings.depth} blocks of width {settings.width}, patch "
        f"{settings.patch}, {settings.image_size[0]} x {settings.image_size[1]} pixels, {settings.pooling} pooling"
        f"{without}."
    )


def _grid_of_positions(
    length: int, patch: int, has_class: bool, registers: int, notes: list[str], changes: dict
) -> dict:
    """Image size and prefix rows of a position table of some length: a square grid unless image_size is given."""
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
        f"{patch} with {rows['all']} prefix tokens. Give image_size=[height, width] (--image-size HEIGHT WIDTH)."
    )


TABLES = ("learned_1d", "learned_2d", "sincos_1d", "sincos_2d")


def not_plain(settings: EncoderSettings, outputs: str) -> dict[str, bool]:
    """Options that no ViT of another library has -> whether this encoder has them, and the outputs depend on them."""
    is_pooled = outputs != "tokens"
    return {
        f"tokens: {settings.tokens}": settings.tokens != "patch",
        f"pos_embed: {settings.pos_embed}": settings.pos_embed not in (*TABLES, "none"),
        f"norm: {settings.norm}": settings.norm != "layer",
        "causal: true": settings.causal,
        "locality_self_attention: true": settings.locality_self_attention,
        "pooling: attention": is_pooled and settings.pooling == "attention",
        f"feature_layer: {settings.feature_layer}": is_pooled and settings.feature_layer not in (None, settings.depth),
    }


def refuse_if(what: str, cannot: dict[str, bool]) -> None:
    """Raise ValueError with all options that apply."""
    refused = "; ".join(option for option, applies in cannot.items() if applies)
    if refused:
        raise ValueError(f"{what} cannot hold this encoder ({refused}). Use --format onnx, torch or safetensors.")


def resampling_other_than(settings: EncoderSettings, antialias: bool) -> str | None:
    """The setting by which positions of other image sizes differ from a plain resampling to the size, or None."""
    if settings.pos_embed == "none":
        return None
    if settings.interpolate_offset:
        return f"interpolate_offset: {settings.interpolate_offset:g}"
    if settings.interpolate_antialias != antialias:
        return f"interpolate_antialias: {str(settings.interpolate_antialias).lower()}"
    return None


def state_with_table(encoder: ViTEncoder, rows: int, outputs: str) -> dict[str, Tensor]:
    """Weights with one position table that has `rows` rows in front of the patches' rows; the same function.

    A prefix token's row beyond those becomes part of the token itself; a row that is missing is zero.
    """
    settings = encoder.settings
    left_out = ("pos_embed", "fc_norm.", "attn_pool.") if outputs == "tokens" else ("pos_embed",)
    state = {key: value for key, value in encoder.state_dict().items() if not key.startswith(left_out)}
    prefix, patches = encoder.position_table(settings.grid)
    if patches is None:
        return state
    names = ["cls_token"] * settings.class_token + ["reg_token"] * bool(settings.registers)
    if rows < len(prefix):
        tokens = torch.cat([state[name] for name in names], 1).clone()
        tokens[0, rows : len(prefix)] += prefix[rows:]
        parts = tokens.split([state[name].shape[1] for name in names], 1)
        state |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    kept = torch.cat([prefix[:rows], prefix.new_zeros(max(rows - len(prefix), 0), settings.width)])
    state["pos_embed"] = torch.cat([kept, patches])[None].detach()
    return state


def count_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """How many different numbers follow the prefix."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return sum(number.isdecimal() for number in numbers)


HEADS = (
    "head.", "heads.", "head_dist.", "fc.", "classifier.", "linear.", "linear_head.", "linear_classifier.", "mlp_head.",
    "lm_head.", "score.", "pooler.", "pre_logits.", "projector.", "projection_head.", "predictor.", "prediction_head.",
    "last_layer.", "dino_head.", "ibot_head.",
)  # fmt: skip
"""What training puts behind an encoder, in one file with it: classifiers, projections, predictors."""


def split(state: dict[str, Tensor], extras: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's part of a state dict, and the part whose names start with one of the extras."""
    other = {key: value for key, value in state.items() if key.startswith(extras)}
    return {key: value for key, value in state.items() if key not in other}, other

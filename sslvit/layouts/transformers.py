"""Folders that transformers writes: ViT, Dinov2, Dinov2WithRegisters; ImageGPT through openai_igpt.

config.json says what the shapes do not (heads, epsilon), preprocessor_config.json how images reach the model.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.files import brief
from sslvit.layouts import openai_igpt, preprocessing
from sslvit.layouts.vit import (
    Converted,
    count_blocks,
    demand,
    not_plain,
    refuse_if,
    resampling_other_than,
    settings_from_shapes,
)
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import MAX_CHANNELS

PREFIX = re.compile(r"^(vit|dinov2|dinov2_with_registers|transformer)\.")
NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.", "layernorm.": "norm.",
}  # fmt: skip
BLOCK = {
    "layernorm_before.": "norm1.", "layernorm_after.": "norm2.", "attention.output.dense.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.", "output.dense.": "mlp.fc2.", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma", "mlp.weights_in.": "mlp.fc1.", "mlp.weights_out.": "mlp.fc2.",
    "attention.o_proj.": "attn.proj.", "mlp.down_proj.": "mlp.fc2.",
}  # fmt: skip
# from its fifth version on, names in memory (a saved state_dict) are others than in its own files
PART = re.compile(r"^(?:encoder\.layer|layers)\.(\d+)\.(.+)$")
PIECE = re.compile(
    r"^(?:attention\.attention\.(query|key|value)|attention\.([qkv]_proj)|mlp\.(gate_proj|up_proj))\.(weight|bias)$"
)
PIECES = {"attn.qkv": (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")),
          "mlp.fc1": (("gate_proj", "up_proj"),)}  # fmt: skip
SHAPE = {"hidden_size": "width", "num_hidden_layers": "depth", "patch_size": "patch", "num_channels": "channels"}
ALWAYS = {"class_token": True, "final_norm": True, "pos_embed": "learned_1d", "prefix_positions": "class",
          "pooling": "class", "fc_norm": False, "qk_norm": False, "bias": True}  # fmt: skip
"""What every ViT and Dinov2 of transformers has, whatever its settings."""
MODELS = ("vit", "dinov2", "dinov2_with_registers", "imagegpt")


def is_folder(path: Path) -> bool:
    """Whether transformers wrote it."""
    return (path / "config.json").is_file()


def read_config(path: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        ValueError: it is damaged, or of a model that is no plain vision transformer.
    """
    config = _read_json(path / "config.json")
    if config.get("model_type") not in MODELS:
        kind = config.get("model_type", "no model_type")
        raise ValueError(f"{path}: a transformers folder of another model ({brief(kind)}). Known: {', '.join(MODELS)}.")
    return config


def to_sslvit(state: dict[str, Tensor], path: Path, **changes) -> Converted:
    """transformers -> ours.

    Args:
        state: of the folder's model.safetensors.
        path: the folder.
        changes: settings that override what the folder says.

    Raises:
        ValueError: an option that the encoder does not have, or less in the weights than config.json says.
    """
    config = read_config(path)
    try:
        return _convert(state, config, path, changes)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: its settings or weights are damaged ({reason}).") from error


def _convert(state: dict[str, Tensor], config: dict[str, Any], path: Path, changes: dict[str, Any]) -> Converted:
    is_igpt = config["model_type"] == "imagegpt"
    side = math.isqrt(config["n_positions"]) if is_igpt and "n_positions" in config else None
    size = changes.get("image_size", config.get("image_size", side or 0))
    sides = [size, size] if isinstance(size, int) else size
    if not (isinstance(sides, list) and [type(side) for side in sides] == [int, int]):
        raise ValueError(f"{path}: image_size {size!r} is no side in pixels and no pair of them.")
    channels = 3 if is_igpt else config.get("num_channels", 3)
    if not isinstance(channels, int) or channels > MAX_CHANNELS:
        raise ValueError(f"{path}: num_channels {brief(channels)} is no number of channels.")
    prepared, notes = _preprocessing(path, config["model_type"], channels, sides)
    said = said_by_imagegpt(config, path) if is_igpt else said_by_config(config, path)
    if is_igpt:
        converted = openai_igpt.to_sslvit(state, config["n_head"], **prepared | _palette(path) | said | changes)
        converted.read = len(state)
        converted.notes += notes
        return converted
    encoder, extras = rename(state)
    has_biases = any(key.endswith("attn.qkv.bias") for key in encoder)
    if config.get("qkv_bias", True) is False:
        if has_biases:
            raise ValueError(f"{path}: says qkv_bias: false, and its weights have such biases.")
        fill_biases(encoder)
    ignored = []
    if config["model_type"] == "vit" and encoder.pop("mask_token", None) is not None:
        ignored.append("embeddings.mask_token")
    demand(encoder, "norm.weight")
    settings = settings_from_shapes(encoder, config["num_attention_heads"], notes, **prepared | said | changes)
    return Converted(settings, encoder, extras, notes, ignored, len(state))


def said_by_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of a ViT or Dinov2 by its config.json: its weights must have all that it says.

    Raises:
        ValueError: an option that the encoder does not have.
    """
    is_dinov2 = config["model_type"] != "vit"
    is_gated = bool(config.get("use_swiglu_ffn"))
    activation = "silu" if is_gated else config.get("hidden_act", "gelu")
    if activation not in ("gelu", "silu") or (activation == "silu" and not is_gated):
        raise ValueError(f"{path}: hidden_act {brief(activation)} is not gelu, so this encoder cannot be held.")
    said = {ours: config[theirs] for theirs, ours in SHAPE.items() if theirs in config}
    if isinstance(said.get("patch"), list) and len(set(said["patch"])) == 1:
        said["patch"] = said["patch"][0]
    if is_dinov2 and "mlp_ratio" in config:
        said["mlp_ratio"] = float(config["mlp_ratio"])
    elif "intermediate_size" in config and "hidden_size" in config:
        said["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    has_registers = config["model_type"] == "dinov2_with_registers"
    return said | ALWAYS | {
        "norm_eps": config["layer_norm_eps"], "image_size": config["image_size"],
        "mlp": "swiglu" if is_gated else "gelu", "layer_scale": 1.0 if is_dinov2 else None,
        "registers": config.get("num_register_tokens", 4) if has_registers else 0,
        "interpolate_antialias": has_registers,
    }  # fmt: skip


def said_by_imagegpt(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same of an ImageGPT.

    Raises:
        ValueError: an option that the encoder does not have.
    """
    activation = config.get("activation_function", "quick_gelu")
    if activation != "quick_gelu":
        raise ValueError(f"{path}: activation_function {activation} is not quick_gelu, so it cannot be held.")
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(key, usual) is not usual:
            raise ValueError(
                f"{path}: {key} {brief(config[key])}: scores are scaled otherwise here, so it cannot be held."
            )
    said = {
        ours: config[theirs] for theirs, ours in {"n_embd": "width", "n_layer": "depth"}.items() if theirs in config
    }
    if "n_embd" in config:
        said["mlp_ratio"] = (config.get("n_inner") or 4 * config["n_embd"]) / config["n_embd"]
    if "n_positions" in config and math.isqrt(config["n_positions"]) ** 2 == config["n_positions"]:
        said["image_size"] = math.isqrt(config["n_positions"])
    return said | {"norm_eps": config.get("layer_norm_epsilon", 1e-5), "bias": True}


def kind_of(settings: EncoderSettings, outputs: str) -> str:
    """The model of transformers, as its config names it, that holds these settings or comes nearest."""
    if settings.tokens == "pixel":
        return "imagegpt"
    if settings.registers:
        return "dinov2_with_registers"
    # Dinov2's classifier reads the mean over patches too, which ViT's does not
    is_mean = outputs == "logits" and settings.pooling == "mean"
    return "dinov2" if settings.layer_scale is not None or settings.mlp == "swiglu" or is_mean else "vit"


def model_arguments(settings: EncoderSettings, outputs: str = "features") -> dict[str, Any]:
    """Arguments of transformers' config for these settings.

    Raises:
        ValueError: its model cannot hold an option; all such options are named.
    """
    kind = kind_of(settings, outputs)
    if kind == "imagegpt":
        return openai_igpt.model_arguments(settings)
    is_pooled = outputs != "tokens"
    is_square = settings.image_size[0] == settings.image_size[1]
    activations = ("gelu",) if kind == "vit" else ("gelu", "swiglu")
    ratio = settings.mlp_ratio
    refuse_if(f"transformers' {kind}", {
        **not_plain(settings, outputs),
        "pos_embed: none": settings.pos_embed == "none",
        f"mlp: {settings.mlp}": settings.mlp not in activations,
        f"mlp_ratio: {ratio:g}, which is no whole number": kind != "vit" and ratio != int(ratio),
        "bias: false": not settings.bias,
        "qk_norm: true": settings.qk_norm,
        "class_token: false": not settings.class_token,
        "final_norm: false": not settings.final_norm,
        "fc_norm: true": settings.fc_norm and is_pooled,
        f"image_size: {settings.image_size}, which is no square": kind != "vit" and not is_square,
    })  # fmt: skip
    common = {
        "hidden_size": settings.width, "num_hidden_layers": settings.depth, "num_attention_heads": settings.heads,
        "layer_norm_eps": settings.norm_eps, "patch_size": settings.patch, "num_channels": settings.channels,
        "image_size": settings.image_size[0] if is_square else list(settings.image_size),
    }  # fmt: skip
    if kind == "vit":
        return common | {"intermediate_size": settings.mlp_width}
    registers = {"num_register_tokens": settings.registers} if settings.registers else {}
    return common | registers | {"mlp_ratio": int(ratio), "use_swiglu_ffn": settings.mlp == "swiglu"}


def resampling_differs(settings: EncoderSettings, outputs: str) -> str | None:
    """The setting for which transformers gives other positions at other sizes, or None."""
    kind = kind_of(settings, outputs)
    if kind == "imagegpt":
        return "a pixel sequence is tied to its size"
    if settings.image_size[0] != settings.image_size[1]:
        return f"image_size: {settings.image_size}, which is no square"
    return resampling_other_than(settings, antialias=kind == "dinov2_with_registers")


def from_sslvit(encoder: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Ours -> transformers' names, for one of its models.

    Args:
        encoder: with a position table that has one row in front of the patches' (layouts/vit.py).
        kind: vit, dinov2 or dinov2_with_registers. The latter two multiply each branch by a scale per channel, one
            where we have none, and own a mask token, zero where we have none.
    """
    names = {ours: theirs for theirs, ours in NAMES.items()}
    inner, outer = (encoder[f"blocks.0.mlp.fc{number}.weight"].shape for number in (1, 2))
    block = {"attn.proj.": "attention.output.dense.", "ls1.gamma": "layer_scale1.lambda1",
             "ls2.gamma": "layer_scale2.lambda1"}  # fmt: skip
    if kind == "vit":
        block |= {"norm1.": "layernorm_before.", "norm2.": "layernorm_after.", "mlp.fc1.": "intermediate.dense.",
                  "mlp.fc2.": "output.dense."}  # fmt: skip
    elif inner[0] == 2 * outer[1]:  # gated
        block |= {"mlp.fc1.": "mlp.weights_in.", "mlp.fc2.": "mlp.weights_out."}
    found: dict[str, Tensor] = {}
    for key, value in encoder.items():
        if not key.startswith("blocks."):
            ours = next(ours for ours in names if key.startswith(ours))
            found[key.replace(ours, names[ours], 1)] = value.view(1, -1) if key == "mask_token" else value
            continue
        _, number, part = key.split(".", 2)
        layer = f"encoder.layer.{number}."
        if part.startswith("attn.qkv."):
            for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{layer}attention.attention.{name}.{part.rsplit('.', 1)[1]}"] = third.contiguous()
            continue
        ours = next((ours for ours in block if part.startswith(ours)), None)
        found[layer + (part if ours is None else part.replace(ours, block[ours], 1))] = value
    if kind == "vit":
        found.pop("embeddings.mask_token", None)
        return found
    width = encoder["norm.weight"].shape[0]
    found.setdefault("embeddings.mask_token", torch.zeros(1, width))
    for number in range(count_blocks(encoder, "blocks.")):
        for which in (1, 2):
            found.setdefault(f"encoder.layer.{number}.layer_scale{which}.lambda1", torch.ones(width))
    return found


def classifier(head: dict[str, Tensor], kind: str, pooling: str) -> dict[str, Tensor]:
    """A classifier under transformers' names. Dinov2's reads the class token beside the mean over patches."""
    weight = head["weight"]
    if kind != "vit":
        nothing = torch.zeros_like(weight)
        weight = torch.cat([weight, nothing] if pooling == "class" else [nothing, weight], 1)
    return {"classifier.weight": weight, "classifier.bias": head["bias"]}


def rename(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder under our names, and the rest (pooler, classifier) under its own."""
    encoder: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        key = PREFIX.sub("", key)
        block = PART.match(key)
        if block is None:
            ours = next(
                (key.replace(theirs, name, 1) for theirs, name in NAMES.items() if key.startswith(theirs)), None
            )
            if ours is None:
                extras[key] = value
            else:
                encoder[ours] = value.view(1, 1, -1) if ours == "mask_token" else value
            continue
        number, name = block.groups()
        if piece := PIECE.match(name):
            ours = "mlp.fc1" if piece[3] else "attn.qkv"
            pieces.setdefault(f"blocks.{number}.{ours}.{piece[4]}", {})[piece[1] or piece[2] or piece[3]] = value
            continue
        for theirs, ours in BLOCK.items():
            if name.startswith(theirs):
                name = name.replace(theirs, ours, 1)
                break
        encoder[f"blocks.{number}.{name}"] = value
    for key, parts in pieces.items():
        names = next(names for names in PIECES[".".join(key.split(".")[2:4])] if parts.keys() & set(names))
        if missing := [name for name in names if name not in parts]:
            raise KeyError(f"{', '.join(missing)} of {key}")
        encoder[key] = torch.cat([parts[name] for name in names])
    return encoder, extras


def fill_biases(encoder: dict[str, Tensor]) -> None:
    """Zero biases of queries, keys and values, for a model that has only the others."""
    for key in [key for key in encoder if key.endswith("attn.proj.bias")]:
        encoder[key.replace("proj", "qkv")] = torch.zeros(3 * len(encoder[key]))


def _preprocessing(path: Path, model: str, channels: int, image_size: list[int]) -> tuple[dict[str, Any], list[str]]:
    file = path / "preprocessor_config.json"
    content = _read_json(file) if file.is_file() else None
    try:
        return preprocessing.from_transformers(content, model, channels, image_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({brief(str(error))}). Is the download complete?") from error


def _palette(path: Path) -> dict[str, Any]:
    """The colors that an ImageGPT's processor maps pixels to."""
    file = path / "preprocessor_config.json"
    clusters = _read_json(file).get("clusters") if file.is_file() else None
    return {} if clusters is None else {"palette": clusters}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({error}). Is the download complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not settings.")
    return content

"""Folders that transformers writes: ViT, Dinov2, Dinov2WithRegisters; ImageGPT through openai_igpt.

config.json says what the shapes do not (heads, epsilon), preprocessor_config.json how images reach the model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.layouts import openai_igpt
from sslvit.layouts.vit import Converted, settings_from_shapes

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
}  # fmt: skip
PART = re.compile(r"^encoder\.layer\.(\d+)\.(.+)$")
ATTENTION = re.compile(r"^attention\.attention\.(query|key|value)\.(weight|bias)$")
MODELS = ("vit", "dinov2", "dinov2_with_registers", "imagegpt")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


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
        raise ValueError(f"{path}: a transformers folder of another model ({kind}). Known: {', '.join(MODELS)}.")
    return config


def to_sslvit(state: dict[str, Tensor], path: Path, **changes) -> Converted:
    """transformers -> ours.

    Args:
        state: of the folder's model.safetensors.
        path: the folder.
        changes: settings that override what the folder says.

    Raises:
        ValueError: an option that the encoder does not have.
    """
    config = read_config(path)
    if config["model_type"] == "imagegpt":
        converted = openai_igpt.to_sslvit(state, config["n_head"], **_preprocessing(path) | _palette(path) | changes)
        converted.read = len(state)
        return converted
    activation = "silu" if config.get("use_swiglu_ffn") else config.get("hidden_act", "gelu")
    if activation not in ("gelu", "silu"):
        raise ValueError(f"{path}: hidden_act {activation} is not gelu, so this encoder cannot be held.")
    encoder, extras = rename(state)
    is_dinov2 = config["model_type"] != "vit"
    found = {
        "norm_eps": config["layer_norm_eps"], "image_size": config["image_size"], "prefix_positions": "class",
        "interpolate_antialias": config["model_type"] == "dinov2_with_registers", **_preprocessing(path), **changes,
    }  # fmt: skip
    ignored = []
    if not is_dinov2 and encoder.pop("mask_token", None) is not None:
        ignored.append("embeddings.mask_token")
    settings = settings_from_shapes(encoder, config["num_attention_heads"], [], **found)
    return Converted(settings, encoder, extras, ignored=ignored, read=len(state))


def rename(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder under our names, and the rest (pooler, classifier) under its own."""
    encoder: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
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
        if attention := ATTENTION.match(name):
            thirds.setdefault(f"blocks.{number}.attn.qkv.{attention[2]}", {})[attention[1]] = value
            continue
        for theirs, ours in BLOCK.items():
            if name.startswith(theirs):
                name = name.replace(theirs, ours, 1)
                break
        encoder[f"blocks.{number}.{name}"] = value
    for key, parts in thirds.items():
        encoder[key] = torch.cat([parts[name] for name in ("query", "key", "value")])
    for key in [key for key in encoder if key.endswith("attn.proj.bias")]:  # without qkv_bias the others stay
        encoder.setdefault(key.replace("proj", "qkv"), torch.zeros(3 * len(encoder[key])))
    return encoder, extras


def _preprocessing(path: Path) -> dict[str, Any]:
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return {"mean": [0.5] * 3, "std": [0.5] * 3}  # what its image processors start from
    content = _read_json(file)
    found = {"mean": content.get("image_mean"), "std": content.get("image_std")}
    if content.get("resample") in RESAMPLE:
        found["interpolation"] = RESAMPLE[content["resample"]]
    return {key: value for key, value in found.items() if value is not None}


def _palette(path: Path) -> dict[str, Any]:
    """The colours that an ImageGPT's processor maps pixels to."""
    file = path / "preprocessor_config.json"
    clusters = _read_json(file).get("clusters") if file.is_file() else None
    return {} if clusters is None else {"palette": clusters}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged ({error}). Is the download complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not settings.")
    return content

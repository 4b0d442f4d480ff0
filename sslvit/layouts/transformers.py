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

from sslvit.files import brief
from sslvit.layouts import openai_igpt
from sslvit.layouts.vit import (
    Converted,
    count_blocks,
    not_plain,
    refuse_if,
    resampling_other_than,
    settings_from_shapes,
)
from sslvit.settings import EncoderSettings

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
        raise ValueError(f"{path}: a transformers folder of another model ({brief(kind)}). Known: {', '.join(MODELS)}.")
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
    try:
        return _convert(state, config, path, changes)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its settings or weights are damaged ({error}).") from error


def _convert(state: dict[str, Tensor], config: dict[str, Any], path: Path, changes: dict[str, Any]) -> Converted:
    size = config.get("image_size", 0)
    if not isinstance(size, int) and not (isinstance(size, list) and [type(side) for side in size] == [int, int]):
        raise ValueError(f"{path}: image_size {size!r} is no side in pixels and no pair of them.")
    notes = _unusual(path, size)
    if config["model_type"] == "imagegpt":
        activation = config.get("activation_function", "quick_gelu")
        if activation != "quick_gelu":
            raise ValueError(f"{path}: activation_function {activation} is not quick_gelu, so it cannot be held.")
        found = {"norm_eps": config.get("layer_norm_epsilon", 1e-5), **_preprocessing(path), **_palette(path)}
        converted = openai_igpt.to_sslvit(state, config["n_head"], **found | changes)
        converted.read = len(state)
        converted.notes += notes
        return converted
    activation = "silu" if config.get("use_swiglu_ffn") else config.get("hidden_act", "gelu")
    if activation not in ("gelu", "silu"):
        raise ValueError(f"{path}: hidden_act {brief(activation)} is not gelu, so this encoder cannot be held.")
    encoder, extras = rename(state)
    is_dinov2 = config["model_type"] != "vit"
    found = {
        "norm_eps": config["layer_norm_eps"], "image_size": config["image_size"], "prefix_positions": "class",
        "interpolate_antialias": config["model_type"] == "dinov2_with_registers", **_preprocessing(path), **changes,
    }  # fmt: skip
    ignored = []
    if not is_dinov2 and encoder.pop("mask_token", None) is not None:
        ignored.append("embeddings.mask_token")
    settings = settings_from_shapes(encoder, config["num_attention_heads"], notes, **found)
    return Converted(settings, encoder, extras, notes, ignored, len(state))


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
        "positions: none": settings.positions == "none",
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
        encoder[key] = torch.cat([parts[name] for name in names])
    for key in [key for key in encoder if key.endswith("attn.proj.bias")]:  # without qkv_bias the others stay
        encoder.setdefault(key.replace("proj", "qkv"), torch.zeros(3 * len(encoder[key])))
    return encoder, extras


def _preprocessing(path: Path) -> dict[str, Any]:
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return {"mean": [0.5] * 3, "std": [0.5] * 3}  # what its image processors start from
    content = _read_json(file)
    found = {"mean": content.get("image_mean"), "std": content.get("image_std")}
    if content.get("do_normalize") is False:
        found = {"mean": [0.0] * 3, "std": [1.0] * 3}
    found["interpolation"] = RESAMPLE.get(content.get("resample"))
    return {key: value for key, value in found.items() if value is not None}


def _unusual(path: Path, image_size: int | list[int]) -> list[str]:
    """What the image processor does otherwise than sslvit would, for the reader."""
    file = path / "preprocessor_config.json"
    content = _read_json(file) if file.is_file() else {}
    notes = []
    if content.get("do_rescale") is False or abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        notes.append("preprocessing: its pixels are not scaled to 0 to 1, and here they are; mean and std may not fit.")
    if content.get("resample", 3) not in RESAMPLE:
        notes.append(f"preprocessing: resample {content['resample']} is not bilinear or bicubic; bicubic is used.")
    return notes + _framing(content, image_size)


def _framing(content: dict[str, Any], image_size: int | list[int]) -> list[str]:
    """How an image processor cuts images unlike sslvit, which resizes the largest centered box to image_size."""
    size, crop = content.get("size"), content.get("crop_size") if content.get("do_center_crop", True) else None
    size = {"shortest_edge": size} if isinstance(size, int) else size if isinstance(size, dict) else {}
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if content.get("do_resize") is False:
        return []
    edge = size.get("shortest_edge")
    ours = f"here the largest centered box is resized to {image_size}"
    if edge and crop and crop != edge:
        return [f"preprocessing: there the shorter side is resized to {edge} and the middle {crop} are kept; {ours}."]
    if size.get("height") and not crop:
        return [f"preprocessing: there images are squashed to {size['height']} x {size.get('width')}; {ours}."]
    return []


def _palette(path: Path) -> dict[str, Any]:
    """The colours that an ImageGPT's processor maps pixels to."""
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

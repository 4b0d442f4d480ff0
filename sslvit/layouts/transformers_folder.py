"""Folders written by transformers: ViT and its variants, Dinov2, DINOv3, vision towers, and ImageGPT.

config.json states settings that the shapes do not show (heads, epsilon), preprocessor_config.json the preprocessing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from sslvit.files import brief
from sslvit.layouts import clip, dinov3, openai_igpt, vit_mae
from sslvit.layouts.timm import OWN_BIAS
from sslvit.layouts.transformers import ALWAYS, fill_biases, remove_mask_token, rename
from sslvit.layouts.transformers_processor import from_transformers
from sslvit.layouts.vit import Converted, require, settings_from_shapes
from sslvit.settings.encoder import MAX_CHANNELS

SHAPE = {"hidden_size": "width", "num_hidden_layers": "depth", "patch_size": "patch", "num_channels": "channels"}
IMAGEGPT_SHAPE = {"n_embd": "width", "n_layer": "depth"}
VIT_KINDS: dict[str, dict[str, Any]] = {
    "vit": {}, "vit_mae": vit_mae.KNOWN, "vit_msn": {}, "ijepa": {"class_token": False, "pooling": "mean"},
    "deit": {"registers": 1, "prefix_positions": "all"},  # its distillation token
}  # fmt: skip
"""Models with ViT's blocks and names -> settings in which each differs from ViT."""
MODELS = (*VIT_KINDS, "dinov2", "dinov2_with_registers", "dinov3_vit", *clip.KINDS, "imagegpt")
REFUSED = {
    "beit": OWN_BIAS, "data2vec-vision": OWN_BIAS,
    "siglip2": "its images have any proportions, and their patches are padded and masked",
}  # fmt: skip
"""Models that this encoder cannot represent -> the reason."""


def is_folder(path: Path) -> bool:
    """Whether a path is a folder with a config.json."""
    return (path / "config.json").is_file()


def stated(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json, from any library; empty if there is none or it cannot be read."""
    try:
        return _read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}


def model_type(path: Path) -> Any:
    """The model_type in a folder's config.json; None if it is missing."""
    return _read_json(path / "config.json").get("model_type")


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json, and refuse models other than plain vision transformers."""
    config = _read_json(path / "config.json")
    if config.get("model_type") not in MODELS:
        kind = config.get("model_type", "no model_type")
        if isinstance(kind, str) and kind in REFUSED:
            raise ValueError(
                f"{path}: a {kind}, which cannot be held: {REFUSED[kind]}. Use another model, such as vit."
            )
        raise ValueError(f"{path}: a transformers folder of another model ({brief(kind)}). Known: {', '.join(MODELS)}.")
    return config


def to_sslvit(state: dict[str, Tensor], path: Path, **changes: Any) -> Converted:
    """Convert a folder's weights, which must agree with its config.json; `changes` override settings."""
    config = read_config(path)
    try:
        return _convert(state, config, path, changes)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: its settings or weights are damaged ({reason}).") from error


def mae_decoder(path: Path, extras: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of MAESettings in a ViTMAE's config.json, and its decoder, which is among the weights in `extras`.

    Raises:
        ValueError: Settings or weights are missing.
    """
    try:
        return vit_mae.mae_settings(read_config(path)), vit_mae.decoder_to_sslvit(extras)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: its decoder or its settings are damaged ({reason}).") from error


def _convert(state: dict[str, Tensor], config: dict[str, Any], path: Path, changes: dict[str, Any]) -> Converted:
    if config["model_type"] in clip.KINDS:
        config = clip.vision_config(config)
    is_igpt = config["model_type"] == "imagegpt"
    side = math.isqrt(config["n_positions"]) if is_igpt and "n_positions" in config else None
    size = changes.get("image_size", config.get("image_size", side or 0))
    sides = [size, size] if isinstance(size, int) else size
    if not (isinstance(sides, list) and [type(side) for side in sides] == [int, int]):
        raise ValueError(f"{path}: image_size {size!r} is neither a side in pixels nor a pair of them.")
    channels = 3 if is_igpt else config.get("num_channels", 3)
    if not isinstance(channels, int) or channels > MAX_CHANNELS:
        raise ValueError(f"{path}: num_channels {brief(channels)} is no number of channels.")
    processor = path / "preprocessor_config.json"
    content = _read_json(processor) if processor.is_file() else None
    try:
        prepared, notes = from_transformers(content, config["model_type"], channels, sides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{processor}: damaged ({brief(str(error))}). Is the download complete?") from error
    if is_igpt:
        clusters = (content or {}).get("clusters")  # the color palette
        palette = {} if clusters is None else {"palette": clusters}
        known = prepared | palette | _imagegpt_settings(config, path)
        converted = openai_igpt.to_sslvit(state, config["n_head"], **known | changes)
        converted.num_read = len(state)
        converted.notes += notes
        return converted
    if config["model_type"] in clip.DEFAULTS:
        encoder, extras, ignored = clip.to_sslvit(state)
        if config["model_type"] == "clip_vision_model":
            require(encoder)
        known = prepared | shape_of(config) | clip.settings_of(config, path)
        settings = settings_from_shapes(encoder, config["num_attention_heads"], notes, **known | changes)
        return Converted(settings, encoder, extras, notes, ignored, len(state))
    is_dinov3 = config["model_type"] == "dinov3_vit"
    stated = _dinov3_settings(config, path) if is_dinov3 else _vit_settings(config, path)
    num_read = len(state)
    if is_dinov3:
        state = _with_dinov3_biases(state, config, path, notes)
    known = prepared | stated | VIT_KINDS.get(config["model_type"], {})
    encoder, extras = (dinov3.rename(state, notes)[0], {}) if is_dinov3 else rename(state)
    if not is_dinov3 and config.get("qkv_bias", True) is False and not fill_biases(encoder):
        raise ValueError(f"{path}: states qkv_bias: false, but its weights have such biases.")
    ignored = remove_mask_token(encoder) if config["model_type"] in VIT_KINDS else []
    if known["class_token"] and not is_dinov3:
        require(encoder, "norm.weight", *(["reg_token"] if known.get("registers") else []))
    settings = settings_from_shapes(encoder, config["num_attention_heads"], notes, **known | changes)
    return Converted(settings, encoder, extras, notes, ignored, num_read)


def shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """Settings in a config.json that can also be inferred from shapes, so that both can be compared."""
    found = {ours: config[theirs] for theirs, ours in SHAPE.items() if theirs in config}
    if isinstance(found.get("patch"), list) and len(set(found["patch"])) == 1:
        found["patch"] = found["patch"][0]
    if "intermediate_size" in config and "hidden_size" in config:
        found["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    return found


def _vit_settings(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of a ViT or Dinov2 from its config.json."""
    is_dinov2 = config["model_type"].startswith("dinov2")
    is_gated = bool(config.get("use_swiglu_ffn"))
    activation = config.get("hidden_act", "gelu")
    if not is_gated and (not isinstance(activation, str) or activation not in clip.ACTIVATIONS):
        raise ValueError(f"{path}: hidden_act {brief(activation)} is none of {', '.join(clip.ACTIVATIONS)}.")
    found = shape_of(config)
    if is_dinov2 and "mlp_ratio" in config:
        found["mlp_ratio"] = float(config["mlp_ratio"])
    has_registers = config["model_type"] == "dinov2_with_registers"
    return found | ALWAYS | {
        "norm_eps": config["layer_norm_eps"], "image_size": config["image_size"],
        "mlp": "swiglu" if is_gated else clip.ACTIVATIONS[activation], "layer_scale": 1.0 if is_dinov2 else None,
        "registers": config.get("num_register_tokens", 4) if has_registers else 0,
        "interpolate_antialias": has_registers,
    }  # fmt: skip


def _dinov3_settings(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of a DINOv3ViT from its config.json."""
    is_gated = config.get("use_gated_mlp", False)
    activation, base = config.get("hidden_act", "gelu"), config.get("rope_theta", dinov3.BASE)
    if activation != ("silu" if is_gated else "gelu"):
        raise ValueError(
            f"{path}: hidden_act {brief(activation)} with use_gated_mlp {brief(is_gated)}: this encoder has gelu, or "
            "gates by silu, so it cannot be held."
        )
    if base != dinov3.BASE:
        raise ValueError(f"{path}: rope_theta {brief(base)}: this encoder's is {dinov3.BASE:g}, so it cannot be held.")
    found, biases = shape_of(config), _dinov3_biases(config)
    if is_gated and "mlp_ratio" in found:
        found["mlp_ratio"] *= 1.5
    return found | ALWAYS | dinov3.ALWAYS | {
        "norm_eps": config.get("layer_norm_eps", dinov3.NORM_EPS),
        "image_size": config.get("image_size", dinov3.IMAGE_SIZE),
        "mlp": "swiglu" if is_gated else "gelu", "layer_scale": 1.0, "registers": config.get("num_register_tokens", 0),
        "bias": any(biases.values()), "key_bias": biases["key_bias"], "mask_token": True,
    }  # fmt: skip


def _dinov3_biases(config: dict[str, Any]) -> dict[str, Any]:
    """Keys of a DINOv3ViT's biases -> whether it has them."""
    return {key: config.get(key, key != "key_bias") for key in dinov3.BIASES}


def _with_dinov3_biases(
    state: dict[str, Tensor], config: dict[str, Any], path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """Check the biases against config.json, and add zeros for those left out unless all are: here are all or none."""
    stated, zeros = _dinov3_biases(config), dict[str, Tensor]()
    for key, has_biases in stated.items():
        weights = tuple(f"{module}.weight" for module in dinov3.BIASES[key])
        biases = {f"{name.removesuffix('weight')}bias": state[name] for name in state if name.endswith(weights)}
        if wrong := [name for name in biases if (name in state) is not has_biases]:
            have = "have no" if has_biases else "have"
            raise ValueError(f"{path}: states {key}: {brief(has_biases)}, but its weights {have} {wrong[0]}.")
        if not has_biases:
            zeros |= {name: weight.new_zeros(len(weight)) for name, weight in biases.items()}
    if not any(stated.values()):
        return state
    if absent := [key for key in stated if not stated[key] and key != "key_bias"]:
        notes.append(f"biases: {', '.join(absent)}: false in config.json; they are zero, as other layers have theirs.")
    return state | zeros


def _imagegpt_settings(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of an ImageGPT from its config.json."""
    activation = config.get("activation_function", "quick_gelu")
    if activation != "quick_gelu":
        raise ValueError(f"{path}: activation_function {activation} is not quick_gelu, so it cannot be held.")
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(key, usual) is not usual:
            raise ValueError(
                f"{path}: {key} {brief(config[key])}: scores are scaled differently here, so it cannot be held."
            )
    found = {ours: config[theirs] for theirs, ours in IMAGEGPT_SHAPE.items() if theirs in config}
    if "n_embd" in config:
        found["mlp_ratio"] = (config.get("n_inner") or 4 * config["n_embd"]) / config["n_embd"]
    if "n_positions" in config and math.isqrt(config["n_positions"]) ** 2 == config["n_positions"]:
        found["image_size"] = math.isqrt(config["n_positions"])
    return found | {"norm_eps": config.get("layer_norm_epsilon", 1e-5), "bias": True}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({error}). Is the download complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not settings.")
    return content

"""Preprocessing of released models: read from their files, or known from their papers and code.

An encoder's settings store it as mean, std, interpolation, crop_mode and crop_fraction. Differences from a library's
preprocessing become notes for the user. transformers_processor.py reads the processors of transformers.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, TypeGuard

from sslvit.files import brief, printable, quoted
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import crop_words

PREPROCESSING = ("mean", "std", "interpolation", "crop_mode", "crop_fraction")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
MIDDLE: dict[str, Any] = {"crop_mode": "center", "crop_fraction": 0.875}  # 224 of 256
UNCROPPED: dict[str, Any] = {"crop_mode": "center", "crop_fraction": 1.0}
SQUASHED: dict[str, Any] = {"crop_mode": "squash", "crop_fraction": 1.0}
RELEASED: dict[str, dict[str, Any]] = {  # as in the authors' evaluation of the released models
    "mae": {**IMAGENET, "interpolation": "bicubic", **MIDDLE},
    "dino": {**IMAGENET, "interpolation": "bicubic", **MIDDLE},
    "dinov2": {**IMAGENET, "interpolation": "bicubic", **MIDDLE},
    "dinov3": {**IMAGENET, "interpolation": "bilinear", **SQUASHED},
    "vit": {**HALF, "interpolation": "bilinear", **SQUASHED},  # transformers' ViT
    "clip": {**CLIP, "interpolation": "bicubic", **UNCROPPED},
    "siglip": {**HALF, "interpolation": "bicubic", **SQUASHED},
    "augreg": {**HALF, "interpolation": "bicubic", "crop_mode": "center", "crop_fraction": 0.9},
}
AUTHORS = {"mae": "MAE", "dino": "DINO", "dinov2": "DINOv2", "dinov3": "DINOv3"}
SATELLITE, SATELLITE_IMAGES = "sat493m", {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}  # of DINOv3
MIN_UNCROPPED_AUGREG = 384  # image size from which timm evaluates augreg models without a crop
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
TIMM_NAME = re.compile(r"^(flexi)?(vit|deit3?)_\w+")
TIMM_CROP_PCT = 0.875  # timm's default


def describe_preprocessing(found: dict[str, Any]) -> str:
    """Preprocessing settings in one line."""
    texts = [f"{key} {', '.join(f'{value:.4g}' for value in found[key])}" for key in ("mean", "std") if key in found]
    texts += [found[key] for key in ("interpolation",) if key in found]
    if "crop_mode" in found or "crop_fraction" in found:
        texts.append(crop_words(found.get("crop_mode", "center"), found.get("crop_fraction", 1.0)))
    return "; ".join(texts)


def released_preprocessing(family: str, channels: int) -> dict[str, Any]:
    """The preprocessing in the authors' evaluation of a family; without mean and std unless there are 3 channels."""
    return {key: value for key, value in RELEASED[family].items() if channels == 3 or key not in ("mean", "std")}


def assume_preprocessing(family: str, channels: int, changes: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`released_preprocessing`, without settings given by the user; appends a note on it."""
    found = {key: value for key, value in released_preprocessing(family, channels).items() if key not in changes}
    if found:
        text = describe_preprocessing(found)
        notes.append(f"preprocessing: not in the file; as in {AUTHORS[family]}'s own evaluation: {text}.")
    return found


def guess_from_file_name(
    source: str, channels: int, image_size: int, changes: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Guess preprocessing from a path that may contain the name of a timm model; also returns a note on its origin."""
    origin, found = "", dict[str, Any]()
    for name in reversed(Path(source).parts):
        name = re.sub(r"\.(pth|pt|bin|safetensors|npz|ckpt|tar)$", "", name)
        if TIMM_NAME.match(name) and (config := _config_of_timm(name)):
            found, _ = from_timm(config, [image_size, image_size], name)
            origin = f"as timm's {printable(name, 60)}"
        elif "augreg" in name:
            found, origin = dict(RELEASED["augreg"]), "as timm's augreg models"
            found["crop_fraction"] = 1.0 if image_size >= MIN_UNCROPPED_AUGREG else found["crop_fraction"]
        if found:
            break
    if not found:
        default = EncoderSettings(channels=channels)
        found, origin = {key: getattr(default, key) for key in PREPROCESSING}, "assumed"
    misfit = {key for key in ("mean", "std") if len(found.get(key, [])) != channels}
    found = {key: value for key, value in found.items() if key not in changes and key not in misfit}
    if not found:
        return {}, ""
    more = (
        " If that is wrong, give mean=, std=, interpolation=, crop_fraction= in Python." if origin == "assumed" else ""
    )
    return found, f"preprocessing: not in the file; {origin}: {describe_preprocessing(found)}.{more}"


def _config_of_timm(name: str) -> dict[str, Any] | None:
    """The pretrained_cfg of a timm model; None if timm is not installed or does not know the name."""
    try:
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(name)
    except (ImportError, RuntimeError):
        return None
    return config.to_dict() if config is not None and "." in name else None


def from_timm(config: dict[str, Any], image_size: list[int], name: str) -> tuple[dict[str, Any], list[str]]:
    """Settings and notes from timm's pretrained_cfg."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    for key in ("mean", "std"):
        values = config.get(key)
        if not isinstance(values, (list, tuple)) or not all(is_number(value) for value in values):
            raise ValueError(f"timm:{name}: states no {key} of its images (pretrained_cfg: {brief(values)}).")
        found[key] = [float(value) for value in values]
    found["interpolation"] = config.get("interpolation") or "bicubic"
    if found["interpolation"] not in INTERPOLATIONS.values():
        notes.append(f"preprocessing: timm resizes by {quoted(found['interpolation'])}; bicubic is used here.")
        found["interpolation"] = "bicubic"
    crop_pct = config.get("crop_pct") or TIMM_CROP_PCT
    if not is_number(crop_pct) or not crop_pct > 0:
        raise ValueError(f"timm:{name}: crop_pct {brief(crop_pct)} is not a number above 0.")
    mode = config.get("crop_mode") or "center"
    resized = [math.floor(side / crop_pct) for side in image_size]
    if mode not in ("center", "squash") or crop_pct > 1:
        notes.append(
            f"preprocessing: timm pads images (crop_mode {quoted(mode)}, crop_pct {crop_pct:g}), which is not done "
            f"here; {crop_words('center', 1.0)} is used."
        )
        return found | UNCROPPED, notes
    # timm rounds the resized image down to whole pixels, so it keeps slightly more than crop_pct
    fraction = min(1.0, *(side / whole for side, whole in zip(image_size, resized, strict=True)))
    return found | {"crop_mode": mode, "crop_fraction": fraction}, notes


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

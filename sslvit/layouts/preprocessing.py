"""How images reach released models: what their processors say, and what is known where no file says it.

An encoder's settings hold it as mean, std, interpolation, crop_mode and crop_fraction. What a processor does otherwise
becomes a note for the reader.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from sslvit.files import brief, printable, quoted
from sslvit.settings import EncoderSettings
from sslvit.settings.encoder import crop_words

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
MIDDLE = {"crop_mode": "center", "crop_fraction": 0.875}  # 224 of 256
WHOLE = {"crop_mode": "center", "crop_fraction": 1.0}
SQUASHED = {"crop_mode": "squash", "crop_fraction": 1.0}
RELEASED = {  # as the released models are evaluated by those who released them
    "mae": {**IMAGENET, "interpolation": "bicubic", **MIDDLE},
    "dino": {**IMAGENET, "interpolation": "bicubic", **MIDDLE},
    "dinov2": {**IMAGENET, "interpolation": "bicubic", **MIDDLE},
    "vit": {**HALF, "interpolation": "bilinear", **SQUASHED},  # transformers' ViT
    "augreg": {**HALF, "interpolation": "bicubic", "crop_mode": "center", "crop_fraction": 0.9},
}
LARGE = 384  # pixels from which on timm evaluates augreg's models without a crop
# what transformers' processors do where their file does not say it
PROCESSORS = {
    "ViT": {**HALF, "resample": 2, "size": {"height": 224, "width": 224}, "is_cropped": False, "is_square": True},
    "Bit": {**CLIP, "resample": 3, "size": {"shortest_edge": 224}, "is_cropped": True, "is_square": False},
    "ImageGPT": {**HALF, "resample": 2, "size": {"height": 256, "width": 256}, "is_cropped": False, "is_square": True},
}
OF_MODEL = {"vit": "ViT", "dinov2": "Bit", "dinov2_with_registers": "Bit", "imagegpt": "ImageGPT"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
TIMM_NAME = re.compile(r"^(flexi)?(vit|deit3?)_\w+")
TIMM_FRACTION = 0.875  # where a model of timm's says none


def resized_sides(settings: EncoderSettings) -> list[int]:
    """Sides that a library resizes to before it keeps the middle: whole pixels, an even number more than are kept.

    With an odd number the middle would lie between two pixels, and a library would shift it by half of one.
    """
    return [side + 2 * round((side / settings.crop_fraction - side) / 2) for side in settings.image_size]


def fraction_held(settings: EncoderSettings) -> float:
    """The crop's fraction in a library that resizes to whole pixels."""
    return settings.image_size[0] / resized_sides(settings)[0]


def words(found: dict[str, Any]) -> str:
    """Settings of preprocessing in one line."""
    said = [f"{key} {', '.join(f'{value:.4g}' for value in found[key])}" for key in ("mean", "std") if key in found] + [
        found[key] for key in ("interpolation",) if key in found
    ]
    if "crop_mode" in found or "crop_fraction" in found:
        said.append(crop_words(found.get("crop_mode", "center"), found.get("crop_fraction", 1.0)))
    return "; ".join(said)


def released(family: str, channels: int) -> dict[str, Any]:
    """How the released models of a family are evaluated; without mean and deviation for other channels than theirs."""
    found = RELEASED[family]
    return {key: value for key, value in found.items() if channels == 3 or key not in ("mean", "std")}


def assumed(family: str, channels: int, who: str, changes: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`released`, less what the user says, with a line on it in the notes."""
    found = {key: value for key, value in released(family, channels).items() if key not in changes}
    if found:
        notes.append(f"preprocessing: not in the file; as in {who}: {words(found)}.")
    return found


def by_file_name(source: str, channels: int, image_size: int, changes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Preprocessing of weights in timm's names, and a line on where it was taken from.

    Args:
        source: path of the file, which may name one of timm's models.
        channels: of its images.
        image_size: the longer side that its positions are for.
        changes: what the user says.
    """
    place, found = "", {}
    for part in reversed(Path(source).parts):
        name = re.sub(r"\.(pth|pt|bin|safetensors|npz|ckpt|tar)$", "", part)
        if TIMM_NAME.match(name) and (config := _config_of_timm(name)):
            found, _ = from_timm(config, [image_size, image_size], name)
            place = f"as timm's {printable(name, 60)}"
        elif "augreg" in name:
            found, place = dict(RELEASED["augreg"]), "as timm's augreg models"
            found["crop_fraction"] = 1.0 if image_size >= LARGE else found["crop_fraction"]
        if found:
            break
    if not found:
        default = EncoderSettings(channels=channels)
        keys = ("mean", "std", "interpolation", "crop_mode", "crop_fraction")
        found, place = {key: getattr(default, key) for key in keys}, "assumed"
    is_other = {key for key in ("mean", "std") if len(found.get(key, [])) != channels}
    found = {key: value for key, value in found.items() if key not in changes and key not in is_other}
    more = " Give mean=, std=, interpolation=, crop_fraction= in Python if it is not so." if place == "assumed" else ""
    return found, f"preprocessing: not in the file; {place}: {words(found)}.{more}" if found else ""


def _config_of_timm(name: str) -> dict[str, Any] | None:
    """How timm feeds one of its pretrained models, where timm is installed and knows the name."""
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return None
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:
        return None
    return config.to_dict() if config is not None and "." in name else None


def from_timm(config: dict[str, Any], image_size: list[int], name: str) -> tuple[dict[str, Any], list[str]]:
    """Settings and notes from timm's pretrained_cfg.

    Raises:
        ValueError: it says no mean or deviation, or a crop that is none.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    for key in ("mean", "std"):
        values = config.get(key)
        if not isinstance(values, (list, tuple)) or not all(_is_number(value) for value in values):
            raise ValueError(f"timm:{name}: says no {key} of its images (pretrained_cfg: {brief(values)}).")
        found[key] = [float(value) for value in values]
    found["interpolation"] = config.get("interpolation") or "bicubic"
    if found["interpolation"] not in RESAMPLE.values():
        notes.append(f"preprocessing: timm resizes by {quoted(found['interpolation'])}; bicubic is used here.")
        found["interpolation"] = "bicubic"
    share = config.get("crop_pct") or TIMM_FRACTION
    if not _is_number(share) or not share > 0:
        raise ValueError(f"timm:{name}: crop_pct {brief(share)} is not a number above 0.")
    mode = config.get("crop_mode") or "center"
    resized = [math.floor(side / share) for side in image_size]
    if mode not in ("center", "squash") or share > 1:
        notes.append(
            f"preprocessing: timm pads images (crop_mode {quoted(mode)}, crop_pct {share:g}), which is not done here; "
            f"{crop_words('center', 1.0)} is used."
        )
        return found | WHOLE, notes
    # timm resizes to whole pixels, so what it keeps is a little more than it says
    fraction = min(1.0, *(side / whole for side, whole in zip(image_size, resized, strict=True)))
    return found | {"crop_mode": mode, "crop_fraction": fraction}, notes


def from_transformers(
    content: dict[str, Any] | None, model: str, channels: int, image_size: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """Settings and notes from preprocessor_config.json; where it does not say something, its processor's own start.

    Args:
        content: of the file; None if there is none.
        model: model_type of the folder.
        channels: of its images.
        image_size: height and width that its positions are for.
    """
    if content is None:
        family = "vit" if model in ("vit", "imagegpt") else "dinov2"
        found = released(family, channels)
        who = "transformers' ViT" if family == "vit" else "the released DINOv2 models"
        return found, [f"preprocessing: no preprocessor_config.json there; as in {who}: {words(found)}."]
    named = content.get("image_processor_type") or content.get("feature_extractor_type") or ""
    kinds = [kind for kind in PROCESSORS if isinstance(named, str) and named.startswith(kind)]
    start = PROCESSORS[kinds[0] if kinds else OF_MODEL[model]]
    notes = [] if kinds or not named else [f"preprocessing: {quoted(named)} is unknown; read as of {OF_MODEL[model]}."]
    found, odd = _normalization(content, start, channels)
    number = content.get("resample", start["resample"])
    found["interpolation"] = RESAMPLE.get(number, "bicubic")
    if number not in RESAMPLE:
        notes.append(f"preprocessing: resample {brief(number)} is not bilinear or bicubic; bicubic is used.")
    crop, more = _framing(content, start, image_size)
    return found | crop, notes + odd + more


def _normalization(content: dict[str, Any], start: dict[str, Any], channels: int) -> tuple[dict[str, Any], list[str]]:
    """Mean and deviation of pixels in [0, 1], whatever a processor scales them by."""
    mean, std = (content.get(f"image_{key}") or (start[key] if channels == 3 else [0.5] * channels)
                 for key in ("mean", "std"))  # fmt: skip
    if content.get("do_normalize", True) is False:
        mean, std = [0.0] * channels, [1.0] * channels
    mean, std = ([value] * channels if _is_number(value) else value for value in (mean, std))
    factor = 1.0 if content.get("do_rescale", True) is False else content.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not factor > 0:
        raise ValueError(f"rescale_factor {brief(factor)} is not a number above 0")
    scale = 255 * factor
    if abs(scale - 1) < 1e-3:
        return {"mean": list(mean), "std": list(std)}, []
    note = f"preprocessing: its pixels are scaled to 0 to {scale:g}; mean and std are those of pixels from 0 to 1."
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}, [note]


def _framing(content: dict[str, Any], start: dict[str, Any], image_size: list[int]) -> tuple[dict[str, Any], list[str]]:
    """Which part of an image a processor keeps."""
    height, width = image_size
    is_cropped = content.get("do_center_crop", start["is_cropped"] or "crop_size" in content) is not False
    crop = _sides(content.get("crop_size", 224 if "size" not in content else None)) if is_cropped else None
    if content.get("do_resize", True) is False:
        return WHOLE, [
            "preprocessing: there images are not resized; here the largest centered box is resized to "
            f"{height} x {width}."
        ]
    size = content.get("size", start["size"])
    if _is_number(size):
        size = {"height": size, "width": size} if start["is_square"] and not crop else {"shortest_edge": size}
    size = size if isinstance(size, dict) else {}
    edge, squashed = size.get("shortest_edge"), _sides(size)
    says_size = "size" in content or "crop_size" in content
    if edge and not crop:
        return WHOLE, [
            f"preprocessing: there the shorter side is resized to {brief(edge)} and nothing is cut; here the largest "
            f"centered box is resized to {height} x {width}."
        ]
    if edge and crop and not (size.get("longest_edge") or crop[0] != crop[1] or edge < crop[0]):
        return {"crop_mode": "center", "crop_fraction": crop[0] / edge}, _other_size(crop, image_size, says_size)
    if squashed and (crop is None or (crop[0] <= squashed[0] and crop[0] * squashed[1] == crop[1] * squashed[0])):
        fraction = 1.0 if crop is None else crop[0] / squashed[0]
        found = {"crop_mode": "squash", "crop_fraction": fraction}
        return found, _other_size(crop or squashed, image_size, says_size)
    return WHOLE, [
        f"preprocessing: there images are resized to {brief(size)} and cropped to {brief(content.get('crop_size'))}, "
        f"which is not done here; the largest centered box is resized to {height} x {width}."
    ]


def _other_size(made: tuple[int, int], image_size: list[int], says_size: bool) -> list[str]:
    if not says_size or list(made) == image_size:
        return []
    height, width = image_size
    return [
        f"preprocessing: its processor makes images of {made[0]} x {made[1]}, and its positions are for "
        f"{height} x {width}; here images are {height} x {width}."
    ]


def _sides(value: Any) -> tuple[int, int] | None:
    """Height and width, of a number or a record of both."""
    if _is_number(value):
        return value, value
    if isinstance(value, dict) and _is_number(value.get("height")) and _is_number(value.get("width")):
        return value["height"], value["width"]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

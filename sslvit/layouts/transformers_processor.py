"""Read preprocessing from the files of transformers' image processors (preprocessor_config.json)."""

from __future__ import annotations

from typing import Any

from sslvit.files import brief, quoted
from sslvit.layouts.preprocessing import (
    CLIP,
    HALF,
    IMAGENET,
    INTERPOLATIONS,
    UNCROPPED,
    describe_preprocessing,
    is_number,
    released_preprocessing,
)

# transformers' defaults
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {**HALF, "resample": 2, "size": {"height": 224, "width": 224}, "is_cropped": False},
    "Bit": {**CLIP, "resample": 3, "size": {"shortest_edge": 224}, "is_cropped": True},
    "CLIP": {**CLIP, "resample": 3, "size": {"shortest_edge": 224}, "is_cropped": True},
    "Siglip": {**HALF, "resample": 3, "size": {"height": 224, "width": 224}, "is_cropped": False},
    "DeiT": {**HALF, "resample": 3, "size": {"height": 256, "width": 256}, "is_cropped": True},
    "DINOv3ViT": {**IMAGENET, "resample": 2, "size": {"height": 224, "width": 224}, "is_cropped": False},
    "ImageGPT": {**HALF, "resample": 2, "size": {"height": 256, "width": 256}, "is_cropped": False},
}
PROCESSOR_OF = {"vit": "ViT", "vit_mae": "ViT", "dinov2": "Bit", "dinov2_with_registers": "Bit", "imagegpt": "ImageGPT",
                "dinov3_vit": "DINOv3ViT", "vit_msn": "ViT", "ijepa": "ViT", "deit": "DeiT",
                "clip_vision_model": "CLIP", "siglip_vision_model": "Siglip"}  # fmt: skip

FAMILY_OF = {"vit": ("vit", "transformers' ViT"), "imagegpt": ("vit", "transformers' ViT"),
             "vit_mae": ("mae", "MAE's own evaluation"), "vit_msn": ("mae", "MAE's own evaluation"),
             "ijepa": ("mae", "MAE's own evaluation"), "deit": ("mae", "DeiT's own evaluation"),
             "dinov3_vit": ("dinov3", "the released DINOv3 models"),
             "clip_vision_model": ("clip", "CLIP's own evaluation"),
             "siglip_vision_model": ("siglip", "the released SigLIP models")}  # fmt: skip
"""Model -> family with the preprocessing to assume without a processor's file, and its name in messages."""


def from_transformers(
    content: dict[str, Any] | None, model: str, channels: int, image_size: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """Settings and notes from a preprocessor_config.json (None if missing), with the defaults of its processor."""
    if content is None:
        family, who = FAMILY_OF.get(model, ("dinov2", "the released DINOv2 models"))
        found = released_preprocessing(family, channels)
        return found, [
            f"preprocessing: no preprocessor_config.json there; as in {who}: {describe_preprocessing(found)}."
        ]
    named = content.get("image_processor_type") or content.get("feature_extractor_type") or ""
    kinds = [kind for kind in PROCESSORS if isinstance(named, str) and named.startswith(kind)]
    defaults = PROCESSORS[kinds[0] if kinds else PROCESSOR_OF[model]]
    notes = (
        [] if kinds or not named else [f"preprocessing: {quoted(named)} is unknown; read as of {PROCESSOR_OF[model]}."]
    )
    found, unusual = _normalization(content, defaults, channels)
    number = content.get("resample", defaults["resample"])
    found["interpolation"] = INTERPOLATIONS.get(number, "bicubic")
    if number not in INTERPOLATIONS:
        notes.append(f"preprocessing: resample {brief(number)} is not bilinear or bicubic; bicubic is used.")
    crop, more = _crop(content, defaults, image_size)
    return found | crop, notes + unusual + more


def _normalization(
    content: dict[str, Any], defaults: dict[str, Any], channels: int
) -> tuple[dict[str, Any], list[str]]:
    """Mean and standard deviation for pixels in [0, 1], for any scaling by the processor."""
    mean, std = (content.get(f"image_{key}") or (defaults[key] if channels == 3 else [0.5] * channels)
                 for key in ("mean", "std"))  # fmt: skip
    if content.get("do_normalize", True) is False:
        mean, std = [0.0] * channels, [1.0] * channels
    mean, std = ([value] * channels if is_number(value) else value for value in (mean, std))
    factor = 1.0 if content.get("do_rescale", True) is False else content.get("rescale_factor", 1 / 255)
    if not is_number(factor) or not factor > 0:
        raise ValueError(f"rescale_factor {brief(factor)} is not a number above 0")
    scale = 255 * factor
    if abs(scale - 1) < 1e-3:
        return {"mean": list(mean), "std": list(std)}, []
    note = f"preprocessing: its pixels are scaled to 0 to {scale:g}; mean and std are those of pixels from 0 to 1."
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}, [note]


def _crop(content: dict[str, Any], defaults: dict[str, Any], image_size: list[int]) -> tuple[dict[str, Any], list[str]]:
    """The part of an image that a processor keeps."""
    height, width = image_size
    is_cropped = content.get("do_center_crop", defaults["is_cropped"] or "crop_size" in content) is not False
    crop = _height_and_width(content.get("crop_size", 224 if "size" not in content else None)) if is_cropped else None
    if content.get("do_resize", True) is False:
        return UNCROPPED, [
            "preprocessing: there images are not resized; here the largest centered box is resized to "
            f"{height} x {width}."
        ]
    size = content.get("size", defaults["size"])
    if is_number(size):
        is_square = "height" in defaults["size"] and (not crop or defaults["is_cropped"])
        size = {"height": size, "width": size} if is_square else {"shortest_edge": size}
    size = size if isinstance(size, dict) else {}
    edge, squashed = size.get("shortest_edge"), _height_and_width(size)
    states_size = "size" in content or "crop_size" in content
    if edge and not crop:
        return UNCROPPED, [
            f"preprocessing: there the shorter side is resized to {brief(edge)} and nothing is cut; here the largest "
            f"centered box is resized to {height} x {width}."
        ]
    if edge and crop and not (size.get("longest_edge") or crop[0] != crop[1] or edge < crop[0]):
        return {"crop_mode": "center", "crop_fraction": crop[0] / edge}, _size_mismatch(crop, image_size, states_size)
    if squashed and (crop is None or (crop[0] <= squashed[0] and crop[0] * squashed[1] == crop[1] * squashed[0])):
        fraction = 1.0 if crop is None else crop[0] / squashed[0]
        found = {"crop_mode": "squash", "crop_fraction": fraction}
        return found, _size_mismatch(crop or squashed, image_size, states_size)
    return UNCROPPED, [
        f"preprocessing: there images are resized to {brief(size)} and cropped to {brief(content.get('crop_size'))}, "
        f"which is not done here; the largest centered box is resized to {height} x {width}."
    ]


def _size_mismatch(processed: tuple[float, float], image_size: list[int], states_size: bool) -> list[str]:
    if not states_size or list(processed) == image_size:
        return []
    height, width = image_size
    return [
        f"preprocessing: its processor makes images of {processed[0]} x {processed[1]}, and its positions are for "
        f"{height} x {width}; here images are {height} x {width}."
    ]


def _height_and_width(value: Any) -> tuple[float, float] | None:
    """Height and width, from a number or a dict with both."""
    if is_number(value):
        return value, value
    if isinstance(value, dict) and is_number(value.get("height")) and is_number(value.get("width")):
        return value["height"], value["width"]
    return None

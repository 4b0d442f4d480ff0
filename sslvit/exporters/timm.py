"""timm: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

config.json         architecture, its arguments and the preprocessing
model.safetensors   the weights, under timm's names
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn

from sslvit.environment import require_packages
from sslvit.exporters import plain_vit
from sslvit.exporters.cropping import IMAGE_CHANNELS, open_snippet, resized_sides, zeros_snippet
from sslvit.exporters.exported import Exported, save_tensors
from sslvit.layouts.dinov3 import NORM_EPS, to_timm
from sslvit.layouts.timm import from_sslvit
from sslvit.settings import EncoderSettings

ARCHITECTURE = "vit_base_patch16_224"  # any plain ViT: the arguments below override all of its own
DINOV3 = "vit_small_patch16_dinov3_qkvb"  # likewise; has biases of queries and values, which may be zero


def check(exported: Exported, size: str | None) -> bool:
    """Whether the export takes images of one size only; refuses encoders that timm's plain ViT does not support."""
    model_arguments(exported)
    is_fixed = plain_vit.is_fixed_size("timm", size, plain_vit.resampling_difference(exported.settings, antialias=True))
    require_packages("--format timm", "sslvit[timm]", "timm")
    return is_fixed


def model_arguments(exported: Exported) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer, or of its Eva for DINOv3; refuses all options that it does not support."""
    settings, outputs = exported.settings, exported.outputs
    is_pooled = outputs != "tokens"
    fc_norm = settings.fc_norm and is_pooled
    of_class: dict[str, Any]
    if plain_vit.is_dinov3(settings):
        plain_vit.refuse_options("timm's DINOv3", {
            **plain_vit.unsupported_options(settings, outputs),
            f"norm_eps: {settings.norm_eps:g}": settings.norm_eps != NORM_EPS,
            f"mlp: {settings.mlp}": settings.mlp not in ("gelu", "swiglu"),
            "bias: false": not settings.bias,
            "key_bias: true": settings.key_bias,
        })  # fmt: skip
        of_class = {
            "swiglu_mlp": settings.mlp == "swiglu", "swiglu_align_to": 8, "num_reg_tokens": settings.registers,
            "use_fc_norm": fc_norm, "use_post_transformer_norm": settings.final_norm,
        }  # fmt: skip
    else:
        plain_vit.refuse_options("timm's VisionTransformer", {
            **plain_vit.unsupported_options(settings, outputs),
            f"norm_eps: {settings.norm_eps:g}": settings.norm_eps != 1e-6,
            f"mlp: {settings.mlp}": settings.mlp != "gelu",
            "both final_norm and fc_norm": settings.final_norm and fc_norm,
        })  # fmt: skip
        of_class = {
            "qkv_bias": settings.bias, "proj_bias": settings.bias, "reg_tokens": settings.registers,
            "no_embed_class": prefix_rows(settings) < max(settings.prefix, 1),
            "pos_embed": "none" if settings.pos_embed == "none" else "learn",
            "fc_norm": fc_norm, "final_norm": settings.final_norm or fc_norm,  # its one norm, before or after pooling
        }  # fmt: skip
    return {
        "img_size": list(settings.size), "patch_size": settings.patch, "in_chans": settings.channels,
        "embed_dim": settings.width, "depth": settings.depth, "num_heads": settings.heads,
        "mlp_ratio": exact_ratio(settings.width, settings.mlp_width), "qk_norm": settings.qk_norm,
        # 0 would mean no LayerScale there; the values come from the file
        "init_values": 1.0 if settings.layer_scale == 0 else settings.layer_scale,
        "class_token": settings.class_token, "dynamic_img_size": True,
        "global_pool": {"class": "token", "mean": "avg"}[settings.pooling] if is_pooled else "",
        "num_classes": 0 if exported.head is None else exported.head.out_features, **of_class,
    }  # fmt: skip


def exact_ratio(width: int, hidden: int) -> float:
    """A ratio that yields the hidden width when timm truncates its product with the width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def prefix_rows(settings: EncoderSettings) -> int:
    """Rows for prefix tokens in the position table: timm has them for all prefix tokens or for none."""
    return settings.prefix if settings.position_rows == settings.prefix else 0


def write(exported: Exported, folder: Path, is_fixed: bool) -> None:
    """Write config.json and model.safetensors."""
    settings = exported.settings
    arguments = {**model_arguments(exported), "dynamic_img_size": not is_fixed}
    save_tensors(tensors_of(exported), folder)
    config = {
        "architecture": DINOV3 if plain_vit.is_dinov3(settings) else ARCHITECTURE,
        "num_classes": arguments["num_classes"],
        "num_features": settings.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [settings.channels, *settings.size], "fixed_input_size": is_fixed,
            "interpolation": settings.interpolation, "crop_pct": crop_pct(settings),
            "crop_mode": settings.crop_mode, "mean": settings.mean, "std": settings.std,
            "num_classes": arguments["num_classes"], "pool_size": None, "first_conv": "patch_embed.proj",
            "classifier": "head", **({"label_names": exported.classes} if exported.classes else {}),
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def tensors_of(exported: Exported) -> dict[str, Tensor]:
    """All exported tensors, under timm's names."""
    classifier = {} if exported.head is None else {f"head.{k}": v for k, v in exported.head.state_dict().items()}
    rows = prefix_rows(exported.settings)
    state = plain_vit.state_with_table(exported.encoder, rows, exported.outputs)
    return to_timm(state) | classifier if plain_vit.is_dinov3(exported.settings) else from_sslvit(state, classifier)


def crop_pct(settings: EncoderSettings) -> float:
    """A fraction that makes timm, which truncates side / fraction to whole pixels, resize to the intended sides."""
    side, resized = settings.size[0], resized_sides(settings)[0]
    fraction = settings.crop_fraction if math.floor(side / settings.crop_fraction) == resized else side / resized
    while math.floor(side / fraction) < resized:
        fraction = math.nextafter(fraction, 0.0)
    return fraction


def reopen(folder: Path, exported: Exported) -> nn.Module:
    """Load the model in timm."""
    return open_model(folder)


def open_model(folder: Path) -> nn.Module:
    """Load the model in timm."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def weights(folder: Path, exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expected tensors, and the tensors in timm's model."""
    return tensors_of(exported), open_model(folder).state_dict()


def preprocessing(folder: Path, exported: Exported) -> Callable[[Image], Tensor]:
    """timm's preprocessing of an image."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def usage(exported: Exported, is_fixed: bool) -> str:
    """Lines of Python that load and run the export."""
    if exported.settings.channels not in IMAGE_CHANNELS:
        return f"""import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()
images = {zeros_snippet(exported.settings)}
{exported.outputs} = model(images)"""
    return f"""import timm
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{open_snippet(exported.settings)}
{exported.outputs} = model(transform(image)[None])"""

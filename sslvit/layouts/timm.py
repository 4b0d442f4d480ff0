"""timm's VisionTransformer. Our names are timm's, so the weights pass through untouched."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslvit.environment import require_packages
from sslvit.files import printable, quoted
from sslvit.layouts.preprocessing import from_timm
from sslvit.layouts.vit import (
    HEADS,
    Converted,
    count_blocks,
    not_plain,
    refuse_if,
    resampling_other_than,
    settings_from_shapes,
    split,
)
from sslvit.models import ViTEncoder
from sslvit.progress import quiet_libraries
from sslvit.settings import EncoderSettings
from sslvit.weight_files import read_folder_weights

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of outputs that are about 1 in size
MODULES = ("vision_transformer", "deit")  # of timm, with plain vision transformers
MAX_PATCHES = 1 << 16  # of the images on which both are compared


def recognize(keys: set[str]) -> bool:
    return "patch_embed.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys


def to_sslvit(state: dict[str, Tensor], heads: int | None = None, **changes) -> Converted:
    """timm -> ours; the classifier is the extras."""
    notes: list[str] = []
    encoder, head = split(state, HEADS)
    return Converted(settings_from_shapes(encoder, heads, notes, **changes), encoder, head, notes)


def from_sslvit(encoder: dict[str, Tensor], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> timm; there is no mask token there."""
    return {key: value for key, value in encoder.items() if key != "mask_token"} | extras


def rows_kept(settings: EncoderSettings) -> int:
    """Rows of the position table in front of the patches' rows: timm has them for all prefix tokens or for none."""
    return settings.prefix if settings.position_rows == settings.prefix else 0


def model_arguments(settings: EncoderSettings, outputs: str = "features", classes: int = 0) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer for these settings.

    Args:
        settings: of the encoder.
        outputs: tokens, features or logits.
        classes: of the classifier, for logits.

    Raises:
        ValueError: timm's plain ViT cannot hold an option; all such options are named.
    """
    refuse_if("timm's VisionTransformer", {
        **not_plain(settings, outputs),
        f"norm_eps: {settings.norm_eps:g}": settings.norm_eps != 1e-6,
        f"mlp: {settings.mlp}": settings.mlp != "gelu",
        "both final_norm and fc_norm": settings.final_norm and settings.fc_norm and outputs != "tokens",
    })  # fmt: skip
    pooling = "" if outputs == "tokens" else {"class": "token", "mean": "avg"}[settings.pooling]
    fc_norm = settings.fc_norm and outputs != "tokens"
    return {
        "img_size": list(settings.image_size), "patch_size": settings.patch, "in_chans": settings.channels,
        "embed_dim": settings.width, "depth": settings.depth, "num_heads": settings.heads,
        "mlp_ratio": ratio_cut(settings.width, settings.mlp_width), "qk_norm": settings.qk_norm,
        "qkv_bias": settings.bias,
        "proj_bias": settings.bias, "init_values": settings.layer_scale, "class_token": settings.class_token,
        "reg_tokens": settings.registers, "no_embed_class": rows_kept(settings) < max(settings.prefix, 1),
        "pos_embed": "none" if settings.pos_embed == "none" else "learn",
        "global_pool": pooling, "num_classes": classes, "dynamic_img_size": True,
        "fc_norm": fc_norm, "final_norm": settings.final_norm or fc_norm,  # its one norm, behind the pooling or before
    }  # fmt: skip


def ratio_cut(width: int, hidden: int) -> float:
    """A ratio whose product with the width is the hidden width when timm cuts it to a whole number."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def resampling_differs(settings: EncoderSettings) -> str | None:
    """The setting for which timm gives other positions at other sizes, or None."""
    return resampling_other_than(settings, antialias=True)


def from_folder(path: Path, **changes) -> Converted | None:
    """A folder that timm opens (`sslvit export --format timm` writes such); None if it is none.

    Raises:
        ValueError: as from_name, or its settings describe another network than its weights.
    """
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or not {"architecture", "pretrained_cfg"} <= config.keys():
        return None
    weights = read_folder_weights(path)
    return _from_timm(f"local-dir:{path}", weights, **changes)


def from_name(name: str, **changes) -> Converted:
    """A pretrained model of timm's by its name; timm fetches the weights.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown name, weights that cannot be had, or a model that is no plain ViT, computes otherwise or
            pools in a way that the encoder does not have.
    """
    return _from_timm(name, None, **changes)


def _from_timm(name: str, weights: dict[str, Tensor] | None, **changes) -> Converted:
    """from_name, or, with its weights, from a folder, whose settings are compared with them before they are used."""
    _library(name)
    if weights is not None:
        _check_fits(name, weights)
    if weights is None:
        logger.info(f"timm:{name}: fetching its weights, unless they are in the hub's cache")
    model = _create(name, pretrained=True).eval()
    _check_plain(name, model)
    prepared, notes = from_timm(model.pretrained_cfg, list(model.patch_embed.img_size), name)
    pooling = pooling_of(name, model, changes, notes)
    found = {
        "image_size": list(model.patch_embed.img_size), "norm_eps": model.blocks[0].norm1.eps, "pooling": pooling,
        **prepared, **changes,
    }  # fmt: skip
    converted = to_sslvit(model.state_dict(), model.blocks[0].attn.num_heads, **found)
    converted.read = len(model.state_dict())
    converted.notes += notes
    if math.prod(converted.settings.grid) > MAX_PATCHES:
        raise ValueError(f"timm:{name}: images of {converted.settings.image_size} pixels are too large to be compared.")
    images = torch.randn(2, converted.settings.channels, *converted.settings.image_size)
    with torch.no_grad():
        ours = ViTEncoder(converted.settings).eval()
        if set(ours.state_dict()) != set(converted.encoder):
            odd = sorted(set(ours.state_dict()) ^ set(converted.encoder))[:4]
            raise ValueError(f"timm:{name}: has parts that a plain vision transformer has not ({', '.join(odd)}).")
        ours.load_state_dict(converted.encoder)
        difference = float((ours(images) - model.forward_features(images)).abs().max())
        if not difference < TOLERANCE:
            raise ValueError(f"timm:{name}: computes otherwise than a plain vision transformer (by {difference:.1e}).")
        if model.global_pool and "pooling" not in changes:
            difference = float((ours.features(images) - model(images)).abs().max())
    if not difference < TOLERANCE:
        raise ValueError(
            f"timm:{name}: its features are others than {converted.settings.pooling} pooling gives (by "
            f"{difference:.1e}). Give pooling= in Python to take it with another."
        )
    return converted


def pooling_of(name: str, model: nn.Module, changes: dict[str, Any], notes: list[str]) -> str:
    """Our name for how a model of timm's pools.

    Raises:
        ValueError: in a way that the encoder does not have, and the user names none.
    """
    known = {"token": "class", "avg": "mean"}
    if model.global_pool in known or "pooling" in changes:
        return known.get(model.global_pool, "mean")
    if model.global_pool:
        raise ValueError(
            f"timm:{name}: pools by {quoted(model.global_pool)} (global_pool), which is not done here. Give "
            "pooling=mean or pooling=class in Python to take it with another."
        )
    usual = "mean" if model.cls_token is None else "class"
    notes.append(f"pooling: it gives tokens and pools none; {usual} is used.")
    return usual


def _library(name: str):
    require_packages(f"timm:{name}", "sslvit[timm]", "timm")
    import timm

    return timm


def _create(name: str, pretrained: bool, **options) -> nn.Module:
    """A model of timm's without its classifier; whatever it raises in one line."""
    timm = _library(name)
    try:
        with quiet_libraries():
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # the hub raises almost anything when it cannot be reached
        near = timm.list_models(f"{name.split('.')[0][:12]}*", pretrained=True)[:3]
        reason = printable(str(error).splitlines()[0], 160) if str(error) else type(error).__name__
        raise ValueError(f"timm:{name}: {reason}.{f' Did you mean {near}?' if near else ''}") from error


def _check_plain(name: str, model: nn.Module) -> None:
    if not isinstance(model, _library(name).models.vision_transformer.VisionTransformer):
        raise ValueError(f"timm:{name}: a {type(model).__name__}, and only plain vision transformers can be probed.")


def _check_fits(name: str, weights: dict[str, Tensor]) -> None:
    """Refuse a folder whose settings describe another network than its weights, before memory is taken for it."""
    config = json.loads((Path(name.removeprefix("local-dir:")) / "config.json").read_text())
    arguments, architecture = config.get("model_args") or {}, config["architecture"]
    if not isinstance(architecture, str) or not _library(name).models.is_model_in_modules(architecture, MODULES):
        raise ValueError(
            f"timm:{name}: a {printable(architecture, 40)}, and only plain vision transformers can be probed."
        )
    depth = arguments.get("depth") if isinstance(arguments, dict) else None
    blocks = count_blocks(weights, "blocks.")
    if depth is not None and depth != blocks:
        raise ValueError(f"timm:{name}: says a depth of {printable(depth, 40)}, and its weights have {blocks} blocks.")
    with torch.device("meta"):
        model = _create(name, pretrained=False)
    _check_plain(name, model)
    for key, value in model.state_dict().items():
        there = tuple(weights[key].shape) if key in weights else "missing"
        is_table = key == "pos_embed" and key in weights and value.shape[1] <= MAX_PATCHES  # timm may stretch it
        if there != tuple(value.shape) and not is_table:
            raise ValueError(f"timm:{name}: says {tuple(value.shape)} for {key}, which is {there} among its weights.")

"""timm's pretrained models, by name or from a folder; our outputs are compared with timm's before they are accepted."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sslvit.environment import require_packages
from sslvit.files import printable, quoted
from sslvit.layouts import dinov3, transformers_folder
from sslvit.layouts import timm as plain_timm
from sslvit.layouts.hub import downloads_shown
from sslvit.layouts.preprocessing import from_timm
from sslvit.layouts.vit import Converted
from sslvit.models import ViTEncoder
from sslvit.settings.choices import near
from sslvit.weight_files import count_blocks, read_folder_weights

logger = logging.getLogger(__name__)

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}  # timm's classes -> our names
TOLERANCE = 1e-3  # for outputs with a magnitude of about 1
MODULES = ("vision_transformer", "deit", "eva")  # timm's modules with plain vision transformers and DINOv3
HTTP = ("httpx", "requests", "urllib3")  # libraries that may connect to the hub
MAX_PATCHES = 1 << 16  # of the images for the comparison


def from_folder(path: Path, **changes: Any) -> Converted | None:
    """Convert the model in a folder for timm, such as `sslvit export --format timm` writes; None for other folders."""
    config = transformers_folder.stated(path)
    if not {"architecture", "pretrained_cfg"} <= config.keys():
        return None
    name = f"local-dir:{path}"
    _check_fits(name, config, read_folder_weights(path))
    return _from_timm(name, changes)


def from_name(name: str, **changes: Any) -> Converted:
    """Convert a pretrained timm model by name; timm downloads the weights.

    Raises:
        ImportError: timm is not installed.
        ValueError: The name is unknown, the weights are unavailable, or the model is not a plain ViT, has other outputs
            or uses a kind of pooling that the encoder does not support.
    """
    _import_timm(name)
    logger.info(f"timm:{name}: downloading its weights, unless they are in the hub's cache")
    return _from_timm(name, changes)


def _from_timm(name: str, changes: dict[str, Any]) -> Converted:
    """Convert a model by its name in timm, or from a folder with local-dir:FOLDER as the name."""
    model = create(name, pretrained=True).eval()
    _check_plain(name, model)
    prepared, notes = from_timm(model.pretrained_cfg, list(model.patch_embed.img_size), name)
    pooling = _pooling(name, model.global_pool, model.cls_token is not None, changes, notes)
    state, mlp = model.state_dict(), _activation(model, notes)
    found = {
        "image_size": list(model.patch_embed.img_size), "norm_eps": model.blocks[0].norm1.eps, "pooling": pooling,
        **mlp, **prepared, **changes,
    }  # fmt: skip
    layout = dinov3 if dinov3.recognize(set(state)) else plain_timm
    try:
        converted = layout.to_sslvit(state, model.blocks[0].attn.num_heads, **found)
    except KeyError as error:  # timm has variants of DINOv3 with other attention
        raise ValueError(
            f"timm:{name}: differs from a plain vision transformer in {printable(error.args[0])}."
        ) from error
    converted.num_read = len(state)
    converted.notes += notes
    if math.prod(converted.settings.grid) > MAX_PATCHES:
        raise ValueError(f"timm:{name}: images of {converted.settings.image_size} pixels are too large to be compared.")
    images = torch.randn(2, converted.settings.channels, *converted.settings.size)
    with torch.no_grad():
        ours = ViTEncoder(converted.settings).eval()
        if set(ours.state_dict()) != set(converted.encoder):
            names = sorted(set(ours.state_dict()) ^ set(converted.encoder))[:4]
            raise ValueError(f"timm:{name}: differs from a plain vision transformer in {', '.join(names)}.")
        ours.load_state_dict(converted.encoder)
        difference = float((ours(images) - model.forward_features(images)).abs().max())
        if not difference < TOLERANCE:
            raise ValueError(f"timm:{name}: gives other outputs than a plain vision transformer (by {difference:.1e}).")
        if "dist_token" in state:
            converted.notes.append(
                "pooling: timm averages the class and the distillation token; the class token is used."
            )
        elif model.global_pool and "pooling" not in changes:
            difference = float((ours.features(images) - model(images)).abs().max())
    if not difference < TOLERANCE:
        raise ValueError(
            f"timm:{name}: its features differ from those of {converted.settings.pooling} pooling (by "
            f"{difference:.1e}). Give pooling= in Python to take it with another."
        )
    return converted


def _pooling(name: str, global_pool: str, has_class: bool, changes: dict[str, Any], notes: list[str]) -> str:
    """Our name for the pooling of a timm model."""
    known = {"token": "class", "avg": "mean", "map": "attention"}
    if global_pool in known or "pooling" in changes:
        return known.get(global_pool, "mean")
    if global_pool:
        raise ValueError(
            f"timm:{name}: pools by {quoted(global_pool)} (global_pool), which is not done here. Give "
            "pooling=mean or pooling=class in Python to take it with another."
        )
    usual = "class" if has_class else "mean"
    notes.append(f"pooling: it returns tokens without pooling; {usual} is used.")
    return usual


def _activation(model: Any, notes: list[str]) -> dict[str, str]:
    """Our name for the activation of a model's MLPs, which has no weights; empty if we do not have it."""
    found = ACTIVATIONS.get(type(model.blocks[0].mlp.act).__name__)
    remarks = " ".join(map(str, model.pretrained_cfg.get("notes") or ()))
    if found != "quick_gelu" and "QuickGELU" in remarks:
        notes.append(f"activation: {found}, as timm runs it; it remarks: {printable(remarks, 100)}.")
    return {} if found is None else {"mlp": found}


def _import_timm(name: str) -> ModuleType:
    require_packages(f"timm:{name}", "sslvit[timm]", "timm")
    import timm

    return timm


def create(name: str, pretrained: bool) -> Any:
    """Make a timm model without its classifier; errors become one line. Any, as timm sets attributes dynamically."""
    timm = _import_timm(name)
    try:
        with downloads_shown(f"timm:{name}"):
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the hub raises almost anything when it cannot be reached
        raise ValueError(f"timm:{name}: {_explain(error, name)}") from error


def _explain(error: Exception, name: str) -> str:
    """The reason why the model is not available, and a remedy."""
    import timm
    from huggingface_hub.constants import HF_HUB_CACHE

    tagged = timm.list_models(pretrained=True)
    known = {*tagged, *(model.split(".")[0] for model in tagged)}
    causes = (error, error.__cause__)
    is_unreachable = any(isinstance(one, OSError) or type(one).__module__.split(".")[0] in HTTP for one in causes)
    if name in known and is_unreachable:
        return (
            f"its weights are not in {HF_HUB_CACHE}, and the hub does not answer. With a network once: python -c "
            f"\"import timm; timm.create_model('{name}', pretrained=True)\"; without one, copy that folder from a "
            "machine where this was done."
        )
    reason = printable(str(error).splitlines()[0], 160) if str(error) else type(error).__name__
    return f"{reason.removesuffix('.')}.{near(name, known, most=3)}"


def _check_plain(name: str, model: nn.Module) -> None:
    timm = _import_timm(name)
    is_dinov3 = isinstance(getattr(model, "rope", None), timm.layers.RotaryEmbeddingDinoV3)
    if not (isinstance(model, timm.models.vision_transformer.VisionTransformer) or is_dinov3):
        raise ValueError(f"timm:{name}: a {type(model).__name__}, and only plain vision transformers can be probed.")


def _check_fits(name: str, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Refuse a folder with settings that do not match its weights, before memory is allocated."""
    arguments, architecture = config.get("model_args") or {}, config["architecture"]
    if not isinstance(architecture, str) or not _import_timm(name).models.is_model_in_modules(architecture, MODULES):
        raise ValueError(
            f"timm:{name}: a {printable(architecture, 40)}, and only plain vision transformers can be probed."
        )
    depth = arguments.get("depth") if isinstance(arguments, dict) else None
    blocks = count_blocks(weights, "blocks.")
    if depth is not None and depth != blocks:
        raise ValueError(
            f"timm:{name}: states a depth of {printable(depth, 40)}, but its weights have {blocks} blocks."
        )
    with torch.device("meta"):
        model = create(name, pretrained=False)
    _check_plain(name, model)
    for key, value in model.state_dict().items():
        there = tuple(weights[key].shape) if key in weights else "missing"
        is_table = key == "pos_embed" and key in weights and value.shape[1] <= MAX_PATCHES  # timm may interpolate it
        if there != tuple(value.shape) and not is_table:
            raise ValueError(f"timm:{name}: states {tuple(value.shape)} for {key}, which is {there} among its weights.")

"""Checks that weights fit an encoder's settings, and that two encoders interpret the same weights alike."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslvit.files import brief, printable
from sslvit.models import ViTEncoder
from sslvit.plugins import PluginNeeded
from sslvit.settings import EncoderSettings
from sslvit.settings.load import build
from sslvit.weight_files import count_blocks

POSITION_TABLES = ("learned_1d", "sincos_1d", "sincos_2d")
NOT_IN_THE_WEIGHTS = (
    "dropout", "drop_path", "activation_checkpointing", "init", "color_init", "mean", "std", "interpolation",
    "crop_mode", "crop_fraction", "feature_layer", "feature_norm", "pooling", "pool_mlp",
    "interpolate_antialias", "interpolate_offset",
)  # fmt: skip


def settings_from(content: object, source: str | Path) -> EncoderSettings:
    """Build settings from a file's content, validated like a recipe's."""
    try:
        if not isinstance(content, dict):
            raise ValueError(f"its encoder is a {type(content).__name__}, not settings.")
        return build(EncoderSettings, content)
    except PluginNeeded as error:
        raise PluginNeeded(f"{source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error} Was it written by another version of sslvit?") from error


def load_strict(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must match exactly; the error lists missing, unexpected and wrongly shaped parameters."""
    expected: Any = module.state_dict()
    _compare_shapes(expected, weights, source)
    state: Any = OrderedDict(weights)
    state._metadata = expected._metadata  # versions of modules, which files may lack and torchvision's MNASNet asks for
    module.load_state_dict(state)


def check_fits(settings: EncoderSettings, weights: dict[str, Any], source: str) -> None:
    """Refuse weights that do not match a file's settings, before memory is allocated for the network."""
    other = next((key for key, value in weights.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ValueError(f"{source}: {brief(other)} is a {type(weights[other]).__name__}, not a tensor. Is it damaged?")
    if settings.backbone is not None:
        return  # its library determines its size, not the file
    shape = copy.copy(settings)
    shape.depth = min(settings.depth, count_blocks(weights, "blocks.") + 1)
    shape.color_init = "normal"
    if shape.pos_embed in POSITION_TABLES:
        shape.pos_embed = "learned_1d"  # same shape, without computing the table
    try:
        with torch.device("meta"):
            expected = ViTEncoder(shape).state_dict()
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # impossible tensor sizes
        reason = printable(str(error).splitlines()[0], 120)
        raise ValueError(f"{source}: its settings describe no network that can be built ({reason}).") from error
    _compare_shapes(expected, weights, source, f" of {settings.depth:,} blocks" if shape.depth < settings.depth else "")


def _compare_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor], source: str, more: str = "") -> None:
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, here {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if expected[key].shape != weights[key].shape
    ]
    problems = [
        f"{title} {printable(', '.join(keys[:4]))}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for title, keys in (("missing:", missing), ("unknown:", unknown), ("other shape:", sorted(shapes)))
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: these weights are of another architecture{more} ({'; '.join(problems)}).")


def settings_difference(one: EncoderSettings, other: EncoderSettings) -> list[str]:
    """List the settings in which two encoders would interpret the same weights differently, as 'width: 192 and 384'.

    Randomness, memory savers, pooling and the resampling of positions do not count; learned and fixed position tables
    count as equal.
    """
    differences = []
    for field in fields(EncoderSettings):
        values = [getattr(settings, field.name) for settings in (one, other)]
        if field.name == "rotary_grid" and None in values:
            continue  # one of them has another kind of positions, which is listed as pos_embed
        if field.name == "pos_embed":
            values = ["a table" if value in POSITION_TABLES else value for value in values]
        if field.name not in NOT_IN_THE_WEIGHTS and values[0] != values[1]:
            differences.append(f"{field.name}: {brief(values[0])} and {brief(values[1])}")
    return differences


def check_same(there: EncoderSettings, here: EncoderSettings, source: str, besides: Sequence[str] = ()) -> None:
    """Refuse weights whose own settings (`there`) differ from the settings to use, except for those in `besides`."""
    differences = [text for text in settings_difference(there, here) if text.split(":")[0] not in besides]
    if differences:
        raise ValueError(f"{source}: an encoder of another architecture (there and here {'; '.join(differences)}).")

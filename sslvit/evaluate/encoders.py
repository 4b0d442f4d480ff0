"""Encoders as users name them: by path, by name, or as modules."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.utils._pytree import tree_leaves

from sslvit.checkpoint import load_encoder
from sslvit.files import expand_path
from sslvit.models import Backbone, Encoder, ViTEncoder, device_and_dtype
from sslvit.models.backbone import evaluating
from sslvit.ranks import is_first_rank
from sslvit.settings.probe import read_size

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

EncoderLike = str | os.PathLike[str] | nn.Module  # a ViTEncoder, a Backbone, or any module from images to vectors
Size = int | str | Sequence[int]


def borrows_modules(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator for functions that use modules in evaluation mode: restores their devices and modes afterwards."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        modules = [value for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Module)]
        devices = [device_and_dtype(module)[0] for module in modules]
        try:
            with ExitStack() as modes:
                for module in modules:
                    modes.enter_context(evaluating(module))
                return function(*args, **kwargs)
        finally:
            for module, device in zip(modules, devices, strict=True):
                module.to(device)

    return call


def open_encoder(encoder: EncoderLike, crop_fraction: float | None = None, size: Size | None = None) -> Encoder:
    """Open an encoder by name, or take a module as it is; optionally change the crop or the size of its images."""
    found: Encoder
    if isinstance(encoder, (ViTEncoder, Backbone)):
        found = encoder
    elif isinstance(encoder, nn.Module):
        found = Backbone(encoder)
    else:
        found = load_encoder(expand_path(encoder))
    changes: dict[str, Any] = {}
    if crop_fraction is not None:
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"--crop-fraction {crop_fraction:g}: must be in (0, 1].")
        changes["crop_fraction"] = crop_fraction
    if size is not None:
        changes["image_size"] = read_size(size, found.settings)
    if not changes:
        return found
    seen = copy.copy(found)  # with the same weights
    seen.settings = replace(found.settings, **changes)
    if isinstance(seen, Backbone):
        seen.measure_width()  # refuses a size that the network cannot take
    elif seen.settings.grid != seen.position_grid and is_first_rank():
        grids = [f"{rows} x {columns}" for rows, columns in (seen.position_grid, seen.settings.grid)]
        logger.info(f"images are seen in {grids[1]} patches; positions are interpolated from {grids[0]}")
    return seen

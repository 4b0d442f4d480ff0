"""Options shared by several commands. A command's options are a dataclass, whose docstrings are the help texts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sslvit.settings.choices import Arg

Layout = Literal["mae", "dino", "dinov2", "dinov3", "timm", "transformers", "openai_igpt"]
File = Arg("FILE")
Output = Arg("FILE", flag="-o")


@dataclass(kw_only=True)
class Options:
    """Options of every command."""

    quiet: bool = False
    """Print only warnings and errors, and no progress."""
    traceback: bool = False
    """Print the traceback of an error."""
    plugin: Annotated[str | None, Arg("MODULE")] = None
    """Your own module or .py file, whose tasks, views, tokenizers and exporters can then be named by import path;
    separate several by commas."""


@dataclass(kw_only=True)
class Reported(Options):
    """Options of a command that reports a result."""

    json: bool = False
    """Print the result as one JSON document on stdout, and all messages on stderr."""


@dataclass(kw_only=True)
class Saved(Reported):
    """Options of a command that can also write its result to a file."""

    output: Annotated[str | None, Output] = None
    """File for the result as JSON."""


@dataclass(kw_only=True)
class Recipe(Options):
    """Options of a command that accepts settings of a recipe as --KEY VALUE."""

    changes: Annotated[dict[str, Any], argparse.SUPPRESS] = field(default_factory=dict)


@dataclass(kw_only=True)
class Resumable(Reported, Recipe):
    """Options of a command that trains."""

    resume: bool = False
    """Resume from the run folder's last checkpoint."""
    overwrite: bool = False
    """Delete an earlier run in the folder first."""


@dataclass(kw_only=True)
class Released:
    """Settings that a released file does not include."""

    heads: int | None = None
    """Number of attention heads, which a released file does not include."""
    image_size: Annotated[list[int] | None, Arg(("HEIGHT", "WIDTH"))] = None
    """Image size in pixels at which a released file was trained."""
    palette: Annotated[str | None, File] = None
    """Colors of a released iGPT, which its file does not include."""


@dataclass(kw_only=True)
class FromFile(Released):
    """How to read a file of weights."""

    layout: Layout | None = None
    """Layout of a released file; null for the one recognized by its parameter names."""
    weights: str | None = None
    """Which of several networks in a file to load, such as student or model_ema."""


@dataclass(kw_only=True)
class Encoder(FromFile):
    """An encoder."""

    encoder: Annotated[str, Arg("ENCODER", position=1)]
    """Run folder, encoder folder or checkpoint file."""


@dataclass(kw_only=True)
class CroppedEncoder(Encoder):
    """An encoder with its input crop and size."""

    crop_fraction: float | None = None
    """Side of the center crop as a fraction of the image's, 224 of 256: 0.875; null for the encoder's own."""
    size: Annotated[str | None, Arg("SIDE|HxW", is_path=False)] = None
    """Input size in pixels, 64 or 48x64, for which positions are interpolated; null for the encoder's own."""

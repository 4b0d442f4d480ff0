"""Options that several commands have. A command's options are a dataclass; its docstring and fields are its help."""

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
    """Say warnings and errors only, and show no progress."""
    traceback: bool = False
    """Show where an error came from."""
    plugin: Annotated[str | None, Arg("MODULE")] = None
    """Module or .py file of your own whose tasks, views, tokenizers and exporters may be named by import path; separate
    several by commas.
    """


@dataclass(kw_only=True)
class Reported(Options):
    """Options of a command whose result is numbers."""

    json: bool = False
    """Print the result as one JSON document, and all messages on stderr."""


@dataclass(kw_only=True)
class Saved(Reported):
    """The same, where the numbers may be kept in a file."""

    output: Annotated[str | None, Output] = None
    """File for the result as JSON."""


@dataclass(kw_only=True)
class Recipe(Options):
    """Options of a command that takes settings of a recipe as --KEY VALUE."""

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
    """What a released file does not tell."""

    heads: int | None = None
    """Number of attention heads of a released file, which does not tell it."""
    image_size: Annotated[list[int] | None, Arg(("HEIGHT", "WIDTH"))] = None
    """Image size in pixels that a released file was trained at."""
    palette: Annotated[str | None, File] = None
    """Colors of a released iGPT, which its file does not hold."""


@dataclass(kw_only=True)
class FromFile(Released):
    """How a file of weights is read."""

    layout: Layout | None = None
    """Layout of a released file; null for the one that its names tell."""
    weights: str | None = None
    """Which network of a file with several, such as student or model_ema."""


@dataclass(kw_only=True)
class Encoder(FromFile):
    """An encoder."""

    encoder: Annotated[str, Arg("ENCODER", position=1)]
    """Run folder, encoder folder or checkpoint file."""


@dataclass(kw_only=True)
class CroppedEncoder(Encoder):
    """An encoder that sees images."""

    crop_fraction: float | None = None
    """Fraction of the center crop's sides that is seen, 224 of 256: 0.875; null for the encoder's own."""
    size: Annotated[str | None, Arg("SIDE|HxW", is_path=False)] = None
    """Size in pixels that images are seen at, 64 or 48x64; positions are interpolated; null for the encoder's own."""
